"""The committed state of a run, its two buffers, and the update that leads from one to the other.

Weights and optimizer state exist twice. An update reads the front and writes the back; only when all agree does the
back become the front. Until then the old state is whole.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from dptrain.layout import BLOCK, Array, Layout


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


@dataclass(frozen=True)
class State:
    """A committed state: after ``step`` steps and ``updates`` updates. Its arrays are never written to again.

    ``weights`` is the flat vector with the buffers at its end, ``slots`` the optimizer's vectors over the parameters;
    ``side`` tells which of the two buffers it lies in.
    """

    step: int
    updates: int
    weights: Array
    slots: tuple[Array, ...]
    side: int
    judgement: Judgement = field(default_factory=Judgement)


class Store:
    """The memory of two states; all of it is touched when it is made, so that nothing dies for want of it later."""

    def __init__(self, layout: Layout, slots: int, dtype: npt.DTypeLike) -> None:
        weights: Array = np.empty((2, layout.size), dtype)
        moments: Array = np.empty((2, slots, layout.parameters), dtype)
        # np.zeros would leave the pages to be found at the first write.
        weights.fill(0)
        moments.fill(0)
        self._sides = _sides(weights, moments)

    @classmethod
    def of(cls, weights: Array, slots: Array) -> "Store":
        """A store in memory that is there already: (2, size) and (2, slots, parameters)."""
        store = cls.__new__(cls)
        store._sides = _sides(weights, slots)
        return store

    def weights(self, side: int) -> Array:
        """The flat vector of a side, always the same object."""
        return self._sides[side][0]

    def slots(self, side: int) -> tuple[Array, ...]:
        """The optimizer's vectors of a side."""
        return self._sides[side][1]


def _sides(weights: Array, slots: Array) -> list[tuple[Array, tuple[Array, ...]]]:
    return [(vector, tuple(some)) for vector, some in zip(weights, slots, strict=True)]


class Optimizer(Protocol):
    """Updates parameters element by element."""

    slots: tuple[str, ...]

    def update(
        self,
        weights: Array,
        gradient: Array,
        slots: Sequence[Array],
        new_weights: Array,
        new_slots: Sequence[Array],
        *,
        scale: float,
        lr: float,
        count: int,
    ) -> None:
        """Read the old, write the new; the mean gradient is gradient * scale, ``count`` starts at 1."""


class LearningRate(Protocol):
    """A schedule."""

    def at(self, count: int) -> float:
        """The rate of update number ``count``, from 1."""


class Update:
    """The way from a finished gradient sum to the next state, for any range of the flat vector.

    Ranges start at multiples of BLOCK. ``clip_norm`` 0 means no clipping.
    """

    def __init__(self, layout: Layout, optimizer: Optimizer, schedule: LearningRate, clip_norm: float) -> None:
        self.layout = layout
        self.optimizer = optimizer
        self.schedule = schedule
        self.clip_norm = clip_norm
        self._momentum = layout.buffer_momentum()
        self._wide = np.empty(BLOCK, np.float64)

    @property
    def blocks(self) -> int:
        """The number of blocks that norms are summed by."""
        return -(-self.layout.size // BLOCK)

    def squares(self, gradient: Array, lo: int, hi: int) -> npt.NDArray[np.float64]:
        """The squared norm of each block from lo to hi, in float64; NaN or inf where not finite.

        Buffers have no part in the norm, but must be finite. Where nothing is clipped the norm isn't wanted: 0 stands
        for finite, and the screening is one product.
        """
        found = np.zeros(-(-(hi - lo) // BLOCK))
        end = max(lo, min(hi, self.layout.parameters))
        if not _finite(gradient[end if self.clip_norm else lo : hi]):
            found[-1] = np.nan
        if self.clip_norm:
            for i, start in enumerate(range(lo, end, BLOCK)):
                block = gradient[start : min(end, start + BLOCK)]
                wide = self._wide[: len(block)]
                wide[:] = block
                found[i] += np.dot(wide, wide)
        return found

    def apply(
        self, state: State, store: Store, gradient: Array, lo: int, hi: int, *, scale: float, rows: float
    ) -> None:
        """Write elements lo to hi of the state after ``state`` into the store's other side.

        ``gradient`` is the finished sum, ``scale`` what makes it the (clipped) mean, ``rows`` the real rows of the
        batch, by which a buffer's sum is divided.
        """
        back = 1 - state.side
        count = state.updates + 1
        cut = max(lo, min(hi, self.layout.parameters))
        if lo < cut:
            self.optimizer.update(
                state.weights[lo:cut],
                gradient[lo:cut],
                [slot[lo:cut] for slot in state.slots],
                store.weights(back)[lo:cut],
                [slot[lo:cut] for slot in store.slots(back)],
                scale=scale,
                lr=self.schedule.at(count),
                count=count,
            )
        if cut < hi:
            at = self.layout.parameters
            momentum = self._momentum[cut - at : hi - at]
            mean = gradient[cut:hi].astype(np.float64) / rows
            store.weights(back)[cut:hi] = state.weights[cut:hi] * (1 - momentum) + mean * momentum


def _finite(vector: Array) -> bool:
    # The product is much quicker than a look at every element, but overflows where all are finite.
    return bool(np.isfinite(np.dot(vector, vector)) or np.isfinite(vector).all())
