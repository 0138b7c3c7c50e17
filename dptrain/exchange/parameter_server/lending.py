"""Memory that a server and a worker of one machine let each other look at, so that vectors need not travel.

What goes over the wire is the same chunk with the same place and checksum, but for the bytes, of which it says where
they lie. Nobody waits for who looks: what was written over meanwhile has another checksum than the one that was said.
"""

import fcntl
import mmap
import os
import stat
import weakref
from contextlib import suppress

import numpy as np
import numpy.typing as npt

from dptrain.errors import LaunchError
from dptrain.exchange import shared_memory
from dptrain.layout import Array
from dptrain.v1 import parameter_server_pb2 as pb


class Lent:
    """Memory of this process, ``memory`` as bytes, that is also its open file ``handle``."""

    def __init__(self, handle: int, memory: Array) -> None:
        self._handle, self._memory = handle, memory
        self._start = _address(memory)

    @property
    def told(self) -> pb.Memory:
        """How another process of this machine finds it."""
        found = os.fstat(self._handle)
        return pb.Memory(
            process=os.getpid(), handle=self._handle, device=found.st_dev, number=found.st_ino, bytes=found.st_size
        )

    def where(self, vector: Array) -> pb.Lent | None:
        """Where contiguous elements lie in it; None where they don't."""
        at = _address(vector) - self._start
        return pb.Lent(at=at, bytes=vector.nbytes) if 0 <= at <= len(self._memory) - vector.nbytes else None


def rows(count: int, size: int, dtype: npt.DTypeLike) -> tuple[Array, Lent | None]:
    """(count, size) zeros, in memory that can be lent, if the machine gives any, as long as somebody here has that."""
    itemsize = np.dtype(dtype).itemsize
    nbytes = max(1, count * size * itemsize)
    with suppress(LaunchError):
        reserved = shared_memory.nameless(nbytes)
        memory = shared_memory.attach(reserved.path, nbytes)
        if memory is None:
            reserved.release()
        else:
            lent = Lent(reserved.handle, memory)
            weakref.finalize(lent, reserved.release)
            return memory.view(dtype)[: count * size].reshape(count, size), lent
    return np.zeros((count, size), dtype), None


def look(told: pb.Memory) -> Array | None:
    """Another process's memory, to be read; None where this one can't get at it, or finds something else there.

    It can't become shorter, which would end who reads it.
    """
    path = f"/proc/{told.process}/fd/{told.handle}"
    try:
        if not _is(os.stat(path), told):
            return None
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        if not _is(os.fstat(handle), told) or not fcntl.fcntl(handle, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK:
            return None
        return np.frombuffer(mmap.mmap(handle, told.bytes, prot=mmap.PROT_READ), np.uint8)
    except OSError:
        return None
    finally:
        os.close(handle)


def _is(found: os.stat_result, told: pb.Memory) -> bool:
    """Whether a file is the one that was told of, as the kernel of both numbers it."""
    same = (found.st_dev, found.st_ino, found.st_size) == (told.device, told.number, told.bytes)
    return same and stat.S_ISREG(found.st_mode) and found.st_size > 0


def _address(some: Array) -> int:
    return int(some.__array_interface__["data"][0])
