"""A run whose order of arrival is known, done again by one process: each gradient of the weights that it was of."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from dptrain.arrivals import Arrival
from dptrain.exchange.communicator import Alone
from dptrain.exchange.protocol import Exchange, Load
from dptrain.exchange.segments import in_place
from dptrain.exchange.verdict import Ballot, Report, Verdict, summed
from dptrain.layout import Array
from dptrain.membership import Led, Membership
from dptrain.nn.accumulate import TALLIES, Accumulator, Partials, Schedule
from dptrain.phases import Phase
from dptrain.state import Segment, State, Store, Update
from dptrain.tree import Node, additions, subtrees


class Log(Alone):
    """The communicator of a replay. ``signal`` is the one that ended the run after the last arrival, or 0."""

    def __init__(self, arrivals: Sequence[Arrival], signal: int) -> None:
        super().__init__()
        self.arrivals, self.signal = arrivals, signal


class Asked(Membership):
    """That of one process which computes what its exchange asks for, and evaluates all."""

    def owned_by(self, rank: int) -> tuple[int, int]:
        """None."""
        return self.shards, self.shards


class Replayed(Exchange):
    """Every step is of the batch, and of the weights, that the log says; ``equip`` says with what it is computed."""

    name = "replay"
    same_bits = False

    def __init__(self, communicator: Log, membership: Membership, update: Update, dtype: npt.DTypeLike) -> None:
        super().__init__(communicator, membership, update)
        self._log = communicator
        self.outbox = np.zeros((1, update.layout.size), dtype)
        self.store = Store(update.layout, len(update.optimizer.slots), dtype)
        self._goal = Node(0, membership.shards)
        self._prepared: dict[tuple[tuple[int, int], ...], tuple[Segment, dict[Node, Array]]] = {}
        self._plans: dict[tuple[int, int], tuple[Schedule, Array]] = {}
        self._versions: dict[int, Array] = {}
        # So often is each version asked for.
        self._uses = Counter(part.weights for arrival in communicator.arrivals for part in arrival.parts)

    def equip(self, accumulator: Accumulator, load: Load) -> None:
        """See Exchange."""
        self._accumulator, self._load = accumulator, load

    @property
    def ballot(self) -> Ballot:
        """That of a worker that had all shards."""
        if self._ballot is None:
            self._ballot = Ballot(Led(0, 1, self.membership.shards), self.squares_of_workers(), self.update.clip_norm)
        return self._ballot

    @property
    def suspects(self) -> range:
        """All."""
        return range(self.membership.shards)

    def squares_of_workers(self) -> Sequence[int]:
        """All blocks."""
        return [self.update.blocks]

    def swap(self, state: State, partials: Partials, report: Report) -> tuple[State, Verdict]:
        """See Exchange; ``partials`` are none."""
        arrivals = self._log.arrivals
        tallies = np.zeros((0, TALLIES))
        if not report.failure:
            self.arrival = arrivals[state.step]
            tallies = self._computed(state, self.arrival)
            if state.step + 1 == len(arrivals):
                report = report._replace(signal=self._log.signal)
        return super().swap(state, Partials([self._goal], self.outbox, tallies), report)

    def collect(self, partials: Partials) -> None:
        """All is here."""
        self._segment.add()

    def squares(self) -> npt.NDArray[np.float64]:
        """Nothing is left to add."""
        return self._segment.squares()

    def advance(self, state: State, verdict: Verdict) -> bool:
        """Update everything."""
        return self._segment.advance(state, scale=verdict.scale, rows=verdict.rows, add=False, share=verdict.share)

    def _computed(self, state: State, arrival: Arrival) -> npt.NDArray[np.float64]:
        """The tallies of an arrival; its partials are in the prepared sum's memory."""
        if self._uses[state.step]:
            self._versions[state.step] = state.weights.copy()
        cuts = tuple((part.lo, part.hi) for part in arrival.parts)
        self._segment, vectors = self._prepared.get(cuts) or self._prepare(cuts)
        tallies: dict[Node, list[float]] = {}
        for part in arrival.parts:
            plan, outbox = self._plan(part.lo, part.hi)
            done = self._accumulator.accumulate(
                self._versions[part.weights],
                plan,
                outbox,
                arrival.batch,
                lambda lo, hi: self._load(arrival.batch, lo, hi, None),
            )
            for node, vector, row in zip(done.nodes, done.vectors, done.tallies, strict=True):
                np.copyto(vectors[node], vector)
                tallies[node] = row.tolist()
            self._uses[part.weights] -= 1
            if not self._uses[part.weights]:
                del self._versions[part.weights]
        self.phases.begin(Phase.EXCHANGE)
        return np.array([summed(tallies, additions(tallies, self._goal), self._goal)])

    def _prepare(self, cuts: tuple[tuple[int, int], ...]) -> tuple[Segment, dict[Node, Array]]:
        """The sum over the nodes of these ranges, and where each node's vector is to lie."""
        size, dtype = self.update.layout.size, self.outbox.dtype
        nodes = [node for lo, hi in cuts for node in subtrees(lo, hi, self.membership.shards)]
        vectors: dict[Node, Array] = {node: np.zeros(size, dtype) for node in nodes}
        pairs, total = in_place(dict(vectors), additions(nodes, self._goal), self._goal)
        found = self._prepared[cuts] = self.update.segment(self.store, 0, size, total, pairs), vectors
        return found

    def _plan(self, lo: int, hi: int) -> tuple[Schedule, Array]:
        if (lo, hi) not in self._plans:
            plan = self._accumulator.schedule(lo, hi)
            outbox: Array = np.zeros((plan.slots, self.update.layout.size), self.outbox.dtype)
            self._plans[lo, hi] = plan, outbox
        return self._plans[lo, hi]
