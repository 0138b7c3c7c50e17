"""Whether anybody trains in a run directory: who does has a file of it locked, and locks end with whoever has them."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

ALIVE = ".alive"


@contextlib.contextmanager
def alive(path: Path) -> Iterator[None]:
    """Within it, and as long as this process lives, whoever asks finds the run ``occupied``."""
    try:
        handle = _shared(path / ALIVE)
    except (OSError, TypeError):
        # A sign of life is not worth a run, and one of another machine (afar.FarPath) has none here.
        yield
        return
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            # Whoever leaves last takes it along; one who was killed leaves it, unlocked.
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.unlink(path / ALIVE)
        os.close(handle)


def _shared(path: Path) -> int:
    """The file that has this name, open and locked; it may have been taken along between the two."""
    while True:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            with contextlib.suppress(OSError):
                fcntl.flock(handle, fcntl.LOCK_SH)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(handle), os.stat(path)):
                    return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def occupied(path: Path) -> bool:
    """Whether a process of this machine, or of one that shares the folder with its locks, trains there."""
    try:
        handle = os.open(path / ALIVE, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(handle)
    return False
