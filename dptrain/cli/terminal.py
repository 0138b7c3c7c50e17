"""The terminal that a run is watched on.

Under mpirun a worker's own stdout is a pipe (MPICH) or a terminal of the launcher's making (Open MPI) whatever the
launcher's is, so the launcher's decides: the first mpirun among this process's ancestors.
"""

import os
import shutil
import sys

from dptrain.launch import Announced
from dptrain.processes import process

LAUNCHERS = frozenset({"mpirun", "mpiexec", "mpiexec.hydra", "mpiexec.gforker", "prterun", "orterun", "srun"})
"""Names of launcher processes, as the kernel shortens them to 15 characters."""


def width(place: Announced) -> int | None:
    """Columns of the terminal that shows this process's stdout, or None where there is no terminal."""
    if os.environ.get("TERM") == "dumb":
        return None
    if place.rank is None:
        return shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    launcher = launcher_process()
    return None if launcher is None else _width_of(f"/proc/{launcher}/fd/1")


def launcher_process() -> int | None:
    """The process id of the launcher on this machine that started this process, if there is one."""
    pid = os.getppid()
    while pid > 1:
        found = process(pid)
        if found is None:
            return None
        if found.name in LAUNCHERS:
            return pid
        pid = found.parent
    return None


def _width_of(path: str) -> int | None:
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_NOCTTY | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        return os.get_terminal_size(descriptor).columns or 80 if os.isatty(descriptor) else None
    except OSError:
        return None
    finally:
        os.close(descriptor)
