"""How the processes of a run find each other: rank 0 opens a TCP store and publishes its address in a file.

The system chooses the port, so none can be taken already. The file needs no locks, which many shared file systems lack.
"""

import contextlib
import gc
import os
import socket
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from analysis.logs.files import read_json, write_json
from experiments.training.parallel import PeersMissing

LOOPBACK = "127.0.0.1"
MINUTES = 10.0  # to wait for the other processes of a job, which may start minutes apart on several nodes
_TIMEOUT = timedelta(minutes=MINUTES)
_POLL_SECONDS = 0.1


@contextlib.contextmanager
def process_group(device: torch.device, file: Path, rank: int, size: int, hosts: Sequence[str]) -> Iterator[None]:
    """Join the processes of a job, each with its device, to torch's default process group until the context ends.

    `file` is where rank 0 publishes its address; the name must be new for every attempt. `hosts` are the job's nodes;
    if there is only one, rank 0 listens only on the loopback interface. Raises ValueError if torch lacks the backend,
    and PeersMissing, or an error of torch.distributed, if the processes do not find each other in time.
    """
    cuda = device.type == "cuda"
    backend, available = ("nccl", dist.is_nccl_available()) if cuda else ("gloo", dist.is_gloo_available())
    if not available:
        raise ValueError(
            f"torch was built without {backend.upper()}, which several processes need here; install a build that has "
            "it, or set gpus = 1"
        )
    if len(hosts) <= 1:
        for library in ("NCCL", "GLOO"):
            os.environ[f"{library}_SOCKET_IFNAME"] = "lo"
    store = _open_store(file, size, hosts) if rank == 0 else _find_store(file, size)
    dist.init_process_group(
        backend, store=store, rank=rank, world_size=size, timeout=_TIMEOUT, device_id=device if cuda else None
    )
    try:
        if rank == 0:
            file.unlink(missing_ok=True)  # All processes have joined.
        yield
        dist.barrier()  # Rank 0 must not close the store while others still use it.
    finally:
        # Free objects that still refer to the group, such as DDP, before it is destroyed. Otherwise the group's threads
        # may outlive the interpreter, which aborts the process ("terminate called without an active exception"). Nor
        # may DDP hold the last reference: it would free the group while it holds the interpreter's lock, for which a
        # thread of the group may be waiting (seen with gloo).
        gc.collect()
        dist.destroy_process_group()


def _open_store(file: Path, size: int, hosts: Sequence[str]) -> Any:
    """Rank 0's store, listening on one interface only."""
    address = _own_address(hosts)
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as listening:
        listening.bind((address, 0))
        listening.listen(size)
        port = listening.getsockname()[1]
        # The store takes over a copy of this socket. A socket of its own would listen on all interfaces.
        descriptor = os.dup(listening.fileno())
    store = dist.TCPStore(  # type: ignore[attr-defined]
        address, port, size, is_master=True, timeout=_TIMEOUT, wait_for_workers=False, master_listen_fd=descriptor
    )
    write_json(file, {"address": address, "port": port})
    return store


def _find_store(file: Path, size: int) -> Any:
    """A client of rank 0's store, once its address is published. Raises PeersMissing after MINUTES."""
    deadline = time.monotonic() + 60 * MINUTES
    while not file.exists():
        if time.monotonic() > deadline:
            raise PeersMissing(f"rank 0 has not published its address in {file} after {MINUTES:g} min; retry")
        time.sleep(_POLL_SECONDS)
    published = read_json(file)
    return dist.TCPStore(published["address"], published["port"], size, timeout=_TIMEOUT)  # type: ignore[attr-defined]


def _own_address(hosts: Sequence[str]) -> str:
    """The address of this node on the interface by which it reaches the job's other nodes."""
    if len(hosts) <= 1:
        return LOOPBACK
    # Rank 0 is on the first node, so the last one is another. Any port will do, since nothing is sent.
    family, _, _, _, address = socket.getaddrinfo(hosts[-1], 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as unsent:
        unsent.connect(address)  # For a datagram socket this only chooses the interface.
        own: str = unsent.getsockname()[0]
    return own
