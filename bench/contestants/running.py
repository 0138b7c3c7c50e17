"""A contestant that runs, seen from outside: the cells that its workers keep, and the signals that end them.

dptrain's own board serves all: the workers of a peer sign the same cells, in a file.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from bench.spawn import ROOT, TIMEOUT, NotRun, environment
from dptrain import board
from dptrain.board import PID, RANK, STEP, Cell
from dptrain.processes import process

CELLS, BEGUN = "cells", "begun"
"""In the folder of a peer that keeps no board: its workers' cells, and the step that each start went on from."""

POLL = 0.0005
"""Seconds between looks at a cell; what is timed here is known no better."""

SEARCH = 0.02
"""Seconds between looks for workers that have just been started."""

ENDING = 60.0
"""Seconds in which a command that was told to end must do so."""


def interpreter(variable: str) -> str:
    """The Python that an environment variable names, or this one."""
    return os.environ.get(variable) or sys.executable


def python_with(mpi: str, variable: str = "") -> tuple[str, str]:
    """A Python whose MPI is ``mpi``, the one that ``variable`` may name, and that MPI's version. Raises NotRun."""
    python = interpreter(variable)
    code = "from dptrain.launch import library_version as f; print(*f(), sep='\\n')"
    try:
        done = subprocess.run([python, "-c", code], capture_output=True, text=True, timeout=60, check=False, cwd=ROOT)
    except OSError as error:
        raise NotRun(f"{python}: {error.strerror}") from None
    found, _, version = done.stdout.strip().partition("\n")
    if found != mpi:
        said = found or (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        cure = f"{variable} can name another Python" if variable else "it takes an environment with that MPI"
        raise NotRun(f"needs {mpi}, and {python} has {said}; {cure}")
    return python, version


class Command:
    """A command under way; what it says goes to a file, and nothing of it is left when the context ends."""

    def __init__(self, line: Sequence[str], folder: Path, environ: Mapping[str, str] | None = None) -> None:
        self.log = folder / "said"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                line,
                cwd=ROOT,
                env={**environment(), **(environ or {})},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def __enter__(self) -> "Command":
        return self

    def __exit__(self, *error: object) -> None:
        """Ask it to end, and end what does not."""
        born = {pid: found.born for pid in descendants(self.process.pid) if (found := process(pid)) is not None}
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(ENDING)
            self.process.kill()
            self.process.wait()
        for pid, when in born.items():
            found = process(pid)
            if found is not None and found.born == when:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    @property
    def running(self) -> bool:
        """Whether it has not ended yet."""
        return self.process.poll() is None

    def why(self, what: str) -> NotRun:
        """That something did not come about, with the last that was said."""
        said = [text for text in self.log.read_text(errors="replace").splitlines() if text.strip()]
        last = next((text for text in reversed(said) if "Error" in text), said[-1] if said else "it said nothing")
        return NotRun(f"{what}: {last.strip()[:200]}")


class Workers:
    """The workers of one launch, all of which train. None of them is this process's child."""

    def __init__(self, cells: Sequence[Cell]) -> None:
        self.cells = sorted(cells, key=lambda cell: cell[RANK])
        self.pids = {cell[PID] for cell in cells}

    @property
    def living(self) -> list[Cell]:
        """The cells of those that have not ended."""
        return [cell for cell in self.cells if board.lives(cell)]

    @property
    def step(self) -> int:
        """The step that the furthest is at, or was when it died: all before it were agreed on."""
        return max(cell[STEP] for cell in self.cells)


Find = Callable[[], "Sequence[Cell] | None"]
"""The cells of whatever workers there are now; None where there are none yet."""


def on_board(command: Command) -> Sequence[Cell] | None:
    """The cells of dptrain's workers, from whichever process of the command has their board open."""
    boards = (board.held_by(pid) for pid in descendants(command.process.pid))
    return next((cells for cells in boards if cells is not None), None)


def joined(command: Command, find: Find, workers: int, before: Workers | None = None) -> Workers:
    """The workers as soon as all of them train, none of them one of ``before``. Raises NotRun where that never is."""
    deadline = time.monotonic() + TIMEOUT
    while command.running and time.monotonic() < deadline:
        cells = find()
        if cells is not None and len(cells) == workers and all(cell[STEP] > 0 and board.lives(cell) for cell in cells):
            found = Workers(cells)
            if before is None or not found.pids & before.pids:
                return found
        time.sleep(SEARCH)
    raise command.why(f"no {workers} workers that train")


def until(condition: Callable[[], bool], seconds: float = TIMEOUT, poll: float = POLL) -> bool:
    """Whether a condition came true within a time; looked at every ``poll`` seconds."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(poll)
    return True


def descendants(ancestor: int) -> list[int]:
    """The processes that a process started, those that these started, and so on."""
    parents: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            found = process(int(name))
            if found is not None:
                parents.setdefault(found.parent, []).append(int(name))
    return list(_below(ancestor, parents))


def _below(ancestor: int, children: Mapping[int, Sequence[int]]) -> Iterator[int]:
    for pid in children.get(ancestor, ()):
        yield pid
        yield from _below(pid, children)
