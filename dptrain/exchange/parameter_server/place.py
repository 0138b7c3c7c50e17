"""One of the processes that compute beside a worker of their host, as that worker sees it."""

import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dptrain import board
from dptrain.board import BEAT, BEGUN, PHASE, STEP, Cell
from dptrain.exchange.parameter_server.host_memory import Counts
from dptrain.exchange.parameter_server.line import Line
from dptrain.phases import NAMES
from dptrain.processes import process

REAPED = 2.0
"""Seconds after which a process that was killed must be gone."""

USUAL = 10
"""Times the usual task that a process may give no sign of life."""

_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 60.0
"""Seconds before a process that died again without having finished anything is started again."""


@dataclass(eq=False)
class Task:
    """Something to be computed; whoever does it and how often, the result is the same bytes in the same place.

    ``box`` is the outbox that it needs, -1 for none.
    """

    what: str
    step: int
    arguments: Sequence[Any]
    box: int = -1
    done: bool = False

    @property
    def shards(self) -> tuple[int, int]:
        """Of a task that computes shards: which."""
        return self.arguments[0], self.arguments[1]


@dataclass
class Figures:
    """What a place has done, whichever processes it had."""

    compute_seconds: float = 0.0
    shards_computed: int = 0
    rows_read: int = 0
    starts: int = 0


class Place:
    """Process ``number`` of a worker: started, given tasks, watched, and started again when it has ended.

    ``command`` starts it, with the number of the socket and of the place still to come; ``handles`` are passed on.
    """

    def __init__(self, number: int, command: Sequence[str], handles: Sequence[int], cell: Cell, counts: Counts) -> None:
        self.number, self.cell = number, cell
        self.figures = Figures()
        self.line: Line | None = None
        self.ready = False
        self.lost_for_good = False
        self.task: Task | None = None
        self._command, self._handles, self._counts = command, handles, counts
        self._process: subprocess.Popen[bytes] | None = None
        self._given = self._given_before = 0
        self._deaths = 0
        self._not_before = 0.0
        self._usual = 0.0
        self._finished = 0
        self._since = 0.0
        self._silent, self._beat = 0.0, -1

    @property
    def pid(self) -> int:
        """Its process; 0 for none."""
        return self._process.pid if self._process is not None else 0

    @property
    def begun(self) -> bool:
        """Whether its process has begun what it was given last, even if it is dead by now."""
        return self.cell[BEGUN] == self._given - self._given_before

    @property
    def idle(self) -> bool:
        """Whether it can be given something."""
        return self.ready and self.task is None

    def start(self) -> None:
        """Start its process if it has none and may have one."""
        if self._process is not None or self.lost_for_good or time.monotonic() < self._not_before:
            return
        mine, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for cell in (*self._counts, self.cell):
            cell[:] = memoryview(bytes(board.CELL_BYTES)).cast("q")
        self.line = Line(mine, sent=self._counts.to, came=self._counts.back)
        with its:
            self._process = subprocess.Popen(
                [*self._command, str(its.fileno()), str(self.number)],
                pass_fds=[its.fileno(), *self._handles],
                stdin=subprocess.DEVNULL,
            )
        self.figures.starts += 1
        self._given_before = self._given
        self._finished = 0
        self._silent, self._beat = 0.0, -1

    def give(self, task: Task, arguments: Sequence[Any]) -> None:
        """Let it do something; raises Gone where it has ended."""
        assert self.line is not None
        assert self.task is None
        self._given += 1
        self.task, self._since, self._silent = task, time.monotonic(), 0.0
        self.line.send([task.what, self._given, task.step, *arguments])

    def finished(self, number: int, seconds: float, shards: int, rows: int) -> Task | None:
        """It says that it has done the task of that number; None for one that nobody waits for."""
        self.figures.compute_seconds += seconds
        self.figures.shards_computed += shards
        self.figures.rows_read += rows
        if number != self._given:
            return None
        task, self.task = self.task, None
        self._finished += 1
        self._deaths = 0
        took = time.monotonic() - self._since
        # The slowest of the last few, roughly: it follows at once upwards, slowly downwards.
        self._usual = max(took, 0.9 * self._usual + 0.1 * took)
        return task

    def look(self, elapsed: float, hang_seconds: float, deadline: float) -> str:
        """Another look at a process that has something to do, so many seconds after the last.

        Why it is to be ended: it gave no sign of life for too long; or "".
        """
        found = process(self.pid)
        if found is not None and found.state == "t":
            # Somebody debugs it.
            self._silent = 0.0
            return ""
        stopped = found is not None and found.state == "T"
        self._silent += elapsed
        if self.cell[BEAT] != self._beat:
            self._beat, self._silent = self.cell[BEAT], 0.0
        if time.monotonic() - self._since > deadline:
            return f"had no answer for {deadline:g} s"
        short = min(deadline, max(hang_seconds, USUAL * self._usual)) if hang_seconds else deadline
        patience = short if stopped or self._finished > 1 else deadline
        if self._silent <= patience:
            return ""
        return f"{'was stopped' if stopped else 'gave no sign of life'} for {self._silent:.1f} s"

    def where(self) -> str:
        """What it was at, as its own loop said last."""
        return f"at step {self.cell[STEP]} in {NAMES[self.cell[PHASE]]}"

    def end(self) -> Task | None:
        """Its process has ended or does now; the task that it leaves undone.

        Where it can't be ended, the place is lost for good, and its outbox may still change.
        """
        task, self.task, self.ready = self.task, None, False
        if self.line is not None:
            self.line.close()
            self.line = None
        if self._process is not None:
            self._process.kill()
            try:
                self._process.wait(REAPED)
            except subprocess.TimeoutExpired:
                self.lost_for_good = True
            self._process = None
        if not self._finished:
            self._deaths += 1
        pause = min(_LONGEST_PAUSE, _FIRST_PAUSE * 2 ** (self._deaths - 1)) if self._deaths else 0.0
        self._not_before = time.monotonic() + pause
        return task


def command(memory: int, setup: int, parent: int) -> list[str]:
    """What starts a process, but for the numbers of its socket and its place."""
    return [sys.executable, "-P", "-m", "dptrain.companion", str(parent), str(memory), str(setup)]
