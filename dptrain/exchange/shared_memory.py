"""Memory that the workers of one machine share, and that no crash leaves behind.

One worker reserves it, the others attach to it. At first without a name (memfd_create): the others open it by way of
/proc, it lies in no directory, and it isn't held to the size of /dev/shm, of which a container has 64 MB. Where that
is not allowed, it is a file in /dev/shm, unlinked as soon as all have mapped it. All of it is reserved at once, so
that nobody dies of a bus error later, and it outlives any of the workers.
"""

import fcntl
import mmap
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from dptrain.errors import LaunchError
from dptrain.layout import Array
from dptrain.limits import limits

FOLDER = Path("/dev/shm")

HOST = os.uname().nodename


class Reserved:
    """Memory that others may attach to by ``path`` until it is released; what is attached stays.

    ``handle`` is its open file, for processes that inherit it.
    """

    def __init__(self, handle: int, path: str, name: Path | None) -> None:
        self.path = path
        self.handle, self._name = handle, name

    def release(self) -> None:
        """Nobody can attach any more."""
        os.close(self.handle)
        if self._name is not None:
            self._name.unlink()


def nameless(nbytes: int) -> Reserved:
    """Reserve memory that has no name. LaunchError where the machine, or its control group, hasn't so much."""
    room = available()
    if nbytes > room:
        # Asking for it would not fail, but call the kernel's killer.
        raise _too_little(nbytes, f"{room >> 20} MB", _LESS)
    handle = os.memfd_create("dptrain", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    path = f"/proc/{os.getpid()}/fd/{handle}"
    made = _reserved(handle, nbytes, path, None, "start fewer workers, or a smaller model")
    # Whoever maps it may rely on its length.
    fcntl.fcntl(handle, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    return made


def in_dev_shm(nbytes: int) -> Reserved:
    """Reserve a file in /dev/shm. LaunchError where that is too small."""
    name = FOLDER / f"dptrain-{os.urandom(8).hex()}"
    try:
        handle = os.open(name, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
    except OSError as error:
        raise _too_little(nbytes, f"no file can be made there: {error.strerror}", _CURE) from None
    return _reserved(handle, nbytes, str(name), name, _CURE)


WAYS: tuple[Callable[[int], Reserved], ...] = (nameless, in_dev_shm)
"""To be tried in this order, until all can attach."""

_LESS = "start fewer workers, or train a smaller model"
_CURE = 'docker run --shm-size=…, shm_size in docker-compose.yml, or exchange.type = "segments", which sends messages'


def available() -> int:
    """Bytes that may still be asked for."""
    limit = limits().memory
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    return free if limit is None else min(free, limit)


def attach(path: str, nbytes: int) -> Array | None:
    """The memory as ``nbytes`` bytes; None where this process can't get at it."""
    try:
        handle = os.open(path, os.O_RDWR)
    except OSError:
        # Not allowed to look at the other's files, or containers of one machine that have each their own.
        return None
    try:
        if os.fstat(handle).st_size != nbytes:
            return None
        return np.frombuffer(mmap.mmap(handle, nbytes), np.uint8)
    finally:
        os.close(handle)


def unreachable(rank: int) -> LaunchError:
    """The error of a worker that can attach in no way."""
    return LaunchError(
        f"rank {rank} on {HOST}",
        expected="memory that it can share with the other workers of its machine",
        found="neither /proc nor /dev/shm gives it what the first of them reserved",
        cure='start the workers in one container, or set exchange.type = "segments", which sends messages',
    )


def _reserved(handle: int, nbytes: int, path: str, name: Path | None, cure: str) -> Reserved:
    made = Reserved(handle, path, name)
    try:
        os.posix_fallocate(handle, 0, nbytes)
    except OSError as error:
        made.release()
        raise _too_little(nbytes, _room(name, error), cure) from None
    return made


def _room(name: Path | None, error: OSError) -> str:
    if name is None:
        return error.strerror or str(error)
    room = os.statvfs(FOLDER)
    return f"{room.f_bavail * room.f_frsize >> 20} MB"


def _too_little(nbytes: int, found: str, cure: str) -> LaunchError:
    return LaunchError(
        f"shared memory on {HOST}",
        expected=f"{-(-nbytes >> 20)} MB for the partials of its workers and the state",
        found=found,
        cure=cure,
    )
