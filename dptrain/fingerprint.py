"""What bits this worker computes: one seeded step of the job, hashed; and whether shards together equal one by one.

Two workers of one fingerprint may train together, and a checkpoint's fingerprint tells whether going on from it gives
the bits of the undisturbed run.
"""

import hashlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dptrain.layout import Array
from dptrain.nn.accumulate import Accumulator
from dptrain.nn.evaluate import Evaluator
from dptrain.random import Purpose, stream
from dptrain.state import State, Store, Update

_SHARDS = 2


@dataclass
class Rows:
    """Made-up rows of some shards, the last of them with one row of padding."""

    x: Array
    y: Array
    rows: Array
    counts: tuple[int, ...]

    def first(self, k: int) -> "Rows":
        """The rows of the first k shards."""
        return Rows(self.x[:k], self.y[:k], self.rows[:k], self.counts[:k])

    def only(self, j: int) -> "Rows":
        """The rows of one of the shards."""
        return Rows(self.x[j : j + 1], self.y[j : j + 1], self.rows[j : j + 1], self.counts[j : j + 1])


@dataclass(frozen=True)
class Sample:
    """What a row looks like: shapes, dtypes, the number of classes (0 for numbers)."""

    shape: tuple[int, ...]
    dtype: npt.DTypeLike
    target_shape: tuple[int, ...]
    target_dtype: npt.DTypeLike
    classes: int

    def made_up(self, seed: int, rows: int, dtype: npt.DTypeLike) -> Rows:
        """Rows for a probe, a function of the arguments."""
        rng = stream(seed, Purpose.PROBE)
        lead = (_SHARDS, rows)
        integer = np.issubdtype(np.dtype(self.dtype), np.integer)
        x = np.zeros((*lead, *self.shape), self.dtype)
        if not integer:
            x[...] = rng.standard_normal(x.shape)
        y = np.zeros((*lead, *self.target_shape), self.target_dtype)
        y[...] = rng.integers(0, self.classes, y.shape) if self.classes else rng.standard_normal(y.shape)
        ones = np.ones(lead, dtype)
        counts = (rows, max(1, rows - 1))
        ones[1, counts[1] :] = 0
        x[1, counts[1] :] = 0
        return Rows(x, y, ones, counts)


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

    ``repeatable``: one by one gave the same bytes twice.
    """

    fingerprint: str
    together: bool
    repeatable: bool


def probe(
    accumulator: Accumulator, evaluator: Evaluator, update: Update, weights: Array, sample: Sample, rows: int
) -> Probe:
    """Forward, backward, update and evaluation of made-up shards, together and one by one."""
    made_up = sample.made_up(accumulator.seed, rows, weights.dtype)
    tensors = accumulator.model.layout.views(weights)

    def gradients(shards: list[int]) -> tuple[Array, npt.NDArray[np.float64]]:
        part = made_up if len(shards) > 1 else made_up.only(shards[0])
        sink = Collected(accumulator, len(shards), weights.dtype)
        tallies = accumulator.backward(tensors, part, range(shards[0], shards[-1] + 1), 0, sink)
        return sink.vectors, tallies

    def one_by_one() -> bytes:
        found = [gradients([j]) for j in range(_SHARDS)]
        return b"".join(g.tobytes() for g, _ in found) + b"".join(t.tobytes() for _, t in found)

    single = one_by_one()
    vectors, tallies = gradients(list(range(_SHARDS)))
    together = vectors.tobytes() + tallies.tobytes() == single
    repeatable = one_by_one() == single
    gradient, _ = gradients([0])
    store = Store(update.layout, len(update.optimizer.slots), weights.dtype)
    state = State(0, 0, weights, store.slots(0), 0)
    update.apply(state, store, gradient[0], 0, update.layout.size, scale=1.0 / rows, rows=float(rows))
    after = store.weights(1)
    figures = evaluator.sums(after, _Part(made_up), 0, evaluator.blocks(_Part(made_up)))
    content = single + after.tobytes() + b"".join(s.tobytes() for s in store.slots(1)) + figures.tobytes()
    accumulator.shards_computed = 0
    return Probe("sha256:" + hashlib.sha256(content).hexdigest(), together, repeatable)


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
