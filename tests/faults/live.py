"""A running job seen from outside: its workers' cells on the board, and signals that hit a chosen phase."""

import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from dptrain import board, rundir
from dptrain.board import PHASE, PID, STEP, Cell
from dptrain.journal import read_all
from dptrain.phases import NAMES, Phase
from dptrain.processes import process
from tests.faults.oracle import PROGRAM, Command, Surroundings

TRIES = 60
"""Looks at a phase that is over before the signal comes, until whatever phase it is will do."""


_GLANCE = 0.02
"""Seconds between looks for a job that begins: this process must not take the cores from it."""


class Job:
    """The workers of one machine, of a job that trains. None of them is this process's child."""

    def __init__(self, cells: Sequence[Cell]) -> None:
        self.cells = list(cells)

    @classmethod
    def among(cls, pids: Sequence[int], workers: int) -> "Job | None":
        """The job of these processes; None before all of its ``workers`` train."""
        for cells in map(board.held_by, pids):
            if cells is not None and len(cells) == workers and all(cell[PID] and cell[STEP] > 0 for cell in cells):
                return cls(cells)
        return None

    @property
    def living(self) -> list[Cell]:
        """The cells of those that have not ended."""
        return [cell for cell in self.cells if board.lives(cell)]

    @property
    def step(self) -> int:
        """The step that the furthest of the living is at."""
        return max((cell[STEP] for cell in self.living), default=0)

    def freeze(self, cell: Cell, phase: Phase | None) -> str:
        """Stop a worker, in ``phase`` if it can be had, and say in which it is stopped; "" where it had ended."""
        for attempt in range(TRIES):
            wanted = phase is not None and attempt < TRIES - 1
            if wanted and not until(lambda: cell[PHASE] == phase, 0.2):
                if not board.lives(cell):
                    return ""
                continue
            if not signalled(cell, signal.SIGSTOP) or not until(lambda: _stopped(cell), 5):
                return ""
            if not wanted or cell[PHASE] == phase:
                return NAMES[cell[PHASE]]
            signalled(cell, signal.SIGCONT)
        raise AssertionError("unreachable")


def _stopped(cell: Cell) -> bool:
    found = process(cell[PID])
    return found is None or found.state in "TZX"


def signalled(cell: Cell, number: signal.Signals) -> bool:
    """Send a signal to a cell's process, and say whether it was there to get it."""
    if not board.lives(cell):
        return False
    try:
        os.kill(cell[PID], number)
    except ProcessLookupError:
        return False
    return True


def until(condition: Callable[[], bool], seconds: float, nap: float = 0.0) -> bool:
    """Whether a condition came true within a time; looked at all the time, as phases are short, or between naps."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        if nap:
            time.sleep(nap)
    return True


def begun(
    place: Surroundings, text: str, workers: int, *options: str, progress: str = "none"
) -> tuple[Command, Job | None]:
    """Start a job of that text in its surroundings, and see its workers as soon as all of them train."""
    (place.folder / "job.toml").write_text(text)
    line = [*PROGRAM, "run", "job.toml", "-n", str(workers), "--run-dir", "run", "--progress", progress, *options]
    command = place.start(line)
    return command, joined(place, workers, lambda: command.running)


def joined(place: Surroundings, workers: int, running: Callable[[], bool]) -> Job | None:
    """The job that these surroundings hold, as soon as all its workers train; None where it ends before."""
    while running():
        job = Job.among(place.processes(), workers)
        if job is not None:
            return job
        time.sleep(_GLANCE)
    return None


def pace(job: Job, steps: int) -> None:
    """Let it train so many steps more, or to its end."""
    goal = job.step + steps
    until(lambda: job.step >= goal or not job.living, 60, nap=0.001)


def step_of(run_dir: Path) -> int:
    """The last step that a run's journal tells of; 0 before there is one."""
    return max((line.get("step", 0) for line in read_all(run_dir / rundir.JOURNAL)), default=0)


def usual_step(job: Job) -> float:
    """Seconds that its next few steps take each."""
    first, started = job.step, time.perf_counter()
    until(lambda: job.step >= first + 5 or not job.living, 10)
    return (time.perf_counter() - started) / 5
