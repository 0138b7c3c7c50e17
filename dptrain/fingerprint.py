"""What bits this worker computes: one seeded step of the job, hashed; and whether shards together equal one by one.

Two workers of one fingerprint may train together, and a checkpoint's fingerprint tells whether going on from it gives
the bits of the undisturbed run.
"""

import hashlib
from copy import copy
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dptrain.gradients import sample as sample_of
from dptrain.layout import BLOCK, Array
from dptrain.nn.accumulate import Accumulator
from dptrain.nn.evaluate import Evaluator
from dptrain.nn.layer import Workspace
from dptrain.random import Purpose, stream
from dptrain.state import Update

_SHARDS = 2
_UPDATED = 4 * BLOCK
NOT_REPEATABLE = "not repeatable"


@dataclass
class Rows:
    """Made-up rows of some shards, the last of them with one row of padding."""

    x: Array
    y: Array
    rows: Array
    counts: tuple[int, ...]

    def some(self, lo: int, hi: int) -> "Rows":
        """The rows of shards lo to hi."""
        return Rows(self.x[lo:hi], self.y[lo:hi], self.rows[lo:hi], self.counts[lo:hi])


@dataclass(frozen=True)
class Sample:
    """What a row looks like: shapes, dtypes, the number of classes (0 for numbers)."""

    shape: tuple[int, ...]
    dtype: npt.DTypeLike
    target_shape: tuple[int, ...]
    target_dtype: npt.DTypeLike
    classes: int

    def made_up(self, seed: int, rows: int, dtype: npt.DTypeLike, shards: int = _SHARDS) -> Rows:
        """Rows for a probe, a function of the arguments."""
        rng = stream(seed, Purpose.PROBE)
        lead = (shards, rows)
        integer = np.issubdtype(np.dtype(self.dtype), np.integer)
        x = np.zeros((*lead, *self.shape), self.dtype)
        if not integer:
            x[...] = rng.standard_normal(x.shape)
        y = np.zeros((*lead, *self.target_shape), self.target_dtype)
        y[...] = rng.integers(0, self.classes, y.shape) if self.classes else rng.standard_normal(y.shape)
        ones = np.ones(lead, dtype)
        last = max(1, rows - 1)
        ones[-1, last:] = 0
        x[-1, last:] = 0
        y[-1, last:] = 0
        return Rows(x, y, ones, (rows,) * (shards - 1) + (last,))


class Collected:
    """A sink that keeps the k gradients apart."""

    def __init__(self, accumulator: Accumulator, k: int, dtype: npt.DTypeLike) -> None:
        self.vectors: Array = np.zeros((k, accumulator.model.layout.size), dtype)
        self._tensors = accumulator.model.layout.views(self.vectors)

    def open(self, name: str) -> Array:
        """See Sink."""
        return self._tensors[name]

    def close(self, name: str) -> None:
        """See Sink."""


@dataclass(frozen=True)
class Probe:
    """``fingerprint``: the hash of the bits. ``together``: shards at once gave the bytes of one by one.

    ``repeatable``: one by one gave the same bytes twice; where it didn't there is no fingerprint to compare.
    """

    fingerprint: str
    together: bool
    repeatable: bool


def probe(
    accumulator: Accumulator,
    evaluator: Evaluator,
    update: Update,
    weights: Array,
    sample: Sample,
    rows: int,
    shards: int = _SHARDS,
) -> Probe:
    """Forward, backward and evaluation of made-up shards, together and one by one, and an update.

    Holds the gradients of ``shards`` + 1 shards.
    """
    made_up = sample.made_up(accumulator.seed, rows, weights.dtype, shards)
    tensors = accumulator.model.layout.views(weights)

    def gradients(lo: int, hi: int) -> tuple[Array, npt.NDArray[np.float64]]:
        sink = Collected(accumulator, hi - lo, weights.dtype)
        return sink.vectors, accumulator.backward(tensors, made_up.some(lo, hi), range(lo, hi), 0, sink)

    content = hashlib.sha256()
    figures, same = _evaluated(evaluator, weights, made_up, rows)
    content.update(figures.tobytes())
    vectors, tallies = gradients(0, shards)
    for j in range(shards):
        vector, tally = gradients(j, j + 1)
        same = same and _bits_equal(vector[0], vectors[j]) and _bits_equal(tally[0], tallies[j])
        content.update(vector.data)
        content.update(tally.tobytes())
    if update.gradients.leaves:
        content.update(sample_of(update.gradients, vectors[:, : update.layout.parameters]))
    del vectors
    content.update(_updated(update, weights, vector[0], 1.0 / rows))
    again, tally_again = gradients(shards - 1, shards)
    repeatable = _bits_equal(again, vector) and _bits_equal(tally_again, tally)
    accumulator.shards_computed = 0
    return Probe("sha256:" + content.hexdigest() if repeatable else NOT_REPEATABLE, same, repeatable)


def _evaluated(evaluator: Evaluator, weights: Array, made_up: Rows, rows: int) -> tuple[Array, bool]:
    """The sums of the made-up shards as blocks, one by one, and whether together they were the same."""
    small = copy(evaluator)
    small.rows, small.at_once, small.workspace = rows, len(made_up.x), Workspace()
    part = _Part(made_up)
    together = small.sums(weights, part, 0, small.at_once)
    single = np.concatenate([small.sums(weights, part, j, j + 1) for j in range(small.at_once)])
    return single, _bits_equal(together, single)


def _updated(update: Update, weights: Array, gradient: Array, scale: float) -> bytes:
    """An update of the first elements; elements don't meet, so that they speak for all."""
    n = min(update.layout.parameters, _UPDATED)
    new = np.zeros((2 * len(update.optimizer.slots) + 1, n), weights.dtype)
    after, *slots = new
    old, changed = slots[: len(slots) // 2], slots[len(slots) // 2 :]
    rates = update.optimizer.rates(scale, float(update.schedule.at(1)), 1)
    t, u = np.empty((2, n), weights.dtype)
    update.optimizer.stretch(weights[:n], gradient[:n], old, after, changed, rates, t, u)
    return new.tobytes()


def _bits_equal(a: Array, b: Array) -> bool:
    kind = f"u{a.dtype.itemsize}"
    return bool(np.array_equal(np.ascontiguousarray(a).view(kind), np.ascontiguousarray(b).view(kind)))


class _Part:
    """The made-up rows as a part to be evaluated."""

    def __init__(self, made_up: Rows) -> None:
        self._x = made_up.x.reshape(-1, *made_up.x.shape[2:])
        self._y = made_up.y.reshape(-1, *made_up.y.shape[2:])
        self.rows = len(self._x)

    def read(self, positions: npt.NDArray[np.int64], x: Array, y: Array) -> None:
        """See Rows in nn.evaluate."""
        x[: len(positions)] = self._x[positions]
        y[: len(positions)] = self._y[positions]
