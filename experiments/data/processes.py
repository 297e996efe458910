"""Work in as many processes as cores, in order, which ends with this process however that ends."""

import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import TYPE_CHECKING, TypeVar

from analysis.errors import WorkFailed

if TYPE_CHECKING:
    from multiprocessing.synchronize import Event

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
    stop = context.Event()
    with ProcessPoolExecutor(workers, context, _start_worker, (os.getpid(), stop)) as pool:
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
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)


def _start_worker(parent: int, stop: "Event") -> None:
    """One core a worker; and leave at once when told to, or when the parent has been killed and nobody would tell."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent tells the workers

    def watch() -> None:
        while os.getppid() == parent and not stop.wait(0.2):
            pass
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
