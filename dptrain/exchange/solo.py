"""One worker: the truth that every other exchange is held to."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from dptrain.exchange.protocol import Exchange
from dptrain.exchange.verdict import Verdict
from dptrain.nn.accumulate import Partials
from dptrain.state import State


class Solo(Exchange):
    """All shards are this worker's, so its only partial is the finished sum."""

    name = "solo"

    def squares_of_workers(self) -> Sequence[int]:
        """All blocks."""
        return [self.update.blocks]

    def finish(self, partials: Partials) -> npt.NDArray[np.float64]:
        """Nothing is left to add."""
        (self._sum,) = partials.vectors
        return self.update.squares(self._sum, 0, len(self._sum))

    def commit(self, state: State, verdict: Verdict) -> None:
        """Update everything."""
        self.update.apply(state, self.store, self._sum, 0, len(self._sum), scale=verdict.scale, rows=verdict.rows)
