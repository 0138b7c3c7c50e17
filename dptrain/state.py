"""The committed state of a run, its two buffers, and the update that leads from one to the other.

Weights and optimizer state exist twice. An update reads the front and writes the back; only when all agree does the
back become the front. Until then the old state is whole.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from dptrain.gradients import Gradients, finite
from dptrain.layout import BLOCK, Array, Layout
from dptrain.optim import Optimizer, Schedule


@dataclass(frozen=True)
class Judgement:
    """What evaluations have decided so far.

    ``best`` was seen at ``best_step``; ``reference`` is the value that patience counts from, ``without_gain`` the
    evaluations since; ``evaluated`` is the last step that was evaluated.
    """

    best: float | None = None
    best_step: int = 0
    reference: float | None = None
    without_gain: int = 0
    evaluated: int = -1


class State(NamedTuple):
    """A committed state: after ``step`` steps and ``updates`` updates. Its arrays are never written to again.

    ``weights`` is the flat vector with the buffers at its end, ``slots`` the optimizer's vectors over the parameters;
    ``side`` tells which of the two buffers it lies in. ``residuals`` are those of the shards, where the declared
    arithmetic of gradients keeps any.
    """

    step: int
    updates: int
    weights: Array
    slots: tuple[Array, ...]
    side: int
    judgement: Judgement = Judgement()
    residuals: tuple[Array, ...] = ()


class Store:
    """The memory of two states; all of it is touched when it is made, so that nothing dies for want of it later."""

    def __init__(
        self,
        layout: Layout,
        slots: int,
        dtype: npt.DTypeLike,
        residuals: int = 0,
        *,
        elsewhere: bool = False,
        vectors: Array | None = None,
    ) -> None:
        """``residuals``: the number of shards that keep one, 0 where none do. ``vectors`` (2, size): for the weights.

        Where they are kept ``elsewhere``, and only brought here now and then, both sides have the same memory for them.
        """
        weights: Array = np.empty((2, layout.size), dtype) if vectors is None else vectors
        moments: Array = np.empty((2, slots, layout.parameters), dtype)
        kept: Array = np.empty((1 if elsewhere else 2, residuals, layout.parameters), dtype)
        # np.zeros would leave the pages to be found at the first write.
        for memory in (weights, moments, kept):
            memory.fill(0)
        self._sides, self._residuals = _sides(weights, moments), _rows(kept)
        if elsewhere:
            self._residuals *= 2

    @classmethod
    def of(cls, weights: Array, slots: Array, residuals: Array | None = None) -> "Store":
        """A store in memory that is there already: (2, size), (2, slots, parameters), (2, shards, parameters)."""
        store = cls.__new__(cls)
        store._sides = _sides(weights, slots)
        store._residuals = [(), ()] if residuals is None else _rows(residuals)
        return store

    def residuals(self, side: int) -> tuple[Array, ...]:
        """The residuals of the shards of a side."""
        return self._residuals[side]

    def weights(self, side: int) -> Array:
        """The flat vector of a side, always the same object."""
        return self._sides[side][0]

    def slots(self, side: int) -> tuple[Array, ...]:
        """The optimizer's vectors of a side."""
        return self._sides[side][1]


def _sides(weights: Array, slots: Array) -> list[tuple[Array, tuple[Array, ...]]]:
    return [(vector, tuple(some)) for vector, some in zip(weights, slots, strict=True)]


def _rows(memory: Array) -> list[tuple[Array, ...]]:
    return [tuple(side) for side in memory]


Pair = tuple[Array, Array]
"""An addition in place: the second into the first."""


STRETCH = 4 * BLOCK
"""Elements that all passes go over before the next ones: they stay in a core's cache, and few calls are needed."""


class Update:
    """The way from gradient sums to the next state. ``clip_norm`` 0 means no clipping.

    ``gradients`` is how the sums are added.
    """

    def __init__(
        self,
        layout: Layout,
        optimizer: Optimizer,
        schedule: Schedule,
        clip_norm: float,
        gradients: Gradients | None = None,
    ) -> None:
        self.layout = layout
        self.optimizer = optimizer
        self.schedule = schedule
        self.clip_norm = clip_norm
        self.gradients = gradients or Gradients()

    @property
    def blocks(self) -> int:
        """The number of blocks that norms are summed by."""
        return -(-self.layout.size // BLOCK)

    def segment(
        self, store: Store, lo: int, hi: int, total: Array, pairs: Sequence[Pair] = (), *, stretch: int = STRETCH
    ) -> "Segment":
        """Elements lo to hi of the vector; lo is a multiple of BLOCK, and so is hi unless it is the end.

        ``total`` (hi - lo,) holds their gradient sum as soon as ``pairs``, of the same length, are added in order. A
        ``stretch`` has so many elements, a multiple of BLOCK and at most STRETCH.
        """
        return Segment(self, store, lo, hi, total, pairs, stretch)


class Side(NamedTuple):
    """Old and new elements of one direction between the two sides of a store."""

    w: Array
    old: tuple[Array, ...]
    new_w: Array
    new: tuple[Array, ...]


def stretches(lo: int, hi: int, parameters: int, length: int) -> list[tuple[int, int]]:
    """The stretches of elements lo to hi, each of parameters alone, or of the buffers behind them."""
    cuts = sorted({*range(lo, hi, length), min(max(lo, parameters), hi), hi})
    return list(pairwise(cuts))


class _Stretch(NamedTuple):
    """Some elements, parameters or buffers, with the additions that finish their sum.

    ``momentum`` is None for parameters; for buffers the shares of the new value and of the old.
    """

    pairs: tuple[Pair, ...]
    gradient: Array
    sides: tuple[Side, Side]
    momentum: tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]] | None


class Segment:
    """All that is done in a step to a range of the flat vector, stretch by stretch. Made once, it allocates no more."""

    def __init__(
        self, update: Update, store: Store, lo: int, hi: int, total: Array, pairs: Sequence[Pair], stretch: int
    ) -> None:
        self._update = update
        self._gradients = update.gradients.apart()
        layout = update.layout
        momentum = layout.buffer_momentum()
        self._stretches = []
        self.ranges = stretches(lo, hi, layout.parameters, stretch)
        for start, stop in self.ranges:
            part, here = slice(start - lo, stop - lo), slice(start, stop)
            buffers = start >= layout.parameters
            sides = tuple(_between(store, side, here, not buffers) for side in (0, 1))
            self._stretches.append(
                _Stretch(
                    tuple((left[part], right[part]) for left, right in pairs),
                    total[part],
                    (sides[0], sides[1]),
                    _shares(momentum[start - layout.parameters : stop - layout.parameters]) if buffers else None,
                )
            )
        self._total = total
        self._parameters = min(max(lo, layout.parameters), hi) - lo
        self._scratch = np.empty((3, STRETCH), total.dtype)
        self._wide = np.empty((2, STRETCH))

    def add(self, only: int | None = None) -> None:
        """Finish the sum, or that of one stretch alone."""
        for stretch in self._some(only):
            rounds = self._gradients.rounds and stretch.momentum is None
            for left, right in stretch.pairs:
                np.add(left, right, out=left)
                if rounds:
                    self._gradients.round(left)

    def squares(self) -> npt.NDArray[np.float64]:
        """The squared norm of the finished sum by blocks, in float64; NaN or inf where it isn't finite.

        Buffers have no part in the norm, but must be finite.
        """
        total, end = self._total, self._parameters
        found = np.zeros(-(-len(total) // BLOCK))
        if not finite(total[end:]):
            found[-1] = np.nan
        for i, start in enumerate(range(0, end, BLOCK)):
            block = total[start : min(end, start + BLOCK)]
            wide = self._wide[0, : len(block)]
            wide[:] = block
            found[i] += np.dot(wide, wide)
        return found

    def _some(self, only: int | None) -> list[_Stretch]:
        return self._stretches if only is None else [self._stretches[only]]

    def advance(
        self, state: State, *, scale: float, rows: float, add: bool, share: float = 1.0, only: int | None = None
    ) -> bool:
        """Write the state after ``state`` into the store's other side, and say whether the sum was finite.

        ``scale`` makes the sum the (clipped) mean, ``rows`` are the real rows of the batch, by which a buffer's sum
        is divided. With ``add`` the sum is finished here, stretch by stretch, and kept nowhere. The update gets a
        ``share`` of the learning rate. ``only`` one stretch may be meant.
        """
        update, side = self._update, state.side
        count = state.updates + 1
        rates = update.optimizer.rates(float(scale), float(update.schedule.at(count)) * share, count)
        one_stretch = update.optimizer.stretch
        good = True
        for pairs, gradient, sides, momentum in self._some(only):
            n = len(gradient)
            t, u, sum_ = self._scratch[0, :n], self._scratch[1, :n], self._scratch[2, :n]
            if add and pairs:
                rounds = self._gradients.rounds and momentum is None
                for left, right in pairs[:-1]:
                    np.add(left, right, out=left)
                    if rounds:
                        self._gradients.round(left)
                # The last sum is needed here and now only: it need not go back to memory.
                gradient = np.add(*pairs[-1], out=sum_)
                if rounds:
                    self._gradients.round(gradient)
            good = good and finite(gradient)
            w, old, new_w, new = sides[side]
            if momentum is None:
                one_stretch(w, gradient, old, new_w, new, rates, t, u)
            else:
                mean, kept = self._wide[0, :n], self._wide[1, :n]
                taken, rest = momentum
                mean[:] = gradient
                np.divide(mean, rows, out=mean)
                np.multiply(mean, taken, out=mean)
                # Cast by a copy: a product of two types would take memory for it.
                kept[:] = w
                np.multiply(kept, rest, out=kept)
                np.add(kept, mean, out=kept)
                new_w[:] = kept
        return good


def _shares(momentum: npt.NDArray[np.float64]) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    return momentum, 1 - momentum


def _between(store: Store, side: int, part: slice, slots: bool) -> Side:
    return Side(
        store.weights(side)[part],
        tuple(slot[part] for slot in store.slots(side)) if slots else (),
        store.weights(1 - side)[part],
        tuple(slot[part] for slot in store.slots(1 - side)) if slots else (),
    )
