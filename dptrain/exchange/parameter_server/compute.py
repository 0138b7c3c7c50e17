"""Who computes on a worker's host: the interface, and the one process of it that does it itself."""

from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from dptrain.board import BEAT
from dptrain.exchange.parameter_server.host_memory import most_slots
from dptrain.exchange.parameter_server.means import Means
from dptrain.layout import Array
from dptrain.nn.accumulate import Partials
from dptrain.phases import Phases


class Compute(Protocol):
    """Computes for a worker, who is called ``who`` in messages.

    ``weights`` is written to between calls; what a call returns is valid until the next.
    """

    who: str
    weights: Array

    def partials(self, step: int, lo: int, hi: int) -> Partials:
        """The maximal subtrees of shards lo to hi, their vectors ready to be sent."""

    def evaluate(self, part: str, lo: int, hi: int, step: int) -> npt.NDArray[np.float64]:
        """The sums of blocks lo to hi of a part, (hi - lo, width)."""

    def beat(self) -> int:
        """A count that grows while there is progress."""

    def report(self) -> list[dict[str, Any]]:
        """What each of several processes has done; empty for one alone."""

    def close(self) -> None:
        """Nothing more will be asked for."""


class Here:
    """This process computes alone."""

    who = ""

    def __init__(self, means: Means, phases: Phases) -> None:
        model = means.accumulator.model
        self.weights = np.zeros(model.layout.size, model.dtype)
        self._means, self._phases = means, phases
        means.tell(phases)
        self._outbox = np.zeros((most_slots(means.accumulator.shards), model.layout.size), model.dtype)

    def partials(self, step: int, lo: int, hi: int) -> Partials:
        """See Compute."""
        return self._means.partials(self.weights, self._outbox, step, lo, hi)

    def evaluate(self, part: str, lo: int, hi: int, step: int) -> npt.NDArray[np.float64]:
        """See Compute."""
        return self._means.evaluate(self.weights, part, lo, hi)

    def beat(self) -> int:
        """See Compute."""
        return int(self._phases.cell[BEAT])

    def report(self) -> list[dict[str, Any]]:
        """See Compute."""
        return []

    def close(self) -> None:
        """See Compute."""
        self._means.reader.close()
