"""One worker: the truth that every other exchange is held to."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from dptrain.exchange.communicator import Communicator
from dptrain.exchange.protocol import Exchange
from dptrain.exchange.verdict import Verdict
from dptrain.membership import Membership
from dptrain.nn.accumulate import Partials
from dptrain.state import State, Store, Update


class Solo(Exchange):
    """All shards are this worker's, so its only partial is the finished sum."""

    name = "solo"

    def __init__(
        self,
        communicator: Communicator,
        membership: Membership,
        update: Update,
        dtype: npt.DTypeLike,
        outbox: int,
    ) -> None:
        super().__init__(communicator, membership, update)
        size = update.layout.size
        self.outbox = np.zeros((outbox, size), dtype)
        kept = membership.shards if update.gradients.feeds_back else 0
        self.store = Store(update.layout, len(update.optimizer.slots), dtype, kept)
        self._segment = update.segment(self.store, 0, size, self.outbox[0])

    def squares_of_workers(self) -> Sequence[int]:
        """All blocks."""
        return [self.update.blocks]

    def collect(self, partials: Partials) -> None:
        """The only partial is where it belongs."""

    def squares(self) -> npt.NDArray[np.float64]:
        """Nothing is left to add."""
        return self._segment.squares()

    def advance(self, state: State, verdict: Verdict) -> bool:
        """Update everything."""
        return self._segment.advance(state, scale=verdict.scale, rows=verdict.rows, add=False, share=verdict.share)
