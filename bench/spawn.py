"""Starting a contestant in processes of its own, one thread a worker, and reading the one line of JSON it ends with."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dptrain.launch import command

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT = 300.0
"""Seconds that a run may take, start-up included."""

Found = dict[str, Any]


class NotRun(Exception):
    """A contestant that could not run here; the text says why."""


def environment(threads: int = 1) -> dict[str, str]:
    """This environment with ``threads`` threads for every BLAS and OpenMP."""
    names = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")
    return {**os.environ, **dict.fromkeys(names, str(threads))}


def mpirun_line(n: int, program: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """The command line and environment that start ``python PROGRAM`` under the installed MPI's mpirun."""
    line, environ = command(n, [], environment())
    return [*line[: line.index(sys.executable) + 1], *program], environ


def mpirun(n: int, module: str, *arguments: str, timeout: float = TIMEOUT) -> Found:
    """A module on ``n`` ranks. Raises NotRun."""
    line, environ = mpirun_line(n, ["-m", module, *arguments])
    return _told(line, environ, timeout)


def alone(module: str, *arguments: str, interpreter: str = "", threads: int = 1) -> Found:
    """A module in one process; the environment variable ``interpreter`` may name its Python. Raises NotRun."""
    with _python(interpreter) as python:
        return _told([python, "-m", module, *arguments], environment(threads), TIMEOUT)


def meeting(n: int, module: str, *arguments: str, interpreter: str = "") -> Found:
    """A module in ``n`` processes that find RANK and the MEETING file in their environment. Raises NotRun."""
    with (
        _python(interpreter) as python,
        tempfile.TemporaryDirectory() as folder,
        contextlib.ExitStack() as others,
    ):
        line = [python, "-m", module, *arguments]
        environ = {**environment(), "MEETING": f"{folder}/meeting"}
        for rank in range(1, n):
            others.enter_context(started(line, {**environ, "RANK": str(rank)}))
        return _told(line, {**environ, "RANK": "0"}, TIMEOUT)


@contextlib.contextmanager
def _python(interpreter: str) -> Iterator[str]:
    """The Python that an environment variable names, or this one; what it lacks is said with the cure."""
    python = os.environ.get(interpreter) or sys.executable
    try:
        yield python
    except NotRun as error:
        if interpreter and "ModuleNotFoundError" in str(error):
            raise NotRun(f"{error} in {python}; {interpreter} can name another Python") from None
        raise


@contextlib.contextmanager
def started(line: Sequence[str], environ: Mapping[str, str]) -> Iterator["subprocess.Popen[str]"]:
    """A process of a group of its own, none of which is left when the context is."""
    process = subprocess.Popen(
        line,
        env=dict(environ),
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
        if process.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.communicate(timeout=30)
    finally:
        _end(process)


def finish(process: "subprocess.Popen[str]", timeout: float = TIMEOUT) -> str:
    """What a process says until it ends well. Raises NotRun where it does not."""
    try:
        output, errors = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        raise NotRun(f"no result within {timeout:g} s") from None
    if process.returncode:
        said = errors.strip().splitlines() or ["it said nothing"]
        why = next((text for text in reversed(said) if "Error" in text), said[-1])
        raise NotRun(f"{why.strip()[:200]} (code {process.returncode})")
    return output


def _end(process: "subprocess.Popen[str]") -> None:
    """Ask a process's group to end, then end it; a launcher that is asked takes its ranks along."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is not None:
            return
        os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5)


def _told(line: Sequence[str], environ: Mapping[str, str], timeout: float) -> Found:
    with started(line, environ) as process:
        lines = finish(process, timeout).strip().splitlines()
    if not lines:
        raise NotRun("it ended well, but printed no result")
    found: Found = json.loads(lines[-1])
    return found
