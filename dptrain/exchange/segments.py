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

import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dptrain.errors import PeerFailed, WorkerLost
from dptrain.exchange.communicator import Communicator
from dptrain.exchange.protocol import Exchange
from dptrain.exchange.traffic import ALL, Range, Traffic, Way, piece_length
from dptrain.exchange.verdict import Report, Verdict
from dptrain.layout import BLOCK, Array, Layout, segments
from dptrain.membership import Membership
from dptrain.nn.accumulate import Partials
from dptrain.packing import encoding_of
from dptrain.phases import Phase
from dptrain.state import STRETCH, Pair, Segment, State, Store, Update
from dptrain.tree import Add, Node, merged

_ALIGNED = 64

Mark = npt.NDArray[np.int64]
"""How far a worker is in backward, one number in memory that its machine shares; see ``Segments._tell``."""


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
        rows = 2 * (self._row + vectors * self._slot) + sum(self._outboxes) * self._row
        return _ALIGNED * len(self._outboxes) + rows * self._dtype.itemsize

    def place(self, memory: Array | None) -> tuple[Store, list[Array], list[Mark]]:
        """The store, the outboxes and the marks of all workers, in ``memory``, which is ``nbytes`` of zeros.

        None is for private memory, touched at once.
        """
        if memory is None:
            memory = np.empty(self.nbytes, np.uint8)
            memory.fill(0)
        head = _ALIGNED * len(self._outboxes)
        # One a line of the cache.
        marks = [memory[at : at + _ALIGNED].view(np.int64)[:1] for at in range(0, head, _ALIGNED)]
        elements = memory[head:].view(self._dtype)
        vectors = [2 * count * self._slot for count in (self._slots, self._residuals)]
        counts = [2 * self._row, *vectors, *(rows * self._row for rows in self._outboxes)]
        weights, moments, kept, *boxes = np.split(elements, np.cumsum(counts)[:-1])
        layout = self._layout
        store = Store.of(
            weights.reshape(2, self._row)[:, : layout.size],
            moments.reshape(2, self._slots, self._slot)[:, :, : layout.parameters],
            kept.reshape(2, self._residuals, self._slot)[:, :, : layout.parameters],
        )
        outboxes = [
            box.reshape(rows, self._row)[:, : layout.size] for box, rows in zip(boxes, self._outboxes, strict=True)
        ]
        return store, outboxes, marks


class Segments(Exchange):
    """``coordinators`` of the workers, the lowest ranks, own a segment each; ``machines`` says who shares memory.

    ``store``, and ``outboxes`` and ``marks``, those of the workers of this machine in their order, are what
    :class:`Memory` placed. ``early``: what is final leaves a machine while its workers are in backward.
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
        marks: Sequence[Mark],
        early: bool = False,
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
        self._marks = marks
        self._mark = marks[machines.here.index(membership.rank)]
        self._attempt = 0
        # The counts of others are seen in the order in which they were written, with all that was written before.
        self._early = early and (len(machines.here) == 1 or platform.machine() in ("x86_64", "AMD64"))
        self._own: Segment | None = None
        self._traffic: Traffic | None = None
        self._prepare(self.outbox.dtype)

    def _prepare(self, dtype: npt.DTypeLike) -> None:
        """This worker's segment, and what has to do with other machines."""
        lo, hi = self._segments[self.membership.rank]
        ranges: list[Range] = []
        if lo < hi:
            own = self._owned(lo, hi, dtype)
            self._own, ranges = own.segment, [own]
        if len(self._machines.groups) == 1:
            return
        ranges += [
            self._carried(owner, start, stop)
            for owner, (start, stop) in enumerate(self._segments)
            if start < stop and owner not in self._machines.here and self._carrier_here(owner) == self.membership.rank
        ]
        self._traffic = Traffic(
            self.communicator,
            ranges,
            encoding=encoding_of(self.update.gradients.name),
            parameters=self.update.layout.parameters,
            messages=1 + max(len(roots) for roots, _ in self._merged),
            lowest=self._lowest,
        )

    def _carrier_here(self, owner: int) -> int:
        return self._machines.carrier(self._machines.number(self.membership.rank), owner)

    def _owned(self, lo: int, hi: int, dtype: npt.DTypeLike) -> Range:
        """What this worker does for its own segment."""
        rank, machines = self.membership.rank, self._machines
        values = {node: vector[lo:hi] for node, vector in self._vectors.items()}
        away = [machine for machine, group in enumerate(machines.groups) if rank not in group]
        receives = []
        for machine in away:
            for root in self._merged[machine][0]:
                values[root] = np.zeros(hi - lo, dtype)
                receives.append(Way(machines.carrier(machine, rank), values[root]))
        _, plan = merged(values, self._goal)
        pairs, total = in_place(values, plan, self._goal)
        stretch = piece_length(hi - lo) if away else STRETCH
        segment = self.update.segment(self.store, lo, hi, total, pairs, stretch=stretch)
        return Range(lo, True, segment, [Way(machines.carrier(machine, rank), total) for machine in away], receives)

    def _carried(self, owner: int, lo: int, hi: int) -> Range:
        """What this worker does for a segment that is finished on another machine."""
        roots, plan = self._merged[self._machines.number(self.membership.rank)]
        values = {node: vector[lo:hi] for node, vector in self._vectors.items()}
        pairs, _ = in_place(values, plan, None)
        # What was sent has left its place before a sum comes, and nobody else touches this range of the outbox.
        total = self.outbox[0, lo:hi]
        segment = self.update.segment(self.store, lo, hi, total, pairs, stretch=piece_length(hi - lo))
        return Range(lo, False, segment, [Way(owner, values[root]) for root in roots], [Way(owner, total)])

    def squares_of_workers(self) -> Sequence[int]:
        """The blocks of each coordinator's segment."""
        return [-(-(hi - lo) // BLOCK) for lo, hi in self._segments]

    def opening(self) -> Callable[[int], None] | None:
        """See Exchange: where others are on other machines, what is final leaves during backward."""
        if self._traffic is None or not self._early:
            return None
        self._attempt += 1
        self._tell(self.update.layout.size)
        try:
            self._traffic.open()
        except WorkerLost:
            self._traffic.abandon()
            raise
        return self._told

    def _told(self, lowest: int) -> None:
        assert self._traffic is not None
        self._tell(lowest)
        self._traffic.wake()

    def _tell(self, lowest: int) -> None:
        """From where on this worker's partials are final, for those of this machine, in a number that only grows."""
        size = self.update.layout.size
        self._mark[0] = self._attempt * (size + 2) + size - lowest

    def _lowest(self) -> int:
        """From where on those of all workers of this machine are."""
        size = self.update.layout.size
        return size - max(0, min(int(mark[0]) for mark in self._marks) - self._attempt * (size + 2))

    def swap(self, state: State, partials: Partials, report: Report) -> tuple[State, Verdict]:
        """See Exchange."""
        traffic = self._traffic
        if traffic is None:
            return super().swap(state, partials, report)
        try:
            traffic.settle()
            if traffic.is_open:
                self._tell(ALL)
            after, verdict = super().swap(state, partials, report)
            self._drain(traffic)
        except PeerFailed:
            self._drain(traffic)
            raise
        except WorkerLost:
            traffic.abandon()
            raise
        finally:
            # Nobody looks at it any more, nor may who comes after a death take it for the new exchange's.
            self._mark[0] = -1
        return after, verdict

    def _drain(self, traffic: Traffic) -> None:
        """Whatever this step was, let all that was sent for it arrive."""
        if traffic.is_open:
            traffic.finalize()
            self.phases.begin(Phase.WAITING, "exchange")
            self.communicator.until(traffic.closed, "exchange")
            self.phases.begin(Phase.EXCHANGE)

    def meanwhile(self) -> Callable[[], object] | None:
        """See Exchange: nobody has to know what a step is worth for its sums to travel."""
        traffic = self._traffic
        return traffic.look if traffic is not None and traffic.is_open else None

    def collect(self, partials: Partials) -> None:
        """Send what this machine has of foreign segments; where the norm is wanted, wait for one's own segment."""
        traffic = self._traffic
        if traffic is None:
            return
        if not traffic.is_open:
            traffic.open()
        traffic.finalize()
        traffic.look()
        if self.update.clip_norm:
            self._await(lambda: all(piece.summed for piece in traffic.pieces if piece.owned))

    def squares(self) -> npt.NDArray[np.float64]:
        """Finish the tree for one's own segment."""
        if self._own is None:
            return np.zeros(0)
        if self._traffic is None:
            self._own.add()
        return self._own.squares()

    def advance(self, state: State, verdict: Verdict) -> bool:
        """Update one's own segment, and those that are carried, piece by piece as sums are there."""
        own, traffic = self._own, self._traffic
        if traffic is None:
            add = not self.update.clip_norm
            return own is None or own.advance(state, scale=verdict.scale, rows=verdict.rows, add=add)
        good, left = True, list(traffic.pieces)
        while left:
            self._await(lambda: any(piece.summed for piece in left))
            for piece in [piece for piece in left if piece.summed]:
                self.phases.begin(Phase.UPDATE)
                finite = piece.segment.advance(
                    state, scale=verdict.scale, rows=verdict.rows, add=False, only=piece.number
                )
                good = good and (finite or not piece.owned)
                left.remove(piece)
                self.phases.begin(Phase.EXCHANGE)
                traffic.look()
        return good

    def _await(self, come: Callable[[], bool]) -> None:
        traffic = self._traffic
        assert traffic is not None
        if come():
            return
        self.phases.begin(Phase.WAITING, "exchange")
        self.communicator.until(lambda: traffic.look() and come(), "exchange")
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
