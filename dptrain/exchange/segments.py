"""Several workers over a transport that moves bytes: each coordinator finishes the tree for its segment.

Phase 1: every worker sends each coordinator that segment of its partials; the coordinator adds them in the canonical
order. Phase 3: the finished sums are handed out, the same bytes as the weights would be, and every worker applies
the update to its own whole state, so that any of them could go on alone. ``coordinators`` = 1 is the plain picture of
one rank that adds everything; as many as there are workers leaves none the bottleneck. The bits are the same.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from dptrain.exchange.communicator import Communicator, Message, Posted
from dptrain.exchange.protocol import Exchange
from dptrain.exchange.verdict import Verdict
from dptrain.layout import BLOCK, Array, segments
from dptrain.membership import Membership
from dptrain.nn.accumulate import Partials
from dptrain.state import State, Update
from dptrain.tree import Node, additions


class Segments(Exchange):
    """``coordinators`` of the workers, the lowest ranks, own a segment each."""

    name = "segments"

    def __init__(
        self,
        communicator: Communicator,
        membership: Membership,
        update: Update,
        dtype: npt.DTypeLike,
        outbox: int,
        *,
        coordinators: int,
    ) -> None:
        cuts = segments(update.layout.size, coordinators)
        empty = (update.layout.size, update.layout.size)
        self.segments = cuts + [empty] * (membership.size - coordinators)
        self.lo, self.hi = self.segments[membership.rank]
        self._sum: Array
        super().__init__(communicator, membership, update, dtype, outbox)
        everyone = [node for nodes in membership.nodes for node in nodes]
        self._plan = additions(everyone, Node(0, membership.shards))

    def _allocate(self, outbox: int) -> None:
        super()._allocate(outbox)
        membership, rank = self.membership, self.membership.rank
        self._sum = np.zeros(self.update.layout.size, self.dtype)
        foreign = [
            (peer, i, node)
            for peer, nodes in enumerate(membership.nodes)
            if peer != rank and self.lo < self.hi
            for i, node in enumerate(nodes)
        ]
        self._inbox: Array = np.zeros((len(foreign), self.hi - self.lo), self.dtype)
        self._values: dict[Node, Array] = {}
        self._receives = []
        for row, (peer, i, node) in zip(self._inbox, foreign, strict=True):
            self._receives.append(Message(peer, row, i))
            self._values[node] = row
        others = [peer for peer in range(membership.size) if peer != rank]
        self._hand_out = [Message(peer, self._sum[self.lo : self.hi], 0) for peer in others if self.lo < self.hi]
        self._take_in = [
            Message(peer, self._sum[slice(*self.segments[peer])], 0)
            for peer in others
            if self.segments[peer][0] < self.segments[peer][1]
        ]

    def squares_of_workers(self) -> Sequence[int]:
        """The blocks of each coordinator's segment."""
        return [-(-(hi - lo) // BLOCK) for lo, hi in self.segments]

    def finish(self, partials: Partials) -> npt.NDArray[np.float64]:
        """Send the others their segments, add up one's own."""
        sends = [
            Message(peer, vector[lo:hi], i)
            for peer, (lo, hi) in enumerate(self.segments)
            if peer != self.membership.rank and lo < hi
            for i, vector in enumerate(partials.vectors)
        ]
        self.communicator.post(sends, self._receives, "partials").wait()
        if self.lo == self.hi:
            return np.zeros(0)
        values = {**self._values}
        for node, vector in zip(partials.nodes, partials.vectors, strict=True):
            values[node] = vector[self.lo : self.hi]
        self._add(values)
        return self.update.squares(self._sum, self.lo, self.hi)

    def _add(self, values: dict[Node, Array]) -> None:
        """The sum of one's own segment, from all nodes' parts of it."""
        goal = Node(0, self.membership.shards)
        total = self._sum[self.lo : self.hi]
        if not self._plan:
            np.copyto(total, values[goal])
            return
        # A block at a time, so that every addition after the first finds its operands in the cache. The last
        # addition writes into the sum, the others over their left operand, which nobody needs again.
        for start in range(0, self.hi - self.lo, BLOCK):
            block = {node: array[start : start + BLOCK] for node, array in values.items()}
            for parent, left, right in self._plan:
                into = total[start : start + BLOCK] if parent == goal else block[left]
                block[parent] = np.add(block[left], block[right], out=into)

    def commit(self, state: State, verdict: Verdict) -> None:
        """Hand the finished sums out, and update one's own segment while they travel."""
        posted: Posted = self.communicator.post(self._hand_out, self._take_in, "sums")
        for lo, hi in ((self.lo, self.hi), (0, self.lo), (self.hi, self.update.layout.size)):
            if lo < hi:
                self._apply(state, lo, hi, verdict)
            posted.wait()

    def _apply(self, state: State, lo: int, hi: int, verdict: Verdict) -> None:
        self.update.apply(state, self.store, self._sum, lo, hi, scale=verdict.scale, rows=verdict.rows)
