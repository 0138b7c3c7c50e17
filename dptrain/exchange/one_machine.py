"""Segments on one machine: nothing travels, because partials and state lie in memory that all workers share.

Backward writes a worker's partials straight into its outbox there. Each coordinator adds up its segment over all
outboxes and updates it in the back buffer of the one state that the machine has; when all are done, all flip.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from dptrain.exchange.communicator import Communicator
from dptrain.exchange.segments import Segments
from dptrain.exchange.shared_memory import shared
from dptrain.exchange.verdict import Verdict
from dptrain.layout import Array
from dptrain.membership import Membership
from dptrain.nn.accumulate import Partials
from dptrain.state import State, Store, Update


class OneMachine(Segments):
    """``memory`` as :func:`plan` measured it; every worker knows how many rows each of the outboxes has."""

    def __init__(
        self,
        communicator: Communicator,
        membership: Membership,
        update: Update,
        dtype: npt.DTypeLike,
        outboxes: Sequence[int],
        *,
        coordinators: int,
        memory: Array,
    ) -> None:
        self._elements = memory.view(dtype)
        self._outboxes = list(outboxes)
        super().__init__(communicator, membership, update, dtype, outboxes[membership.rank], coordinators=coordinators)

    def _allocate(self, outbox: int) -> None:
        layout, slots = self.update.layout, len(self.update.optimizer.slots)
        state, *boxes = np.split(self._elements, np.cumsum(_parts(self.update, self._outboxes))[:-1])
        weights, moments = np.split(state, [2 * layout.size])
        self.store = Store.of(weights.reshape(2, layout.size), moments.reshape(2, slots, layout.parameters))
        every = [box.reshape(rows, layout.size) for box, rows in zip(boxes, self._outboxes, strict=True)]
        self.outbox = every[self.membership.rank]
        self._values = {
            node: every[rank][i, self.lo : self.hi]
            for rank, nodes in enumerate(self.membership.nodes)
            for i, node in enumerate(nodes)
        }
        # Only the pages of one's own segment are ever touched.
        self._sum = np.zeros(layout.size, self.dtype)

    def finish(self, partials: Partials) -> npt.NDArray[np.float64]:
        """Wait until all partials are there, add up one's own segment."""
        self.communicator.barrier("partials")
        if self.lo == self.hi:
            return np.zeros(0)
        self._add(self._values)
        return self.update.squares(self._sum, self.lo, self.hi)

    def commit(self, state: State, verdict: Verdict) -> None:
        """Update one's own segment and wait until all have."""
        if self.lo < self.hi:
            self._apply(state, self.lo, self.hi, verdict)
        self.communicator.barrier("the new state")


def _parts(update: Update, outboxes: Sequence[int]) -> list[int]:
    """Elements of the state, and of each worker's outbox."""
    layout = update.layout
    state = 2 * (layout.size + len(update.optimizer.slots) * layout.parameters)
    return [state, *(rows * layout.size for rows in outboxes)]


def room(communicator: Communicator, update: Update, dtype: npt.DTypeLike, outboxes: Sequence[int]) -> Array | None:
    """The memory for all workers' partials and the one state, or None where the machine can't share so much."""
    return shared(communicator, sum(_parts(update, outboxes)) * np.dtype(dtype).itemsize)
