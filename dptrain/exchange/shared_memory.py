"""Memory that all workers of one machine share: a file in /dev/shm that is unlinked as soon as all have mapped it.

No crash leaves anything behind, and the memory outlives any of the workers. All of it is reserved when it is made, so
that nobody dies of a bus error later.
"""

import mmap
import os
from pathlib import Path

import numpy as np

from dptrain.exchange.communicator import Communicator
from dptrain.layout import Array

FOLDER = Path("/dev/shm")


def shared(communicator: Communicator, nbytes: int) -> Array | None:
    """``nbytes`` zero bytes that all workers see, or None on all of them where that can't be had."""
    path = communicator.broadcast_json(_create(nbytes) if communicator.rank == 0 else None, "sharing memory")
    if path is None:
        return None
    try:
        memory = _map(path, nbytes)
    except OSError:
        # Containers of one machine may each have a /dev/shm of their own.
        memory = None
    everyone = communicator.allgather_json(memory is not None, "sharing memory")
    if communicator.rank == 0:
        os.unlink(path)
    return memory if all(everyone) else None


def _create(nbytes: int) -> str | None:
    path = FOLDER / f"dptrain-{os.urandom(8).hex()}"
    try:
        handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
    except OSError:
        return None
    try:
        os.posix_fallocate(handle, 0, nbytes)
    except OSError:
        os.unlink(path)
        return None
    finally:
        os.close(handle)
    return str(path)


def _map(path: str, nbytes: int) -> Array:
    handle = os.open(path, os.O_RDWR)
    try:
        if os.fstat(handle).st_size != nbytes:
            raise OSError(f"{path} is another file")
        return np.frombuffer(mmap.mmap(handle, nbytes), np.uint8)
    finally:
        os.close(handle)
