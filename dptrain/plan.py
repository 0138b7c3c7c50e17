"""What a job will be, before it is trained: its layers, the memory a worker needs, what its shards cost."""

import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dptrain import arithmetic
from dptrain.assemble import Assembly, assemble
from dptrain.data.batches import Batches
from dptrain.data.prepare import prepare
from dptrain.data.store import LARGE
from dptrain.fingerprint import Collected, Rows, Sample
from dptrain.job.spec import Job
from dptrain.layout import segments
from dptrain.membership import Membership
from dptrain.nn.accumulate import Accumulator, Schedule
from dptrain.nn.chain import Chain, LayerSummary
from dptrain.nn.layer import Workspace
from dptrain.packing import RAW, SPARSE, encoding_of, pack, unpack
from dptrain.parts import at_once
from dptrain.rule import Rule
from dptrain.state import STRETCH, State, Store

PAGE = 4096
PAGES_AT_ONCE = 16 * PAGE
"""What Linux maps at once of a file that is read through a mapping, unless told that reads are scattered."""

_RESIDENT = """
import os
from pathlib import Path
if {mpi}:
    from dptrain.exchange.mpi import connect
    connect()
import dptrain.training
from dptrain.data.prepare import prepare
from dptrain.job.load import EMBEDDED, check, to_toml
job = check(EMBEDDED, "")
to_toml(job)
prepare(job.data, directory=Path(), seed=0, cache=None)
from dptrain.arithmetic import peak_memory
print(peak_memory())
"""


@dataclass(frozen=True)
class Plan:
    """The plan of a job for a number of workers. ``memory`` is bytes by purpose, for the worker that needs most.

    ``rows_per_second`` is measured for one worker: of ``shards`` shards, and of the whole batch as a single shard.
    """

    job: Job
    workers: int
    sample_shape: tuple[int, ...]
    train_rows: int
    validation_rows: int
    test_rows: int
    layers: list[LayerSummary]
    parameters: int
    steps_per_epoch: int
    total_steps: int
    shards: int
    rows_per_shard: int
    memory: dict[str, int]
    rows_per_second: float
    rows_per_second_one_shard: float

    @property
    def memory_total(self) -> int:
        """Bytes a worker needs."""
        return sum(self.memory.values())


def plan(job: Job, *, workers: int = 1) -> Plan:
    """The plan of a complete job. Reads the data, builds the model and computes a few made-up steps.

    Raises DptrainError as training would.
    """
    prepared = prepare(job.data, directory=Path(job.directory), seed=job.seed, cache=None)
    with arithmetic.limited(job.arithmetic.threads):
        a = assemble(job, prepared)
        train = a.job.train
        batches = Batches(
            a.dataset.train,
            seed=job.seed,
            batch_size=train.batch_size,
            shards=a.shards,
            shuffle=job.data.shuffle,
            drop_last=train.drop_last,
        )
        rule = Rule(train, batches.steps_per_epoch, a.dataset.validation.rows > 0)
        memory = _memory(a, prepared, workers, rule)
        many, one = _speed(a)
    layers = a.model.summary() if isinstance(a.model, Chain) else []
    return Plan(
        job=job,
        workers=workers,
        sample_shape=a.dataset.sample_shape,
        train_rows=a.dataset.train.rows,
        validation_rows=a.dataset.validation.rows,
        test_rows=a.dataset.test.rows,
        layers=layers,
        parameters=a.model.layout.parameters,
        steps_per_epoch=batches.steps_per_epoch,
        total_steps=rule.total_steps,
        shards=a.shards,
        rows_per_shard=a.rows_per_shard,
        memory=memory,
        rows_per_second=many,
        rows_per_second_one_shard=one,
    )


def _memory(a: Assembly, prepared: Mapping[str, Any], workers: int, rule: Rule) -> dict[str, int]:
    membership = Membership(0, workers, a.shards)
    layout, item = a.model.layout, a.dtype.itemsize
    vector = layout.size * item
    state = vector + len(a.optimizer.slots) * layout.parameters * item
    accumulator, schedule = _passes(a, membership)
    evaluator = a.evaluator()
    weights = np.zeros(layout.size, a.dtype)
    for part in (a.dataset.validation, a.dataset.test):
        blocks = evaluator.blocks(part)
        with np.errstate(all="ignore"):
            evaluator.sums(weights, part, 0, min(evaluator.at_once, -(-blocks // workers)))
    sample = a.sample
    row = np.dtype(sample.dtype).itemsize * int(np.prod(sample.shape)) + 8 * int(np.prod(sample.target_shape))
    sets = 3 if a.dataset.train.waits else 2
    memory = {
        "process": _resident(workers > 1),
        "data": _data(prepared, rule.total_steps * a.job.train.batch_size, workers),
        "state": 2 * state,
        "partials": max(1, schedule.slots) * vector,
        "activations": accumulator.workspace.nbytes,
        "evaluation": evaluator.workspace.nbytes,
        "rows read": sets * accumulator.at_once * a.rows_per_shard * row,
        "snapshot": state,
    }
    if workers > 1:
        first = segments(layout.size, a.job.exchange.coordinators or workers)[-1]
        foreign = sum(len(nodes) for nodes in membership.nodes[1:])
        memory["exchange"] = vector + foreign * (first[1] - first[0]) * item
    if accumulator.gradients.feeds_back:
        # Two sides, and a snapshot of one.
        memory["residuals"] = 3 * a.shards * layout.parameters * item
    if a.job.train.result == "best":
        memory["best"] = 2 * vector
    return memory


def _passes(a: Assembly, membership: Membership) -> tuple[Accumulator, Schedule]:
    """An accumulator that has gone once through the worker's shards, as many at once as training would take."""
    weights = np.zeros(a.model.layout.size, a.dtype)
    a.model.initialise(weights, a.job.seed)
    accumulator = a.accumulator(2)
    lo, hi = membership.mine
    made_up = _made_up(a.sample, a, max(2, hi - lo), a.rows_per_shard)
    sink = Collected(accumulator, 2, a.dtype)
    with np.errstate(all="ignore"):
        accumulator.backward(a.model.layout.views(weights), made_up.some(0, 2), range(2), 0, sink)
        accumulator.at_once = at_once(accumulator, hi - lo)
        accumulator.workspace = Workspace()
        schedule = accumulator.schedule(lo, hi)
        outbox = np.zeros((max(1, schedule.slots), a.model.layout.size), a.dtype)
        kept = accumulator.nothing_kept()
        accumulator.accumulate(weights, schedule, outbox, 0, lambda start, stop: made_up.some(0, stop - start), kept)
    return accumulator, schedule


def _data(prepared: Mapping[str, Any], rows: int, workers: int) -> int:
    """Bytes of the data files that a worker touches: the system counts pages of them as the worker's memory.

    ``rows`` are those of all training steps together.
    """
    sizes: dict[str, int] = {}
    touched = 0
    for name, part in prepared["parts"].items():
        own = -(-(min(rows, part["rows"]) if name == "train" else part["rows"]) // workers)
        for store in (part["x"], part["y"]):
            sizes[store["path"]] = store["size"]
            page = PAGE if store["size"] > LARGE else PAGES_AT_ONCE
            touched += own * max(page, store["size"] // store["shape"][0])
    return min(touched, sum(sizes.values()))


def _made_up(sample: Sample, a: Assembly, k: int, rows: int) -> Rows:
    x = np.zeros((k, rows, *sample.shape), sample.dtype)
    y = np.zeros((k, rows, *sample.target_shape), sample.target_dtype)
    return Rows(x, y, np.ones((k, rows), a.dtype), (rows,) * k)


class _Part:
    """What one worker does in a step with so many shards of so many made-up rows, of a tree of those shards alone."""

    def __init__(self, a: Assembly, shards: int, rows: int) -> None:
        self._rows = float(shards * rows)
        self._accumulator = accumulator = a.accumulator(1)
        accumulator.shards = shards
        accumulator.at_once = at_once(accumulator, shards)
        self._schedule = accumulator.schedule(0, shards)
        self.size = size = a.model.layout.size
        store = Store(a.model.layout, len(a.optimizer.slots), a.dtype)
        self._state = State(0, 0, store.weights(0), store.slots(0), 0)
        a.model.initialise(self._state.weights, a.job.seed)
        self._outbox = np.zeros((self._schedule.slots, size), a.dtype)
        pair = self._outbox[0], np.zeros(size, a.dtype)
        update = a.update(1)
        self._segment, self._adding = (update.segment(store, 0, size, pair[0], some) for some in ((), [pair]))
        self._made_up = _made_up(a.sample, a, accumulator.at_once, rows)
        self._kept = accumulator.nothing_kept()
        self._encoding = encoding_of(update.gradients.name)

    def accumulate(self, final: Callable[[int], None] | None = None) -> None:
        """Forward and backward; see Accumulator for ``final``."""
        load: Callable[[int, int], Rows] = lambda lo, hi: self._made_up.some(0, hi - lo)  # noqa: E731
        weights = self._state.weights
        self._accumulator.accumulate(weights, self._schedule, self._outbox, 0, load, self._kept, final)

    def add(self) -> None:
        """One addition of a whole vector."""
        self._adding.add()

    def advance(self) -> None:
        """The update."""
        self._segment.advance(self._state, scale=1.0, rows=self._rows, add=False)

    def pack(self) -> None:
        """Packing of a whole vector for the wire, and unpacking."""
        if self._encoding not in (RAW, SPARSE):
            for at in range(0, self.size, STRETCH):
                part = self._outbox[0, at : at + STRETCH]
                unpack(pack(part, self._encoding).pieces[0], self._encoding, part)

    def step(self) -> None:
        """All of it but the addition."""
        self.accumulate()
        self.advance()


def _speed(a: Assembly) -> tuple[float, float]:
    """Rows a second of forward, backward and update in one worker: with the job's shards, and with a single one."""
    batch = a.job.train.batch_size
    with np.errstate(all="ignore"):
        times = _interleaved([_Part(a, a.shards, a.rows_per_shard).step, _Part(a, 1, batch).step])
    return batch / times[0], batch / times[1]


@dataclass(frozen=True)
class Measured:
    """One worker's part of a step, in seconds: ``compute`` for its shards, and for each element what is named so.

    ``final`` tells how far backward is: (lowest, seconds), from which parameter on the gradient is final, and when.
    ``pack`` is to pack an element for the wire and to unpack one.
    """

    compute: float
    final: tuple[tuple[int, float], ...]
    add: float
    update: float
    pack: float = 0.0


def measured(a: Assembly, shards: int, rows: int) -> Measured:
    """The part of a worker that has so many shards of so many rows; the quickest of some steps, on made-up rows."""
    part = _Part(a, shards, rows)
    runs: list[tuple[float, list[tuple[int, float]]]] = []

    def accumulate() -> None:
        started = time.perf_counter()
        told: list[tuple[int, float]] = []
        part.accumulate(lambda lowest: told.append((lowest, time.perf_counter() - started)))
        runs.append((time.perf_counter() - started, told))

    with np.errstate(all="ignore"):
        _, update, add, packed = _interleaved([accumulate, part.advance, part.add, part.pack])
    compute, final = min(runs[1:], key=lambda run: run[0])
    return Measured(compute, tuple(final), add / part.size, update / part.size, packed / part.size)


def _interleaved(steps: list[Callable[[], None]], seconds: float = 0.6) -> list[float]:
    """The fastest of the repetitions of each, taken in turns so that noise meets all alike."""
    best = [float("inf")] * len(steps)
    until = time.perf_counter() + seconds
    rounds = 0
    while rounds < 3 or time.perf_counter() < until:
        for i, step in enumerate(steps):
            started = time.perf_counter()
            step()
            if rounds:
                best[i] = min(best[i], time.perf_counter() - started)
        rounds += 1
    return best


def _resident(mpi: bool) -> int:
    """Bytes of a worker that has loaded everything and holds nothing yet."""
    done = subprocess.run(
        [sys.executable, "-c", _RESIDENT.format(mpi=mpi)], capture_output=True, text=True, check=True, timeout=60
    )
    return int(done.stdout)
