"""Starting real ranks from tests, with whatever MPI this environment has."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from dptrain.launch import command

ROOT = Path(__file__).resolve().parent.parent


def ranks(n: int, module: str, *arguments: str, timeout: float = 560.0) -> subprocess.CompletedProcess[str]:
    """Run ``python -m module`` on n ranks and wait for it."""
    line, environ = command(n, [], os.environ)
    at = line.index(sys.executable)
    environ |= {"OPENBLAS_NUM_THREADS": "1"}
    return run([*line[: at + 1], "-m", module, *arguments], environ, timeout, ROOT)


def dptrain(
    *arguments: str, n: int = 0, folder: Path | str = ".", timeout: float = 120.0, **environ: str
) -> subprocess.CompletedProcess[str]:
    """Run the ``dptrain`` command, under mpirun where n is above 0."""
    line, full = ([sys.executable, "-P", "-m", "dptrain"], dict(os.environ)) if not n else command(n, [], os.environ)
    return run([*line, *arguments], {**full, **environ}, timeout, folder)


def run(
    line: Sequence[str], environ: dict[str, str], timeout: float, folder: Path | str
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end; a hang is an error that shows what was said until then."""
    return subprocess.run(
        list(line),
        env=environ,
        cwd=folder,
        timeout=timeout,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        check=False,
    )
