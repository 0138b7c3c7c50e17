"""From weights and shards to partials: backward's gradients added in the canonical tree as they appear.

A worker takes its shards k at a time (a matter of speed and memory, never of bits) and keeps a binary counter of
sums: whatever two neighbours of the tree are at hand are added at once, tensor by tensor, while backward's result is
still in the cache. What is left at the end are the maximal subtrees of its range, lying in the outbox.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from dptrain.gradients import Gradients
from dptrain.layout import Layout
from dptrain.nn.layer import Array, Model, Pass, Workspace
from dptrain.phases import Phase, Phases
from dptrain.tree import Node, additions, subtrees

WEIGHT, LOSS, ROWS = range(3)
"""Columns of a tally: the loss's denominator, the sum of losses, the number of real rows."""

TALLIES = 3

_WHOLE = 1 << 18
"""Up to this many elements, k gradients are kept whole and added in one pass; above, tensor by tensor."""


class Loaded(Protocol):
    """The rows of some shards of one batch, padded."""

    @property
    def x(self) -> Array:
        """(k, b, *sample)."""

    @property
    def y(self) -> Array:
        """(k, b) classes or (k, b, width) numbers."""

    @property
    def rows(self) -> Array:
        """(k, b), 1 for a real row and 0 for padding."""

    @property
    def counts(self) -> Sequence[int]:
        """The real rows of each shard."""


class LossSums(Protocol):
    """A loss over the rows of each shard."""

    @property
    def loss(self) -> npt.NDArray[np.float64]:
        """(k,) sums of losses."""

    @property
    def weight(self) -> npt.NDArray[np.float64]:
        """(k,) what the sums are to be divided by."""

    @property
    def dz(self) -> Array | None:
        """The gradient of the sums with respect to the model's output."""


class Loss(Protocol):
    """A loss and its gradient in one pass, per shard, nothing divided."""

    def __call__(
        self, z: Array, target: Array, rows: Array, workspace: Workspace, key: Any, gradient: bool = True
    ) -> LossSums:
        """The sums over the rows of each shard."""


@dataclass
class Partials:
    """Gradient sums of nodes of the tree.

    Row i of ``vectors`` (m, size), or vector i of a list, and row i of ``tallies`` (m, 3) are those of ``nodes[i]``.
    """

    nodes: Sequence[Node]
    vectors: Array | Sequence[Array]
    tallies: npt.NDArray[np.float64]


class Residuals(NamedTuple):
    """Those of all shards: ``old`` the committed ones, ``new`` what they are after this step, None where that is lost.

    Each is a vector over the parameters.
    """

    old: Sequence[Array]
    new: Sequence[Array] | None


class _Step(NamedTuple):
    """target = left + right, or a copy where right is None.

    Places are rows of the scratch (>= 0) or ~row of the slots.
    """

    target: int
    left: int
    right: int | None


@dataclass
class _Batch:
    """Shards lo to hi computed together, and what is added afterwards. ``direct`` is the slot they are written to."""

    lo: int
    hi: int
    steps: list[_Step] = field(default_factory=list)
    direct: int | None = None


@dataclass
class Schedule:
    """How a worker goes through its range: batches of at most k shards, and the slots their sums need."""

    nodes: list[Node]
    batches: list[_Batch]
    slots: int


def schedule(lo: int, hi: int, shards: int, at_once: int) -> Schedule:
    """The batches and additions that turn shards lo to hi into the maximal subtrees of that range.

    Slot i < len(nodes) ends with the sum of node i; further slots are the binary counter's.
    """
    roots = subtrees(lo, hi, shards)
    plan = Schedule(roots, [], len(roots))
    held: dict[Node, int] = {}
    parents = {node: parent for root in roots for parent, *pair in _all_additions(root) for node in pair}
    for start in range(lo, hi, at_once):
        batch = _Batch(start, min(hi, start + at_once))
        plan.batches.append(batch)
        for part in subtrees(batch.lo, batch.hi, shards):
            node = part
            for add in additions([Node(s, s + 1) for s in range(part.lo, part.hi)], part):
                batch.steps.append(_Step(*(n.lo - batch.lo for n in add)))
            place = node.lo - batch.lo
            while node in parents and node.lo != parents[node].lo:
                left = held.pop(parents[node].children[0])
                batch.steps.append(_Step(left, left, place))
                node, place = parents[node], left
            if place >= 0:
                slot = ~_free(plan, node, held)
                _redirect(batch, part, place, slot)
                place = slot
            held[node] = place
    return plan


def _all_additions(root: Node) -> list[Any]:
    return additions([Node(s, s + 1) for s in range(root.lo, root.hi)], root)


def _free(plan: Schedule, node: Node, held: Mapping[Node, int]) -> int:
    for i, root in enumerate(plan.nodes):
        if root.lo == node.lo:
            return i
    taken = {~place for place in held.values()}
    slot = next(i for i in range(len(plan.nodes), plan.slots + 1) if i not in taken)
    plan.slots = max(plan.slots, slot + 1)
    return slot


def _redirect(batch: _Batch, part: Node, place: int, slot: int) -> None:
    if part.hi - part.lo > 1:
        last = batch.steps.pop()
        batch.steps.append(_Step(slot, last.left, last.right))
    elif batch.hi - batch.lo == 1:
        batch.direct = ~slot
    else:
        batch.steps.append(_Step(slot, place, None))


class _Adder:
    """The sink of one schedule: hands out memory for k gradients and adds them as it says, into ``slots``."""

    def __init__(
        self, layout: Layout, slots: Array, workspace: Workspace, phases: Phases, gradients: Gradients
    ) -> None:
        self.phases = phases
        self.residuals: Residuals | None = None
        self._gradients = gradients
        self._parameters = [entry for entry in layout.entries.values() if entry.momentum is None]
        self._layout = layout
        self._slots = slots
        self._workspace = workspace
        self._views: dict[int, tuple[Array, dict[str, Array]]] = {}
        self._open: dict[str, tuple[int, Array]] = {}
        self._free: list[int] = []
        self._scratch = 0
        self._whole: Array | None = None
        self._final: Callable[[int], None] | None = None
        self._left = 0
        self._done: set[str] = set()

    def begin(self, batch: _Batch, final: Callable[[int], None] | None = None) -> None:
        """Start a batch: every tensor is opened and closed once. See ``accumulate`` for ``final``."""
        self._batch, self._final = batch, final
        self._left, self._done = len(self._parameters), set()
        self._k = batch.hi - batch.lo
        self._whole = None
        if batch.direct is not None or self._k * self._layout.size <= _WHOLE:
            self._whole, self._tensors = self._views_of(batch)

    def _views_of(self, batch: _Batch) -> tuple[Array, dict[str, Array]]:
        """The memory of a batch's gradients and the tensors in it, the same every step."""
        known = self._views.get(batch.lo)
        if batch.direct is not None:
            if known is None:
                whole = self._slots[batch.direct : batch.direct + 1]
                known = self._views[batch.lo] = whole, self._layout.views(whole)
            return known
        whole = self._workspace.array("gradients", (self._k, self._layout.size), self._slots.dtype)
        if known is None or known[0] is not whole:
            known = self._views[batch.lo] = whole, self._layout.views(whole)
        return known

    def open(self, name: str) -> Array:
        """See Sink."""
        if self._whole is not None:
            return self._tensors[name]
        entry = self._layout.entries[name]
        if not self._free:
            self._free.append(self._scratch)
            self._scratch += 1
        # The first of a layer's tensors, its large one, always finds the same memory.
        number = min(self._free)
        self._free.remove(number)
        flat = self._workspace.array(("gradient", number), (self._k, entry.stop - entry.start), self._slots.dtype)
        self._open[name] = number, flat
        return flat.reshape(self._k, *entry.shape)

    def close(self, name: str) -> None:
        """See Sink."""
        if self._whole is None:
            entry = self._layout.entries[name]
            number, flat = self._open.pop(name)
            self.phases.begin(Phase.PARTIALS, name)
            parameters = entry.stop - entry.start if entry.momentum is None else 0
            if parameters:
                self._leaves(flat, entry.start, entry.stop)
            self._add(flat, self._slots[:, entry.start : entry.stop], parameters)
            self._free.append(number)
            self._tell(name)
        elif self._batch.direct is not None:
            entry = self._layout.entries[name]
            if entry.momentum is None:
                self._leaves(self._whole[:, entry.start : entry.stop], entry.start, entry.stop)
            self._tell(name)

    def _tell(self, name: str) -> None:
        """This tensor is done; so may be all after one that were done before."""
        if self._final is None:
            return
        self._done.add(name)
        before = self._left
        while self._left and self._parameters[self._left - 1].name in self._done:
            self._left -= 1
        if self._left < before:
            self._final(self._parameters[self._left].start)

    def end(self, tallies: npt.NDArray[np.float64], into: npt.NDArray[np.float64]) -> None:
        """Finish a batch with its tallies, (k, 3), added into those of the slots alike."""
        if self._whole is not None:
            if self._gradients.leaves and self._batch.direct is None:
                for entry in self._parameters:
                    self._leaves(self._whole[:, entry.start : entry.stop], entry.start, entry.stop)
            self._add(self._whole, self._slots, self._layout.parameters)
        if self._batch.direct is not None:
            into[self._batch.direct] = tallies[0]
        self._add(tallies, into, 0)

    def _leaves(self, some: Array, start: int, stop: int) -> None:
        """Make of a tensor's gradients, (k, stop - start), what is added."""
        gradients, kept = self._gradients, self.residuals
        if not gradients.leaves:
            return
        for shard, tensor in enumerate(some, self._batch.lo):
            if kept is None:
                gradients.leaf(tensor, None, None)
            else:
                new = None if kept.new is None else kept.new[shard][start:stop]
                gradients.leaf(tensor, kept.old[shard][start:stop], new)

    def _add(self, scratch: Array, slots: Array, parameters: int) -> None:
        """``parameters`` of the elements are parameters' gradients."""
        rounds = self._gradients.rounds and parameters > 0
        for target, left, right in self._batch.steps:
            into = scratch[target] if target >= 0 else slots[~target]
            a = scratch[left] if left >= 0 else slots[~left]
            if right is None:
                np.copyto(into, a)
            else:
                np.add(a, scratch[right] if right >= 0 else slots[~right], out=into)
                if rounds:
                    self._gradients.round(into[:parameters])


class Accumulator:
    """One worker's forward and backward over its shards. Give it an outbox, get partials.

    The outbox is (slots, layout.size) with at least ``schedule(...).slots`` rows; its first rows hold the partials.
    ``phases`` is told where the time goes. ``gradients`` is what becomes of each gradient and each sum.
    """

    def __init__(
        self,
        model: Model,
        loss: Loss,
        *,
        seed: int,
        shards: int,
        at_once: int,
        gradients: Gradients | None = None,
    ) -> None:
        self.model = model
        self.loss = loss
        self.seed = seed
        self.shards = shards
        self.at_once = at_once
        self.gradients = gradients or Gradients()
        self.workspace = Workspace()
        self.phases = Phases()
        self.shards_computed = 0
        self._known: list[tuple[Array, Mapping[str, Array]]] = []
        self._adder: tuple[Schedule, Array, _Adder] | None = None

    @property
    def gradient_elements(self) -> int:
        """About how many numbers of gradient each of the shards taken at once holds before they are added."""
        sizes = (entry.stop - entry.start for entry in self.model.layout.entries.values())
        return max(sizes, default=0)

    def nothing_kept(self) -> Residuals | None:
        """Residuals of zeros, as before the first step, for who does not go on from what comes of them."""
        if not self.gradients.feeds_back:
            return None
        return Residuals([np.zeros(self.model.layout.parameters, self.model.dtype)] * self.shards, None)

    def schedule(self, lo: int, hi: int) -> Schedule:
        """How shards lo to hi will be gone through."""
        return schedule(lo, hi, self.shards, self.at_once)

    def accumulate(
        self,
        weights: Array,
        plan: Schedule,
        outbox: Array,
        step: int,
        load: Callable[[int, int], Loaded],
        residuals: Residuals | None = None,
        final: Callable[[int], None] | None = None,
    ) -> Partials:
        """The partials of the plan's shards at this step; ``load(lo, hi)`` gives the rows of shards lo to hi.

        ``residuals`` are those of all shards, None where they keep none; see ``nothing_kept``. ``final`` is told,
        before the end, from which parameter on nothing more is written to the partials' parameters.
        """
        if self.gradients.feeds_back and residuals is None:
            raise ValueError("shards keep residuals, and there is no place for them")
        tallies = np.zeros((max(1, plan.slots), TALLIES))
        tensors = self._tensors(weights)
        sink = self._sink(plan, outbox)
        sink.residuals = residuals
        for batch in plan.batches:
            self.phases.begin(Phase.DATA)
            rows = load(batch.lo, batch.hi)
            sink.begin(batch, final if batch is plan.batches[-1] else None)
            found = self.backward(tensors, rows, range(batch.lo, batch.hi), step, sink)
            self.phases.begin(Phase.PARTIALS)
            sink.end(found, tallies)
        m = len(plan.nodes)
        return Partials(plan.nodes, outbox[:m], tallies[:m])

    def _tensors(self, weights: Array) -> Mapping[str, Array]:
        """The tensors of a vector; those of the two sides of the state are made once."""
        for vector, tensors in self._known:
            if vector is weights:
                return tensors
        tensors = self.model.layout.views(weights)
        self._known = [*self._known[-1:], (weights, tensors)]
        return tensors

    def _sink(self, plan: Schedule, outbox: Array) -> _Adder:
        """The sink of a schedule, made once."""
        if self._adder is None or self._adder[0] is not plan or self._adder[1] is not outbox:
            self._adder = plan, outbox, _Adder(self.model.layout, outbox, self.workspace, self.phases, self.gradients)
        self._adder[2].phases = self.phases
        return self._adder[2]

    def backward(
        self, tensors: Mapping[str, Array], rows: Loaded, shards: range, step: int, sink: Any
    ) -> npt.NDArray[np.float64]:
        """Forward and backward of some shards into a sink; returns their tallies, (k, 3)."""
        run = Pass(
            training=True,
            seed=self.seed,
            step=step,
            shards=shards,
            rows=rows.rows,
            counts=rows.counts,
            workspace=self.workspace,
            phases=self.phases,
        )
        self.phases.begin(Phase.FORWARD)
        z, back = self.model.forward(tensors, rows.x, run)
        self.phases.begin(Phase.FORWARD, "loss")
        sums = self.loss(z, rows.y, rows.rows, self.workspace, "loss")
        assert sums.dz is not None
        self.phases.begin(Phase.BACKWARD)
        back(sums.dz, sink)
        self.shards_computed += len(shards)
        tallies = np.empty((len(shards), TALLIES))
        tallies[:, WEIGHT] = sums.weight
        tallies[:, LOSS] = sums.loss
        tallies[:, ROWS] = rows.counts
        return tallies
