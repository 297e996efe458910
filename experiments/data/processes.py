"""Work in as many processes as cores, in order, which ends with this process however that ends."""

import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import TypeVar

from analysis.errors import WorkFailed

Job = TypeVar("Job")
Result = TypeVar("Result")

# Processes take a third of a second each to start; below this many bytes of text one process is as fast.
PARALLEL_BYTES = 128 * 2**20


def count(jobs: int, text_bytes: int) -> int:
    """How many processes to use for so many jobs on so much text: of a job of Slurm, no more than it asked for, which
    not every cluster binds its processes to."""
    cores = len(os.sched_getaffinity(0))
    cores = min(cores, int(os.environ.get("SLURM_CPUS_PER_TASK", cores)))
    return 1 if text_bytes < PARALLEL_BYTES else min(cores, jobs)


def in_order(work: Callable[[Job], Result], jobs: Sequence[Job], workers: int) -> Iterator[Result]:
    """The results of the jobs in their order. Stop asking, and the rest is not done.

    Raises what `work` raises, and WorkFailed if a process was killed.
    """
    context = get_context("spawn")
    reader, writer = context.Pipe(duplex=False)
    # The last of these is closed first, whatever happens: the pool waits for its workers.
    with reader, ProcessPoolExecutor(workers, context, _start_worker, (reader,)) as pool, writer:
        # Few jobs wait, so that little is done in vain when the caller has enough.
        futures = [pool.submit(work, job) for job in jobs[:workers]]
        try:
            for number in range(len(jobs)):
                result = futures[number].result()
                futures += [pool.submit(work, later) for later in jobs[len(futures) : number + 1 + workers]]
                yield result
        except BrokenProcessPool as error:
            raise WorkFailed(
                "a process that builds the data was killed, perhaps for want of memory; what is done is kept: build "
                "again, on fewer cores (taskset) if need be"
            ) from error


def _start_worker(parent: Connection) -> None:
    """One core a worker; and leave at once when the parent closes its end of a pipe, or is killed, which closes it.

    A pipe needs no lock. Workers that shared an Event could wait for ever for its lock, and the parent for them, if one
    of them left while it held that lock. A build of 16 processes did wait so, by what its threads waited for.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent tells the workers

    def watch() -> None:
        parent.poll(None)  # nothing is ever sent
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
