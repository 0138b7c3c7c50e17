"""A running job seen from outside: its workers' cells on the board, and signals that hit a chosen phase."""

import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from dptrain import board
from dptrain.board import PHASE, PID, STEP, Cell
from dptrain.phases import NAMES, Phase
from tests.faults.oracle import Surroundings

TRIES = 60
"""Looks at a phase that is over before the signal comes, until whatever phase it is will do."""


class Job:
    """The workers of one machine, of a job that trains. None of them is this process's child."""

    def __init__(self, cells: Sequence[Cell]) -> None:
        self.cells = [cell for cell in cells[1:] if cell[PID]]

    @classmethod
    def among(cls, pids: Sequence[int], workers: int) -> "Job | None":
        """The job of these processes; None before all of its ``workers`` train."""
        for pid in pids:
            try:
                handles = [Path(entry.path) for entry in os.scandir(f"/proc/{pid}/fd")]
            except OSError:
                continue
            for path in handles:
                try:
                    if not os.readlink(path).startswith(f"/memfd:{board.NAME}"):
                        continue
                    handle = os.open(path, os.O_RDWR)
                except OSError:
                    continue
                try:
                    size = os.fstat(handle).st_size // board.nbytes(0) - 1
                    job = cls(board.mapped(handle, size))
                finally:
                    os.close(handle)
                if len(job.cells) == size == workers and all(cell[STEP] > 0 for cell in job.cells):
                    return job
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
    found = board.process(cell[PID])
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


def until(condition: Callable[[], bool], seconds: float) -> bool:
    """Whether a condition came true within a time; looked at all the time, as phases are short."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
    return True


def joined(place: Surroundings, workers: int, running: Callable[[], bool]) -> Job | None:
    """The job that these surroundings hold, as soon as all its workers train; None where it ends before."""
    while running():
        job = Job.among(place.processes(), workers)
        if job is not None:
            return job
    return None


def pace(job: Job, steps: int) -> None:
    """Let it train so many steps more, or to its end."""
    goal = job.step + steps
    until(lambda: job.step >= goal or not job.living, 60)


def usual_step(job: Job) -> float:
    """Seconds that its next few steps take each."""
    first, started = job.step, time.perf_counter()
    until(lambda: job.step >= first + 5 or not job.living, 10)
    return (time.perf_counter() - started) / 5
