"""Who computes on a worker's host: the interface, and the one process of it that does it itself."""

from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from dptrain.board import BEAT
from dptrain.exchange.parameter_server import lending
from dptrain.exchange.parameter_server.host_memory import most_slots
from dptrain.exchange.parameter_server.means import Means
from dptrain.exchange.parameter_server.residuals import Keeping, beside
from dptrain.layout import Array
from dptrain.nn.accumulate import Partials
from dptrain.phases import Phases


class Compute(Protocol):
    """Computes for a worker, who is called ``who`` in messages.

    ``weights`` is written to between calls; what a call returns is valid until the next.
    """

    who: str
    weights: Array
    lent: lending.Lent | None
    keeping: Keeping | None
    """The shards' residuals, where they keep any."""

    def partials(self, step: int, lo: int, hi: int, updates: int = 0) -> Partials:
        """The maximal subtrees of shards lo to hi, their vectors ready to be sent.

        Residuals are taken, and left, where those lie that ``updates`` updates led to.
        """

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
        self.keeping = None
        shards = means.accumulator.shards if means.accumulator.gradients.feeds_back else 0
        # Pages of shards that others compute are never touched.
        self._residuals: Array = np.zeros((2, shards, model.layout.parameters), model.dtype)
        if shards:
            self.keeping = Keeping(self._residuals)
        self._means, self._phases = means, phases
        means.tell(phases)
        self._outbox, self.lent = lending.rows(most_slots(means.accumulator.shards), model.layout.size, model.dtype)

    def partials(self, step: int, lo: int, hi: int, updates: int = 0) -> Partials:
        """See Compute."""
        kept = beside(self._residuals, updates) if self.keeping is not None else None
        return self._means.partials(self.weights, self._outbox, step, lo, hi, kept)

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
