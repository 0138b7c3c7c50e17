"""The plain picture: MPI adds, one coordinator updates, everyone gets the weights.

MPI adds in an order of its own, which depends on the number of workers and on the library, so the bits are NOT
promised to be solo's, nor the same for two worker counts; the result says ``same_bits: false``. Only the coordinator
(rank 0) holds the optimizer's state. It is here to compare with, and to teach.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from dptrain.exchange.communicator import Communicator
from dptrain.exchange.protocol import Exchange
from dptrain.exchange.verdict import Verdict
from dptrain.layout import Array
from dptrain.membership import Membership
from dptrain.nn.accumulate import Partials
from dptrain.phases import Phase
from dptrain.state import State, Store, Update


class Allreduce(Exchange):
    """MPI_Allreduce of gradient sums, the update on rank 0, MPI_Bcast of weights."""

    name = "allreduce"
    same_bits = False

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
        self.store = Store(update.layout, len(update.optimizer.slots), dtype)
        self._sum: Array = np.zeros(size, dtype)
        self._segment = update.segment(self.store, 0, size, self._sum)

    def squares_of_workers(self) -> Sequence[int]:
        """All blocks are the coordinator's."""
        return [self.update.blocks] + [0] * (self.membership.size - 1)

    def collect(self, partials: Partials) -> None:
        """The sum over all workers, on all workers."""
        self._sum[:] = 0
        for vector in partials.vectors:
            self._sum += vector
        self.phases.begin(Phase.WAITING, "allreduce")
        self.communicator.allreduce(self._sum, "allreduce")
        self.phases.begin(Phase.EXCHANGE)

    def squares(self) -> npt.NDArray[np.float64]:
        """The coordinator's."""
        return self._segment.squares() if self.membership.chief else np.zeros(0)

    def advance(self, state: State, verdict: Verdict) -> bool:
        """The coordinator updates and broadcasts."""
        good = True
        if self.membership.chief:
            good = self._segment.advance(state, scale=verdict.scale, rows=verdict.rows, add=False)
        self.phases.begin(Phase.WAITING, "weights")
        self.communicator.broadcast(self.store.weights(1 - state.side), "weights")
        return good
