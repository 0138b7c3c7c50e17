"""A process beside the workers of a machine that ends those that hang: ``python -m dptrain.watchdog``.

It looks at the board that the workers' own loops write to (no thread beats for a loop that is stuck). A worker that
waits for others counts its polls there, so one that gives no sign of life for its deadline is not waiting: it is
stuck, or stopped, and is ended by SIGKILL; the others survive that as any death. The deadline is ``hang_seconds`` or
ten times the usual step, whichever is more; before the first step is done, and while it evaluates or writes, a worker
has ``patience``, unless it is stopped; while it recovers, half a minute of it. Where none of a job comes out of a
recovery in half a minute, polling or not, all are ended, so that the job is started again: a shrinking of the
communicator sometimes never returns (open-mpi/ompi#13138). Where all workers of a job are stopped somebody paused it,
and nobody is ended. Where others are on other machines they wait for those, paused or not.
"""

import contextlib
import os
import signal
import sys
import time
from collections.abc import Sequence

from dptrain import board
from dptrain.board import BEAT, BEGUN, ENDED, PHASE, PID, RANK, STEP, WATCHDOG, Cell
from dptrain.phases import NAMES, Phase
from dptrain.processes import process
from dptrain.supervision import ended

REAPED = 2.0
"""Seconds after which a worker that was killed must be gone."""

USUAL = 10
"""Times the usual step that a worker may give no sign of life."""

RECOVERING = 30.0
"""Seconds that a recovery may give no sign of life, or all be in one, which takes milliseconds: then it is MPI itself
that is stuck."""

_UNHURRIED = frozenset({Phase.OTHER, Phase.EVALUATION, Phase.CHECKPOINT, Phase.RECOVERY})


class Watched:
    """One worker, as far as it has been seen."""

    def __init__(self, cell: Cell) -> None:
        self.cell = cell
        self.silent = 0.0
        self.recovering = 0.0
        self.usual = 0.0
        self._beat = -1
        self._step = 0
        self._since = 0.0

    def look(self, elapsed: float) -> None:
        """Another look, so many seconds after the last."""
        self._since += elapsed
        self.silent += elapsed
        self.recovering = self.recovering + elapsed if self.cell[PHASE] == Phase.RECOVERY else 0.0
        if self.cell[BEAT] != self._beat:
            self._beat = self.cell[BEAT]
            self.silent = 0.0
        done = self.cell[STEP] - self._step
        if done > 0:
            if self._step:
                took = self._since / done
                # The slowest of the last few, roughly: it follows at once upwards, slowly downwards.
                self.usual = max(took, 0.9 * self.usual + 0.1 * took)
            self._step += done
            self._since = 0.0

    def deadline(self, stopped: bool, hang_seconds: float, patience: float) -> float:
        """Seconds that it may give no sign of life."""
        short = max(hang_seconds, USUAL * self.usual)
        if self.cell[PHASE] == Phase.RECOVERY:
            patience = min(patience, RECOVERING)
        unhurried = self.cell[BEGUN] < 2 or self.cell[PHASE] in _UNHURRIED
        return short if stopped or not unhurried else max(short, patience)


class Watchdog:
    """Looks at all cells every ``interval`` seconds, and ends who hangs. ``whole``: they are all of the job."""

    def __init__(self, cells: Sequence[Cell], hang_seconds: float, patience: float, whole: bool = True) -> None:
        self.workers = [Watched(cell) for cell in cells[1:]]
        self.hang_seconds, self.patience, self.whole = hang_seconds, patience, whole
        self.interval = min(0.25, hang_seconds / 20)

    def run(self) -> None:
        """Watch until no worker is left."""
        before = time.monotonic()
        while self.living():
            time.sleep(self.interval)
            now = time.monotonic()
            # A machine that slept, or had no time for this process, had none for the workers.
            self.look(min(now - before, 2 * self.interval))
            before = now

    def living(self) -> list[Watched]:
        """The workers that have not ended."""
        return [worker for worker in self.workers if board.lives(worker.cell)]

    def look(self, elapsed: float) -> None:
        """Take notice of all, and end those that hang."""
        living = self.living()
        states = [found.state if (found := process(worker.cell[PID])) else "X" for worker in living]
        paused = self.whole and all(state in "Tt" for state in states)
        for worker, state in zip(living, states, strict=True):
            worker.look(elapsed)
            if paused or state == "t":
                worker.silent = worker.recovering = 0.0
            elif worker.silent > worker.deadline(state == "T", self.hang_seconds, self.patience):
                self.end(worker, stopped=state == "T")
        living = self.living()
        if self.whole and living and all(worker.recovering > RECOVERING for worker in living):
            self.give_up(living)

    def end(self, worker: Watched, *, stopped: bool) -> None:
        """End one worker; where it can't be ended, all, so that the job is started again without it."""
        cell = worker.cell
        what = "was stopped" if stopped else "gave no sign of life"
        _end(cell, f"{what} for {worker.silent:.1f} s")
        if not _gone([cell]):
            print(f"dptrain: rank {cell[RANK]} can't be ended: the job is", file=sys.stderr, flush=True)
            for other in self.living():
                _kill(other.cell)

    def give_up(self, living: Sequence[Watched]) -> None:
        """End all, none of whom comes out of a recovery: the job is started again."""
        for worker in living:
            _end(worker.cell, f"did not come out of a recovery for {worker.recovering:.1f} s")
        _gone([worker.cell for worker in living])


def _end(cell: Cell, why: str) -> None:
    """End a worker and say so."""
    step, phase = cell[STEP], NAMES[cell[PHASE]]
    print(f"dptrain: rank {cell[RANK]} at step {step} in {phase} {why}: ended", file=sys.stderr, flush=True)
    ended(cell[RANK], os.uname().nodename, cell[PID], step, phase, why)
    cell[ENDED] = 1
    _kill(cell)


def _gone(cells: Sequence[Cell]) -> bool:
    """Wait until those that were killed are gone; whether they are, in time."""
    until = time.monotonic() + REAPED
    while any(map(board.lives, cells)):
        if time.monotonic() > until:
            return False
        time.sleep(0.01)
    return True


def _kill(cell: Cell) -> None:
    if board.lives(cell):
        with contextlib.suppress(ProcessLookupError):
            os.kill(cell[PID], signal.SIGKILL)


def main(handle: int, workers: int, hang_seconds: float, patience: float, whole: bool) -> None:
    """Watch the workers of the board in an open file until they have ended."""
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        # These ask the workers to stop, and may come to their whole process group.
        signal.signal(number, signal.SIG_IGN)
    cells = board.mapped(handle, workers)
    cells[0][WATCHDOG] = os.getpid()
    Watchdog(cells, hang_seconds, patience, whole).run()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), float(sys.argv[4]), sys.argv[5] == "1")
