"""Several workers: each coordinator finishes the tree for its segment of the flat vector.

Workers of one machine may share memory: then partials, weights and optimizer state lie there, once a machine, and
nothing is copied among them. Backward writes a worker's partials straight into its outbox; each coordinator adds up
its segment over all outboxes, and updates it in the back buffer of the one state.

Between machines bytes travel by segment. Of each foreign segment one worker of a machine, its carrier, adds what
the machine's outboxes hold of it and sends the coordinator the sums; the finished sum comes back, the same bytes as
the weights would be, and the carrier applies the update to its own machine's state. So every local worker has a lane
of its own, and every machine holds the whole state. A machine may consist of a single worker with private memory:
then all that is left is messages. ``coordinators`` = 1 is the plain picture of one rank that adds everything; as many
as there are workers leaves none the bottleneck. The bits are the same in all of them.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from dptrain.exchange.communicator import Communicator, Message, Posted
from dptrain.exchange.protocol import Exchange
from dptrain.exchange.verdict import Verdict
from dptrain.layout import BLOCK, Array, Layout, segments
from dptrain.membership import Membership
from dptrain.nn.accumulate import Partials
from dptrain.phases import Phase
from dptrain.state import Pair, Segment, State, Store, Update
from dptrain.tree import Add, Node, merged

_ALIGNED = 64

SUM = 0
"""The tag of a finished sum; partials have the tags from 1 on."""


@dataclass(frozen=True)
class Machines:
    """Which workers share memory: every rank is in one of ``groups``, as is ``rank``."""

    groups: tuple[tuple[int, ...], ...]
    rank: int

    @property
    def here(self) -> tuple[int, ...]:
        """The workers that share memory with this one, itself among them."""
        return self.groups[self.number(self.rank)]

    def number(self, rank: int) -> int:
        """The number of the machine that a worker is on."""
        return next(i for i, group in enumerate(self.groups) if rank in group)

    def carrier(self, machine: int, owner: int) -> int:
        """The worker of a machine that deals with the segment of ``owner``: itself, or the one of the same lane."""
        group = self.groups[machine]
        if owner in group:
            return owner
        return group[self.groups[self.number(owner)].index(owner) % len(group)]


class Memory:
    """The state and the outboxes of the workers ``here``, of whom each has some rows."""

    def __init__(
        self, layout: Layout, slots: int, dtype: npt.DTypeLike, outboxes: Sequence[int], residuals: int = 0
    ) -> None:
        """``outboxes``: the rows of each worker of the machine, in their order; ``residuals``: see Store."""
        self._residuals = residuals
        self._dtype = np.dtype(dtype)
        self._layout, self._slots, self._outboxes = layout, slots, list(outboxes)
        unit = _ALIGNED // self._dtype.itemsize
        self._row = -(-layout.size // unit) * unit
        self._slot = -(-layout.parameters // unit) * unit

    @property
    def nbytes(self) -> int:
        """Bytes needed."""
        vectors = self._slots + self._residuals
        return (2 * (self._row + vectors * self._slot) + sum(self._outboxes) * self._row) * self._dtype.itemsize

    def place(self, memory: Array | None) -> tuple[Store, list[Array]]:
        """The store and the outboxes in ``memory``, ``nbytes`` of zeros; None for private memory, touched at once."""
        if memory is None:
            memory = np.empty(self.nbytes, np.uint8)
            memory.fill(0)
        elements = memory.view(self._dtype)
        vectors = [2 * count * self._slot for count in (self._slots, self._residuals)]
        counts = [2 * self._row, *vectors, *(rows * self._row for rows in self._outboxes)]
        weights, moments, kept, *boxes = np.split(elements, np.cumsum(counts)[:-1])
        layout = self._layout
        store = Store.of(
            weights.reshape(2, self._row)[:, : layout.size],
            moments.reshape(2, self._slots, self._slot)[:, :, : layout.parameters],
            kept.reshape(2, self._residuals, self._slot)[:, :, : layout.parameters],
        )
        return store, [
            box.reshape(rows, self._row)[:, : layout.size] for box, rows in zip(boxes, self._outboxes, strict=True)
        ]


class _Carried(NamedTuple):
    """A segment of another machine's: what is sent for it, and the way its finished sum takes here."""

    sends: list[Message]
    sum: Message
    segment: Segment


class Segments(Exchange):
    """``coordinators`` of the workers, the lowest ranks, own a segment each; ``machines`` says who shares memory.

    ``store`` and ``outboxes``, those of the workers of this machine in their order, are what :class:`Memory` placed.
    """

    def __init__(
        self,
        communicator: Communicator,
        membership: Membership,
        update: Update,
        *,
        name: str,
        coordinators: int,
        machines: Machines,
        store: Store,
        outboxes: Sequence[Array],
    ) -> None:
        super().__init__(communicator, membership, update)
        self.name = name
        cuts = segments(update.layout.size, coordinators)
        empty = (update.layout.size, update.layout.size)
        self._segments = cuts + [empty] * (membership.size - coordinators)
        self._machines = machines
        self.store = store
        self.outbox = outboxes[machines.here.index(membership.rank)]
        self._goal = Node(0, membership.shards)
        self._vectors = {
            node: box[i]
            for rank, box in zip(machines.here, outboxes, strict=True)
            for i, node in enumerate(membership.nodes[rank])
        }
        self._merged = [
            merged((node for rank in group for node in membership.nodes[rank]), self._goal) for group in machines.groups
        ]
        self._own = self._owned(self.outbox.dtype)
        self._carried = [
            self._carry(owner, lo, hi)
            for owner, (lo, hi) in enumerate(self._segments)
            if lo < hi and owner not in machines.here and self._carrier_here(owner) == membership.rank
        ]

    def _carrier_here(self, owner: int) -> int:
        return self._machines.carrier(self._machines.number(self.membership.rank), owner)

    def _owned(self, dtype: npt.DTypeLike) -> Segment | None:
        """This worker's segment, and the messages that concern it."""
        rank = self.membership.rank
        lo, hi = self._segments[rank]
        self._receives: list[Message] = []
        self._hand_out: list[Message] = []
        if lo == hi:
            return None
        values = {node: vector[lo:hi] for node, vector in self._vectors.items()}
        for machine, (roots, _) in enumerate(self._merged):
            if rank in self._machines.groups[machine]:
                continue
            carrier = self._machines.carrier(machine, rank)
            for i, root in enumerate(roots):
                values[root] = np.zeros(hi - lo, dtype)
                self._receives.append(Message(carrier, values[root], i + 1))
        _, plan = merged(values, self._goal)
        pairs, total = in_place(values, plan, self._goal)
        for machine, group in enumerate(self._machines.groups):
            if rank not in group:
                self._hand_out.append(Message(self._machines.carrier(machine, rank), total, SUM))
        return self.update.segment(self.store, lo, hi, total, pairs)

    def _carry(self, owner: int, lo: int, hi: int) -> _Carried:
        """What this worker does for a segment that is finished on another machine."""
        roots, plan = self._merged[self._machines.number(self.membership.rank)]
        values = {node: vector[lo:hi] for node, vector in self._vectors.items()}
        pairs, _ = in_place(values, plan, None)
        sends = [Message(owner, values[root], i + 1) for i, root in enumerate(roots)]
        # What was sent has left its place before a sum comes, and nobody else touches this range of the outbox.
        total = self.outbox[0, lo:hi]
        return _Carried(sends, Message(owner, total, SUM), self.update.segment(self.store, lo, hi, total, pairs))

    def squares_of_workers(self) -> Sequence[int]:
        """The blocks of each coordinator's segment."""
        return [-(-(hi - lo) // BLOCK) for lo, hi in self._segments]

    def collect(self, partials: Partials) -> None:
        """Add what this machine has of foreign segments, send it, and receive what others have of one's own."""
        if len(self._machines.groups) == 1:
            return
        posted: list[Posted] = [self.communicator.post([], self._receives, "partials")]
        for carried in self._carried:
            carried.segment.add()
            posted.append(self.communicator.post(carried.sends, [], "partials"))
        self._wait(posted, "partials")

    def squares(self) -> npt.NDArray[np.float64]:
        """Finish the tree for one's own segment."""
        if self._own is None:
            return np.zeros(0)
        self._own.add()
        return self._own.squares()

    def advance(self, state: State, verdict: Verdict) -> bool:
        """Update one's own segment, here while its sum travels, and those that are carried as their sums arrive."""
        own, add = self._own, not self.update.clip_norm
        if len(self._machines.groups) == 1:
            return own is None or own.advance(state, scale=verdict.scale, rows=verdict.rows, add=add)
        if self._hand_out and own is not None and add:
            own.add()
            add = False
        posted = [self.communicator.post(self._hand_out, [], "sums")]
        arriving = [self.communicator.post([], [carried.sum], "sums") for carried in self._carried]
        good = True
        if own is not None:
            good = own.advance(state, scale=verdict.scale, rows=verdict.rows, add=add)
        for carried, sum_ in zip(self._carried, arriving, strict=True):
            self._wait([sum_], "sums")
            self.phases.begin(Phase.UPDATE)
            carried.segment.advance(state, scale=verdict.scale, rows=verdict.rows, add=False)
        self._wait(posted, "sums")
        return good

    def _wait(self, posted: Iterable[Posted], phase: str) -> None:
        self.phases.begin(Phase.WAITING, phase)
        for some in posted:
            some.wait()
        self.phases.begin(Phase.EXCHANGE)


def in_place(values: dict[Node, Array], plan: Sequence[Add], goal: Node | None) -> tuple[list[Pair], Array]:
    """The plan's additions, each over its left operand, which nobody needs again; ``values`` gets the new nodes.

    The second value is that of the goal, if there is one.
    """
    pairs = []
    for parent, left, right in plan:
        values[parent] = values[left]
        pairs.append((values[left], values[right]))
    return pairs, values[goal] if goal is not None else np.zeros(0)
