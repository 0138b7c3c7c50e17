"""What the workers of a supervised launch tell their supervisor, and how they end with whoever started them.

The supervisor names a private folder in the environment. Without it there is nobody to tell, and nothing is done. On a
node that doesn't see it the node's agent passes on what is told (:mod:`dptrain.afar`).
Telling never raises: a worker has more to do than to report.
"""

import contextlib
import fcntl
import json
import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dptrain import afar

FOLDER = "DPTRAIN_SUPERVISED"
"""The environment's name for the folder."""

RUN, FAILURE, ENDED, LOST = "run.json", "failure.json", "ended.jsonl", "lost.json"
"""Of the folder: where the run is kept, the error that failed the job, the workers that a watchdog ended, and why a
worker waits for the others no more."""

PRESENT = "present.json"
"""Of the folder: how many processes compute for a parameter server."""

SUPERVISOR = "supervisor"
"""Of the folder: the supervisor's process id, in a file that is locked for as long as it lives."""

WORKERS = "workers"
"""Of the folder: a named pipe, in which each worker writes its process id."""

RESULT = "result.json"
"""Of the run directory."""

_PR_SET_PDEATHSIG = 1


def opened(run_dir: Path, attempt: int, step: int) -> None:
    """The run directory is open, and training goes on from ``step``; the first chief's word on that holds."""
    folder = os.environ.get(FOLDER)
    if folder and (afar.reached() or not os.path.exists(os.path.join(folder, RUN))):
        content = {"run_dir": str(run_dir), "attempt": attempt, "step": step}
        _tell(RUN, content | {"result": identity(run_dir / RESULT)}, once=True)


def failed(code: int, error: str) -> None:
    """The job failed of an error, which all workers leave with: it is no fault, and starting again would not help."""
    _tell(FAILURE, {"code": code, "error": error})


def meet(processes: int) -> None:
    """So many processes compute for a parameter server now."""
    _tell(PRESENT, {"processes": processes})


def present() -> int:
    """How many do; 0 where that is not known."""
    with contextlib.suppress(OSError, ValueError, KeyError), open(os.path.join(os.environ[FOLDER], PRESENT)) as file:
        return int(json.load(file)["processes"])
    return 0


def lost(error: str) -> None:
    """A worker leaves because others are lost, which is a fault: its launcher may wait for them for ever."""
    _tell(LOST, {"error": error})


def ended(rank: int, host: str, pid: int, step: int, phase: str, why: str) -> None:
    """A watchdog ends a worker."""
    line = {"rank": rank, "host": host, "pid": pid, "step": step, "phase": phase, "why": why, "time": time.time()}
    folder = os.environ.get(FOLDER)
    if afar.reached():
        with contextlib.suppress(OSError):
            afar.tell(ENDED, line, added=True)
    elif folder:
        with contextlib.suppress(OSError), open(os.path.join(folder, ENDED), "ab", buffering=0) as file:
            file.write(json.dumps(line).encode() + b"\n")


def identity(path: Path) -> list[int] | None:
    """What changes whenever a file is replaced; None where there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return [found.st_ino, found.st_mtime_ns]


def die_with_launcher() -> None:
    """A worker calls this first: from now on the end of its parent, the launcher, is its own.

    It is ended at once where that has ended already. The supervisor, if there is one, learns who its workers are.
    """
    parent = os.getppid()
    if _orphaned(parent):
        os.kill(os.getpid(), signal.SIGKILL)
    die_with(parent)
    folder = os.environ.get(FOLDER)
    if folder:
        with contextlib.suppress(OSError):
            handle = os.open(os.path.join(folder, WORKERS), os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                os.write(handle, f"{os.getpid()}\n".encode())
            finally:
                os.close(handle)


def die_with(parent: int) -> None:
    """SIGKILL ends this process when the parent, which has that process id, has ended."""
    import ctypes

    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def _orphaned(parent: int) -> bool:
    """Whether the launcher of a supervised worker is gone: its supervisor, or process 1, has become the parent."""
    folder = os.environ.get(FOLDER)
    if not folder:
        return False
    try:
        with open(os.path.join(folder, SUPERVISOR), encoding="ascii") as file:
            return parent in (1, int(file.read())) or abandoned(file.fileno())
    except (OSError, ValueError):
        # Of another machine, or of another user.
        return False


def abandoned(handle: int) -> bool:
    """Whether the supervisor that had locked this open file is gone."""
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return False
    fcntl.flock(handle, fcntl.LOCK_UN)
    return True


def _tell(name: str, content: Mapping[str, Any], *, once: bool = False) -> None:
    folder = os.environ.get(FOLDER)
    if not folder:
        return
    if afar.reached():
        with contextlib.suppress(OSError):
            afar.tell(name, content, once=once)
        return
    part = os.path.join(folder, f".{name}.{os.getpid()}")
    with contextlib.suppress(OSError):
        with open(part, "w", encoding="utf-8") as file:
            json.dump(content, file)
        os.replace(part, os.path.join(folder, name))
