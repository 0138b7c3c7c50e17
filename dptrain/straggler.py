"""Which worker holds the others up.

What counts is the time before a worker enters the exchange, where nobody can keep it waiting: afterwards all are as
slow as the slowest. A run is cut into stretches of as many steps each. A worker is clearly slow when in three of four
stretches it took more than SLOW times what the median worker would have taken for as many shards. Chance alone, with
even odds in every stretch, names a given worker in fewer than one run of a hundred; a few disturbed steps name nobody.

What another worker would have taken is a generous guess, because part of a step's time goes with the shards and part
is the same for any number: a worker with more shards than the other may take longer in proportion, one with fewer may
take as long. Spares own no shard and are left out. Of an even number of workers the lower of the two in the middle is
the median, so that of two workers one can be slow; where more than half are slow, as where three share two cores, it
is not a worker's fault and nobody is named.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from dptrain.phases import NAMES, OWN

SLOW = 1.2

_FEWEST, _MOST = 32, 64
"""Stretches: with fewer nothing is said; with more, neighbours are put together."""


class Slowest(NamedTuple):
    """The clearly slow worker, the phase with the largest excess, and how many times the median it took there."""

    rank: int
    phase: str
    times: float


class Pace:
    """Keeps how long each worker took. ``shards`` are the numbers of shards that the workers own, by rank."""

    def __init__(self, shards: Sequence[int]) -> None:
        self._owners = [rank for rank, own in enumerate(shards) if own]
        own = np.array([shards[rank] for rank in self._owners], np.float64)
        self._allowance = np.maximum(1.0, own[:, None] / own)
        self._stretches: list[list[float]] = []
        self._length = 1
        self._open: list[float] = []
        self._steps = 0

    def stepped(self, compute: Sequence[float]) -> None:
        """A step: each worker's seconds before it entered the exchange."""
        self._open = [a + b for a, b in zip(self._open, compute, strict=False)] if self._open else list(compute)
        self._steps += 1
        if self._steps < self._length:
            return
        self._stretches.append(self._open)
        self._open, self._steps = [], 0
        if len(self._stretches) == _MOST:
            pairs = zip(self._stretches[::2], self._stretches[1::2], strict=True)
            self._stretches = [[a + b for a, b in zip(*pair, strict=True)] for pair in pairs]
            self._length *= 2

    def slowest(self, phases: npt.NDArray[np.float64]) -> Slowest | None:
        """The worker that was clearly slow, if any; ``phases`` are the seconds, (workers, phases)."""
        if len(self._stretches) < _FEWEST or len(self._owners) < 2:
            return None
        took = np.array(self._stretches)[:, self._owners]
        worst: tuple[float, int] | None = None
        for i in range(len(self._owners)):
            due = self._median(took, i)
            excess = float(took[:, i].sum() / max(due.sum(), 1e-9))
            if np.mean(took[:, i] > SLOW * due) >= 0.75 and (worst is None or excess > worst[0]):
                worst = excess, i
        if worst is None:
            return None
        i = worst[1]
        own = phases[np.ix_(self._owners, OWN)].T
        due = self._median(own, i)
        most = int(np.argmax(own[:, i] - due))
        return Slowest(self._owners[i], NAMES[OWN[most]], round(float(own[most, i] / max(due[most], 1e-9)), 2))

    def _median(self, took: npt.NDArray[np.float64], i: int) -> npt.NDArray[np.float64]:
        """Of each row, what the median owner would have taken in the place of the i-th."""
        ordered = np.sort(took * self._allowance[i], axis=1)
        return np.asarray(ordered[:, (len(self._owners) - 1) // 2])
