"""What the operating system lets this process have: cores, memory, shared memory, and copies between processes."""

import ctypes
import os
import resource
from pathlib import Path
from typing import NamedTuple

from dptrain.errors import OutOfMemory


class Limits(NamedTuple):
    """``cores`` that may be scheduled on; of ``cpus`` as a quota and ``memory`` in bytes, None means no limit."""

    cores: int
    cpus: float | None
    memory: int | None


def limits(proc: Path = Path("/proc"), mount: Path = Path("/sys/fs/cgroup")) -> Limits:
    """The tightest limits of this process's control groups (v1 and v2) and its affinity."""
    cpus: list[float] = []
    memory: list[int] = []
    for controllers, path in _groups(proc):
        for folder in _up(mount, controllers, path):
            quota, period = _quota(folder)
            if quota is not None and quota > 0 and period:
                cpus.append(quota / period)
            for name in ("memory.max", "memory.limit_in_bytes"):
                bound = _integer(folder / name)
                # v1 says "no limit" as a number near 2**63.
                if bound is not None and bound < 1 << 60:
                    memory.append(bound)
    return Limits(len(os.sched_getaffinity(0)), min(cpus, default=None), min(memory, default=None))


def most_data() -> int | None:
    """How many bytes of data this process may take by its resource limit (RLIMIT_DATA); None: as many as there are."""
    soft, _ = resource.getrlimit(resource.RLIMIT_DATA)
    return None if soft == resource.RLIM_INFINITY else soft


def shortage(where: str, failure: MemoryError, needed: int) -> OutOfMemory:
    """What ends a process that is refused memory, and has needed so many bytes up to there."""
    most = most_data()
    if most is None:
        expected = f"room for one more array beside the {needed >> 20} MB that this worker has needed so far"
        cure = "start fewer workers here or lower train.batch_size; "
    else:
        expected = f"to get by with {most / 1e9:.3g} GB of memory, the limit of each process"
        cure = "raise it (--job-memory of `dptrain serve`, or `ulimit -d`), or lower train.batch_size; "
    found = str(failure) or f"a need of more than {needed >> 20} MB"
    return OutOfMemory(
        where, expected=expected, found=found, cure=cure + "`dptrain check -n N` says what each worker needs"
    )


def _groups(proc: Path) -> list[tuple[str, str]]:
    try:
        lines = (proc / "self/cgroup").read_text().splitlines()
    except OSError:
        return []
    parts = [line.split(":", 2) for line in lines]
    return [(part[1], part[2]) for part in parts if len(part) == 3]


def _up(mount: Path, controllers: str, path: str) -> list[Path]:
    """The group's folder and all above it; in a container the path may be the host's and only the root is there."""
    roots = [mount / name for name in (controllers, *controllers.split(",")) if name] if controllers else [mount]
    folders = []
    for root in roots:
        here = Path(path.lstrip("/"))
        folders += [root / here, *(root / parent for parent in here.parents), root]
    return [folder for folder in dict.fromkeys(folders) if folder.is_dir()]


def _quota(folder: Path) -> tuple[int | None, int | None]:
    try:
        quota, period = (folder / "cpu.max").read_text().split()
        return (None if quota == "max" else int(quota)), int(period)
    except (OSError, ValueError):
        return _integer(folder / "cpu.cfs_quota_us"), _integer(folder / "cpu.cfs_period_us")


def _integer(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def shared_memory(path: str = "/dev/shm") -> tuple[int, int] | None:
    """Size and free bytes of the shared memory file system, or None where it can't be written."""
    if not os.access(path, os.W_OK):
        return None
    stat = os.statvfs(path)
    return stat.f_blocks * stat.f_frsize, stat.f_bavail * stat.f_frsize


def cross_memory_attach() -> bool:
    """Whether process_vm_readv is allowed at all; a container's system call filter may forbid it."""

    class Vector(ctypes.Structure):
        _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))

    source, target = ctypes.create_string_buffer(b"x"), ctypes.create_string_buffer(1)
    local = Vector(ctypes.addressof(target), 1)
    remote = Vector(ctypes.addressof(source), 1)
    try:
        call = ctypes.CDLL(None, use_errno=True).process_vm_readv
    except (AttributeError, OSError):
        return False
    call.restype = ctypes.c_ssize_t
    one = ctypes.c_ulong(1)
    copied = call(os.getpid(), ctypes.byref(local), one, ctypes.byref(remote), one, ctypes.c_ulong(0))
    return int(copied) == 1


def container() -> bool:
    """Whether this looks like the inside of a container."""
    return Path("/.dockerenv").exists() or Path("/run/.containerenv").exists() or "container" in os.environ
