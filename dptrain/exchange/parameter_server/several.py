"""Several processes of a host compute for one worker, and their partials become one host's in shared memory.

The worker itself is process 0; those beside it are started by exec, with the memory and a socket handed on. Of a
range of shards each takes a part, in order, and writes its partials to its own outbox. Then all add, each a slice of
the vector, what lies in all outboxes, in the canonical tree, so that the maximal subtrees of the whole range are left.

A process that dies or hangs is noticed when the others have done theirs: another computes what it left, into the same
outbox, and it is started again. Where it dies while it adds, the whole range is computed again, as nobody knows how far
it came. An exception in a process is the worker's.
"""

import json
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from dptrain import errors
from dptrain.board import BEAT
from dptrain.errors import ArithmeticMismatch, DeadlineError, DptrainError, OutOfMemory, PoisonError, WorkerCrashed
from dptrain.exchange import shared_memory
from dptrain.exchange.parameter_server.host_memory import HostMemory, most_slots
from dptrain.exchange.parameter_server.lending import Lent
from dptrain.exchange.parameter_server.line import SLEEPLESS, Gone, Lines
from dptrain.exchange.parameter_server.means import Means
from dptrain.exchange.parameter_server.place import Place, Task, command
from dptrain.exchange.parameter_server.residuals import Keeping, beside
from dptrain.fingerprint import NOT_REPEATABLE
from dptrain.layout import Array, segments
from dptrain.nn.accumulate import TALLIES, Accumulator, Partials
from dptrain.phases import Phase, Phases
from dptrain.state import STRETCH
from dptrain.tree import Node, merged, subtrees

COMPUTE, EVALUATE, ADD = "compute", "evaluate", "add"

READY, DONE, FAILED = "ready", "done", "failed"
"""What a process says."""

_SHARED = 1 << 18
"""From so many additions on all processes add; below, telling them would take longer."""

Slot = tuple[int, int]
"""A row of an outbox: whose, and which."""


class _Again(Exception):
    """Nobody knows what the outboxes hold: compute the range once more."""


class _Sum(NamedTuple):
    """What is to be added to what lies in the outboxes, each into its left operand; the nodes left, and where."""

    nodes: list[Node]
    slots: list[Slot]
    vectors: list[Array]
    adds: list[tuple[Slot, Slot]]


class Several:
    """See Compute. ``processes`` of this host, this one among them, compute with the job's means.

    ``job`` and ``plan`` (of the data) are what the others make their own means from; they must have this one's
    ``fingerprint``. ``who`` is what the worker is called in messages. To be closed, and for one thread, which must
    live as long: its end is that of the processes that it started.
    """

    def __init__(
        self,
        own: Means,
        job: Mapping[str, Any],
        plan: Mapping[str, Any],
        *,
        processes: int,
        fingerprint: str,
        hang_seconds: float,
        deadline: float,
        who: str = "the worker",
    ) -> None:
        self.who = who
        self._own, self._fingerprint = own, fingerprint
        self._hang_seconds, self._deadline = hang_seconds, deadline
        self._interval = min(0.25, hang_seconds / 20) if hang_seconds else 0.25
        self.shards = own.accumulator.shards
        self._sleepless = SLEEPLESS if processes <= len(os.sched_getaffinity(0)) else 0.0
        model = own.accumulator.model
        self._size = model.layout.size
        shape: dict[str, Any] = {
            "processes": processes,
            "size": model.layout.size,
            "dtype": model.dtype.name,
            "slots": most_slots(self.shards),
            "blocks": max((own.evaluator.blocks(part) for part in own.parts.values()), default=0),
            "width": own.evaluator.width,
            "kept": self.shards if own.accumulator.gradients.feeds_back else 0,
            "parameters": model.layout.parameters,
        }
        memory = HostMemory(**shape)
        self._reserved = shared_memory.nameless(memory.nbytes)
        mapped = shared_memory.attach(f"/proc/self/fd/{self._reserved.handle}", memory.nbytes)
        assert mapped is not None
        self._placed = memory.place(mapped)
        self.lent: Lent | None = Lent(self._reserved.handle, mapped)
        self.weights = self._placed.weights
        self.keeping = Keeping(self._placed.residuals) if shape["kept"] else None
        self._sums: dict[tuple[tuple[int, int, int], ...], _Sum] = {}
        self._died: dict[tuple[int, tuple[int, int]], int] = {}
        self._compute_seconds = self._seconds = 0.0
        self._setup = os.memfd_create("dptrain-setup", os.MFD_CLOEXEC)
        at_once = {"at_once": own.accumulator.at_once, "blocks_at_once": own.evaluator.at_once}
        with open(self._setup, "w", closefd=False) as file:
            json.dump({"job": job, "plan": plan, "memory": shape, "sleepless": self._sleepless, **at_once}, file)
        start = command(self._reserved.handle, self._setup, os.getpid())
        handles = [self._reserved.handle, self._setup]
        self._places = [
            Place(number, start, handles, self._placed.signs[number], self._placed.counts[number])
            for number in range(1, processes)
        ]
        self._lines: Lines | None = None
        self.phases = own.accumulator.phases
        for place in self._places:
            self._start(place)

    @property
    def phases(self) -> Phases:
        """Where this process's time goes."""
        return self._phases

    @phases.setter
    def phases(self, phases: Phases) -> None:
        self._phases = phases
        self._own.tell(phases)

    @property
    def ready(self) -> int:
        """How many processes compute, this one among them; others are still starting."""
        self._admit()
        return 1 + sum(place.ready for place in self._places)

    def await_all(self) -> None:
        """Return when all processes that are being started are ready, or have ended."""
        until = time.monotonic() + self._deadline
        while any(place.line is not None and not place.ready for place in self._places):
            if time.monotonic() > until:
                raise DeadlineError(
                    f"{self.who} on {shared_memory.HOST}",
                    expected=f"its processes to be ready within {self._deadline:g} s",
                    found="no answer",
                    cure="see what they do, or raise exchange.deadline",
                )
            self._hear(self._interval)

    def partials(self, step: int, lo: int, hi: int, updates: int = 0) -> Partials:
        """See Compute."""
        started = time.perf_counter()
        try:
            while True:
                self._admit()
                tasks = self._cut(COMPUTE, step, lo, hi, updates)
                try:
                    self._share(tasks)
                    return self._sum(tasks, step)
                except _Again:
                    self._settle()
        finally:
            self._seconds += time.perf_counter() - started

    def evaluate(self, part: str, lo: int, hi: int, step: int) -> npt.NDArray[np.float64]:
        """See Compute."""
        started = time.perf_counter()
        self._admit()
        self._share(self._cut(EVALUATE, step, lo, hi, part))
        self._seconds += time.perf_counter() - started
        return self._placed.rows[lo:hi].copy()

    def beat(self) -> int:
        """See Compute."""
        return int(self._phases.cell[BEAT])

    def report(self) -> list[dict[str, Any]]:
        """See Compute; waiting is for the other processes, and while they were started anew."""
        own = self._own
        first = {
            "process": 0,
            "compute_seconds": self._compute_seconds,
            "shards_computed": own.accumulator.shards_computed,
            "rows_read": own.reader.rows_read,
            "starts": 1,
        }
        others = [{"process": place.number, **vars(place.figures)} for place in self._places]
        return [
            {
                **one,
                "compute_seconds": round(one["compute_seconds"], 4),
                "wait_seconds": round(max(0.0, self._seconds - one["compute_seconds"]), 4),
            }
            for one in [first, *others]
        ]

    def close(self) -> None:
        """See Compute. The processes have nothing to finish, and are ended. May be called twice."""
        self._own.reader.close()
        for place in self._places:
            place.end()
        self._places = []
        if self._setup >= 0:
            os.close(self._setup)
            self._reserved.release()
            self._setup = -1

    def _start(self, place: Place) -> None:
        before = place.line
        place.start()
        if place.line is not before:
            self._lines = None

    def _admit(self) -> None:
        """Start what has ended, and let in what has started."""
        for place in self._places:
            if place.line is None:
                self._start(place)
        if any(not place.ready for place in self._places):
            self._hear(0.0)

    def _cut(self, what: str, step: int, lo: int, hi: int, *more: Any) -> list[Task]:
        """Tasks for all that are ready, this process's first: together the range, in order."""
        boxes = [0, *(place.number for place in self._places if place.idle)]
        n = max(1, min(len(boxes), hi - lo))
        cuts = [lo + (hi - lo) * i // n for i in range(n + 1)]
        return [Task(what, step, (cuts[i], cuts[i + 1], *more), boxes[i]) for i in range(n)]

    def _share(self, tasks: Sequence[Task]) -> None:
        """Return when all tasks are done, the first of them here; whoever dies meanwhile."""
        left = deque(tasks[1:])
        self._hand_out(left)
        self._do(tasks[0])
        while not all(task.done for task in tasks):
            self._hand_out(left)
            if left and not any(place.task is not None for place in self._places):
                # Only where nobody else can: whatever ended the first may end this one too.
                self._do(left.popleft())
                continue
            self._phases.begin(Phase.WAITING, "processes of this host")
            left.extend(self._hear(self._interval))

    def _hand_out(self, left: deque[Task]) -> None:
        for place in self._places:
            if left and place.idle:
                task = left.popleft()
                try:
                    place.give(task, [*task.arguments, task.box])
                except Gone:
                    left.extend(self._lost(place, "died"))

    def _do(self, task: Task) -> None:
        """Do a task here."""
        started = time.perf_counter()
        placed = self._placed
        if task.what == COMPUTE:
            lo, hi, updates = task.arguments
            kept = beside(placed.residuals, updates) if self.keeping is not None else None
            done = self._own.partials(self.weights, placed.boxes[task.box], task.step, lo, hi, kept)
            placed.tallies[task.box][: len(done.nodes)] = done.tallies
        elif task.what == EVALUATE:
            lo, hi, part = task.arguments
            placed.rows[lo:hi] = self._own.evaluate(self.weights, part, lo, hi)
        else:
            self._phases.begin(Phase.PARTIALS, "of this host")
            start, stop, adds = task.arguments
            add(placed.boxes, adds, start, stop, self._own.accumulator)
        task.done = True
        self._compute_seconds += time.perf_counter() - started

    def _sum(self, tasks: Sequence[Task], step: int) -> Partials:
        """Add what lies in the outboxes."""
        key = tuple((*task.shards, task.box) for task in tasks)
        sum_ = self._sums.get(key)
        if sum_ is None:
            sum_ = self._sums[key] = self._planned(key)
        if sum_.adds:
            members = 1 if len(sum_.adds) * self._size < _SHARED else 1 + sum(place.idle for place in self._places)
            cuts = segments(self._size, members)
            self._share([Task(ADD, step, (start, stop, sum_.adds)) for start, stop in cuts])
        tallies = self._placed.tallies
        for left, right in sum_.adds:
            tallies[left[0]][left[1]] += tallies[right[0]][right[1]]
        found = np.zeros((len(sum_.nodes), TALLIES))
        for i, (box, row) in enumerate(sum_.slots):
            found[i] = tallies[box][row]
        return Partials(sum_.nodes, sum_.vectors, found)

    def _planned(self, ranges: Iterable[tuple[int, int, int]]) -> _Sum:
        where = {node: (box, row) for lo, hi, box in ranges for row, node in enumerate(subtrees(lo, hi, self.shards))}
        nodes, plan = merged(where, Node(0, self.shards))
        adds = []
        for parent, left, right in plan:
            adds.append((where[left], where[right]))
            where[parent] = where[left]
        slots = [where[node] for node in nodes]
        return _Sum(nodes, slots, [self._placed.boxes[box][row] for box, row in slots], adds)

    def _hear(self, seconds: float) -> list[Task]:
        """Listen for so long, until anybody says something; the tasks that have to be done by others."""
        if self._lines is None:
            self._lines = Lines([place.line for place in self._places if place.line is not None])
        started = time.monotonic()
        found = self._lines.wait(seconds, self._sleepless)
        self._phases.cell[BEAT] += 1
        undone = []
        for place in self._places:
            if place.line in found:
                try:
                    self._understand(place, place.line.receive())
                except Gone:
                    undone += self._lost(place, "died")
        # A machine that slept, or had no time for this process, had none for the others.
        elapsed = min(time.monotonic() - started, 2 * self._interval)
        if not found:
            for place in self._places:
                if place.task is not None:
                    why = place.look(elapsed, self._hang_seconds, self._deadline)
                    undone += self._lost(place, why) if why else []
        return undone

    def _understand(self, place: Place, message: Sequence[Any]) -> None:
        kind, *content = message
        if kind == DONE:
            task = place.finished(*content)
            if task is not None:
                task.done = True
        elif kind == READY:
            (fingerprint,) = content
            if fingerprint != self._fingerprint and NOT_REPEATABLE not in (fingerprint, self._fingerprint):
                raise ArithmeticMismatch(
                    self._name(place),
                    expected="the bits of the worker that started it",
                    found="others for the same step",
                    cure='set arithmetic.kernels = "portable", or start it with --processes 1',
                )
            place.ready = True
        else:
            assert kind == FAILED
            raise raised(content[0], self.who)

    def _lost(self, place: Place, why: str) -> list[Task]:
        """A process has ended, or is to: what it leaves undone, which can be done by others."""
        where, begun, pid = place.where(), place.begun, place.pid
        task = place.end()
        self._lines = None
        print(
            f"dptrain: {self._name(place)} (pid {pid}) {where} {why}: the others do its part",
            file=sys.stderr,
            flush=True,
        )
        if place.lost_for_good and task is not None and task.what == ADD:
            # It may write to any outbox at any time. The server gives the shards to others.
            print(f"dptrain: {self._name(place)} can't be ended: the worker is", file=sys.stderr, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        self._start(place)
        if task is None:
            return []
        if task.what == ADD or place.lost_for_good:
            raise _Again
        if task.what == COMPUTE and begun:
            self._count_death(task)
        return [task]

    def _count_death(self, task: Task) -> None:
        self._died = {key: n for key, n in self._died.items() if key[0] == task.step}
        key = task.step, task.shards
        self._died[key] = self._died.get(key, 0) + 1
        if self._died[key] > 1:
            lo, hi = task.shards
            raise PoisonError(
                f"{self.who}: shard {lo} at step {task.step}"
                if hi - lo == 1
                else f"{self.who}: shards {lo} to {hi - 1} at step {task.step}",
                expected="who computes them to live",
                found="that two processes, one after the other, died there",
                cure="look at those rows and at the model: whatever is in them ends every process",
            )

    def _settle(self) -> None:
        """Return when no process is at anything."""
        while any(place.task is not None for place in self._places):
            try:
                self._hear(self._interval)
            except _Again:
                continue

    def _name(self, place: Place) -> str:
        return f"process {place.number} of {self.who} on {shared_memory.HOST}"


def add(
    boxes: Sequence[Array], adds: Iterable[tuple[Slot, Slot]], start: int, stop: int, accumulator: Accumulator
) -> None:
    """Elements start to stop of these additions, stretch by stretch, which stay in a core's cache."""
    gradients, parameters = accumulator.gradients, accumulator.model.layout.parameters
    pairs = [(boxes[left[0]][left[1]], boxes[right[0]][right[1]]) for left, right in adds]
    # What is not finite the server sees.
    with np.errstate(all="ignore"):
        for at in range(start, stop, STRETCH):
            end = min(stop, at + STRETCH)
            for into, other in pairs:
                np.add(into[at:end], other[at:end], out=into[at:end])
                if gradients.rounds and at < parameters:
                    gradients.round(into[at : min(end, parameters)])


def told(error: DptrainError) -> dict[str, str]:
    """An error as plain data."""
    words = {"where": error.where, "expected": error.expected, "found": error.found, "cure": error.cure}
    return {"kind": type(error).__name__, **{key: text[:8_000] for key, text in words.items()}}


def raised(content: Mapping[str, str], who: str) -> DptrainError:
    """The error that a process of ``who`` told."""
    kind = getattr(errors, content["kind"], WorkerCrashed)
    own = kind in (WorkerCrashed, OutOfMemory)
    words = {key: content[key] for key in ("expected", "found", "cure")}
    return kind(f"{who}, {content['where']}" if own else content["where"], **words)
