"""Folders of a launch's own, for what it must not leave behind, and what was left by those that were killed."""

import contextlib
import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from dptrain import supervision
from dptrain.processes import pids

SHARED_MEMORY = Path("/dev/shm")
_PREFIX = "dptrain-run-"


@contextmanager
def folders(shared: Path | None = None) -> Iterator[tuple[Path, Path | None]]:
    """A folder for what workers tell, and one in shared memory if there is any; both are removed at the end.

    Where workers are of several hosts, the first is in ``shared``, which all of them see, and there is no other. Those
    of supervisors that were killed are removed too.
    """
    for place in filter(None, (Path(tempfile.gettempdir()), SHARED_MEMORY, shared)):
        for folder in place.glob(f"{_PREFIX}*"):
            _remove_abandoned(folder)
    with ExitStack() as left:
        folder = left.enter_context(_folder(shared))
        memory = None
        if shared is None:
            os.mkfifo(folder / supervision.WORKERS)
            with contextlib.suppress(OSError):
                memory = left.enter_context(_folder(SHARED_MEMORY))
        yield folder, memory


@contextmanager
def _folder(place: Path | None) -> Iterator[Path]:
    """A new folder that is this process's for as long as it lives."""
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=place))
    try:
        with (folder / f".{supervision.SUPERVISOR}").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.write(str(os.getpid()))
            file.flush()
            Path(file.name).rename(folder / supervision.SUPERVISOR)
            yield folder
    finally:
        _remove(folder)


def _remove_abandoned(folder: Path) -> None:
    with contextlib.suppress(OSError), (folder / supervision.SUPERVISOR).open() as file:
        if os.fstat(file.fileno()).st_uid == os.geteuid() and supervision.abandoned(file.fileno()):
            _remove(folder)


def _remove(folder: Path) -> None:
    sweep(folder)
    shutil.rmtree(folder, ignore_errors=True)


def sweep(folder: Path) -> None:
    """Remove the shared memory that MPICH leaves behind when it is killed: as new as this folder and unused."""
    with contextlib.suppress(FileNotFoundError):
        since = (folder / supervision.SUPERVISOR).stat().st_mtime_ns
        made = [path for path in SHARED_MEMORY.glob("mpich_*") if _is_ours(path, since)]
        used = _used_memory() if made else set()
        for path in made:
            if str(path) not in used:
                path.unlink(missing_ok=True)


def _is_ours(path: Path, since: int) -> bool:
    try:
        found = path.stat()
    except OSError:
        return False
    return found.st_uid == os.geteuid() and found.st_ctime_ns >= since


def _used_memory() -> set[str]:
    """The files of shared memory that processes have open or mapped."""
    used: set[str] = set()
    for pid in pids():
        # A process that ends in the middle of this has nothing open any more.
        with contextlib.suppress(OSError):
            used.update(re.findall(rf" ({SHARED_MEMORY}/\S+)", Path(f"/proc/{pid}/maps").read_text()))
            used.update(os.readlink(f"/proc/{pid}/fd/{handle}") for handle in os.listdir(f"/proc/{pid}/fd"))
    return used
