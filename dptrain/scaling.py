"""What a job will take on more machines than there are: a step as the exchange goes through it, simulated.

Everything of a step that this machine can tell is measured on it: forward and backward of a worker's shards, when in
backward each gradient is final, additions, updates. What goes where, and in how many messages, is the exchange's own
(``exchange.segments``, ``exchange.traffic``): the same ranges, carriers, pieces and roots of the tree. Links carry one
message at a time each way, in the order in which messages are ready; machines are alike, and nothing else uses them.
"""

import heapq
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from dptrain import arithmetic
from dptrain.assemble import Assembly, assemble
from dptrain.data.prepare import prepare
from dptrain.errors import UsageError
from dptrain.exchange.mpi import FEW, OVER_TCP
from dptrain.exchange.segments import Machines
from dptrain.exchange.traffic import LOOK, piece_length
from dptrain.job.spec import Job
from dptrain.layout import BLOCK, segments
from dptrain.membership import Membership
from dptrain.moving import Busy, Cores
from dptrain.packing import RAW, SPARSE, encoding_of
from dptrain.plan import Measured, measured, plan
from dptrain.state import stretches
from dptrain.tree import Node, merged

GOODPUT = 0.95
"""Of a link's rate, what TCP has for its payload in Ethernet's frames of 1,500 bytes."""

MESSAGE = 25e-6
"""Seconds that a worker needs to send a message, or to take one in, beside its bytes."""

ALIKE = 1.01
"""Steps that take less than so many times another are told apart by what a machine sends."""

NOTE = 5e-6
"""Seconds for one of the few hundred bytes of a verdict."""

QUEUED = 2 * int(OVER_TCP["OMPI_MCA_btl_tcp_sndbuf"])
"""Bytes that wait in the kernel, which doubles what it is told, before whatever is sent next."""

RESTART = 10.0
"""Seconds from the loss of a machine to training again: to notice, to ask who is there, to start."""


@dataclass(frozen=True)
class Link:
    """Of each machine: bits a second each way, and seconds from one machine to another."""

    rate: float
    latency: float

    def seconds(self, nbytes: float) -> float:
        """How long a message takes the link."""
        return 8 * nbytes / (GOODPUT * self.rate)


@dataclass(frozen=True)
class Size:
    """So many machines of so many workers; ``shards`` of ``rows`` rows each."""

    machines: int
    workers: int
    shards: int
    rows: int

    @property
    def size(self) -> int:
        """All workers."""
        return self.machines * self.workers

    @cached_property
    def own(self) -> int:
        """The shards of the worker that has most."""
        return -(-self.shards // self.size)


@dataclass(frozen=True)
class Step:
    """A simulated step, in seconds, and the bytes that the busiest machine sends."""

    seconds: float
    sent: float


@dataclass(frozen=True)
class Point:
    """What is predicted for a size: the best of some numbers of coordinators.

    ``efficiency`` is samples a second, of as many times one machine's; ``lost`` the share of time that failures cost.
    """

    size: Size
    batch: int
    coordinators: int
    step: float
    compute: float
    samples_per_second: float
    efficiency: float
    sent: float
    memory: int
    lost: float


@dataclass(frozen=True)
class Vector:
    """What is exchanged: ``elements`` of ``item`` bytes, but for the first ``parameters``, of ``narrow`` bytes each."""

    elements: int
    parameters: int
    item: int
    narrow: int

    def pieces(self, coordinators: int) -> Iterator[tuple[int, int, int]]:
        """(owner, start, stop), from the end to the beginning, which is backward's order."""
        cuts = list(enumerate(segments(self.elements, coordinators)))
        for owner, (lo, hi) in reversed(cuts):
            for start, stop in reversed(stretches(lo, hi, self.parameters, piece_length(hi - lo))):
                yield owner, start, stop

    def nbytes(self, start: int, stop: int) -> int:
        """Of a piece."""
        return (stop - start) * (self.narrow if start < self.parameters else self.item)


def simulate(
    size: Size, vector: Vector, link: Link, own: Measured, coordinators: int, cores: Cores | None = None
) -> Step:
    """A step of the exchange with so many coordinators, the first workers. Without ``cores`` bytes cost nothing."""
    cores = cores or Cores()
    own = _slowed(own, cores.turns(size.workers))
    at_work = Busy(size.machines, size.workers, cores, own.compute)
    membership = Membership(0, size.size, size.shards)
    groups = tuple(tuple(range(m * size.workers, (m + 1) * size.workers)) for m in range(size.machines))
    machines, goal = Machines(groups, 0), Node(0, size.shards)
    packed = own.pack if vector.narrow < vector.item else 0.0
    roots, adds = [], []
    for group in groups:
        have = [node for rank in group for node in membership.nodes[rank]]
        left, plan_ = merged(have, goal)
        roots.append(len(left))
        adds.append(len(plan_))
    # Of the whole tree what machines have not added themselves, each of its segment.
    last = sum(roots) - 1
    out, into = [0.0] * size.machines, [0.0] * size.machines
    busy: dict[int, float] = {}
    sent = [0.0] * size.machines
    # (ready, turn, order, from, to, piece): what is ready at once leaves in turns that meet no machine all at a time.
    events: list[tuple[float, int, int, int, int, int]] = []
    pieces = list(vector.pieces(coordinators))
    # Of its segment's.
    nth = [sum(owner == other for other, _, _ in pieces[:i]) for i, (owner, _, _) in enumerate(pieces)]
    awaited = [0] * len(pieces)
    here = [0.0] * len(pieces)
    order = 0
    for number, (owner, start, stop) in enumerate(pieces):
        home = owner // size.workers
        ready = _ready(own, vector, start)
        for machine in range(size.machines):
            of_element = adds[machine] * own.add + (packed / 2 * roots[machine] if machine != home else 0.0)
            added = at_work.compute(machine, ready, of_element * (stop - start))
            if machine == home:
                here[number] = max(here[number], added)
            elif roots[machine]:
                awaited[number] += 1
                turn = nth[number] * size.machines + (home - machine) % size.machines
                heapq.heappush(events, (added, turn, order, machine, home, number))
                order += 1
    told = own.compute + _meeting(size, link) + link.seconds(QUEUED if size.machines > 1 else 0)
    sums: list[tuple[float, int, int]] = []

    def finished(number: int) -> None:
        nonlocal order
        owner, start, stop = pieces[number]
        home, many = owner // size.workers, size.machines > 1
        adding = (last * own.add + packed / 2) * (stop - start) * many
        at = busy[owner] = at_work.compute(home, max(here[number], busy.get(owner, 0.0)), adding)
        sums.append((at, owner, stop - start))
        for machine in range(size.machines):
            if machine != home:
                turn = nth[number] * size.machines + (machine - home) % size.machines
                heapq.heappush(events, (at, turn, order, home, machine, number))
                order += 1

    for number, count in enumerate(awaited):
        if not count:
            finished(number)
    while events:
        ready, _, _, source, target, number = heapq.heappop(events)
        owner, start, stop = pieces[number]
        home = owner // size.workers
        count = 1 if source == home else roots[source]
        nbytes = vector.nbytes(start, stop) * count
        begun = max(ready + MESSAGE, out[source])
        taken = begun + link.seconds(nbytes)
        out[source] = taken = max(taken, at_work.move(source, begun, nbytes))
        sent[source] += nbytes
        come = max(taken + link.latency, into[target] + link.seconds(nbytes))
        into[target] = come = max(come, at_work.move(target, begun + link.latency, nbytes))
        come = at_work.compute(target, come, MESSAGE + packed / 2 * (stop - start) * count)
        if target == home:
            here[number] = max(here[number], come)
            awaited[number] -= 1
            if not awaited[number]:
                finished(number)
        else:
            carrier = machines.carrier(target, owner)
            sums.append((come, carrier, stop - start))
    free: dict[int, float] = {}
    for come, worker, elements in sorted(sums):
        begun = max(come, told, free.get(worker, 0.0))
        free[worker] = at_work.compute(worker // size.workers, begun, elements * own.update)
    return Step(max(free.values()) + _meeting(size, link), max(sent))


def _ready(own: Measured, vector: Vector, start: int) -> float:
    """When in a step the partials from ``start`` on are final."""
    if start >= vector.parameters:
        return own.compute
    return min((at + LOOK / 2 for lowest, at in own.final if lowest <= start), default=own.compute)


def _meeting(size: Size, link: Link) -> float:
    """How long it takes until all know what all have to say."""
    if size.size == 1:
        return 0.0
    hops = 1 if size.size <= FEW else math.ceil(math.log2(size.size))
    notes = size.size - 1 if size.size <= FEW else 2 * hops
    return hops * (link.latency if size.machines > 1 else 0.0) + notes * NOTE


def sizes(job: Job, shards: int, machines: Sequence[int], workers: int, rows: int) -> list[Size]:
    """What the job is on so many machines: its batch, or with ``rows`` a batch of so many rows for each worker.

    There are the job's shards where they can be shared equally, else one for each worker.
    """
    found = []
    for count in machines:
        size = count * workers
        several = max(shards, size) if max(shards, size) % size == 0 else size
        batch = rows * size or job.train.batch_size
        if batch < several:
            raise UsageError(
                f"{count} machines of {workers} workers",
                expected="a row for each shard",
                found=f"{several} shards of a batch of {batch} rows",
                cure="raise train.batch_size, or say --rows N, for a batch that grows by N rows with each worker",
            )
        found.append(Size(count, workers, several, -(-batch // several)))
    return found


def predict(
    job: Job,
    machines: Sequence[int],
    *,
    workers: int,
    link: Link,
    rows: int = 0,
    hours: float,
    cores: Cores | None = None,
) -> Iterator[Point]:
    """One point for each number of machines. Raises DptrainError as training would.

    ``hours``: between two failures of one machine. ``cores``: see ``simulate``.
    """
    cores = cores or Cores()
    with _assembled(job) as (a, vector):
        known: dict[tuple[int, int], Measured] = {}
        memory = plan(job, workers=1).memory_total

        def own_of(size: Size) -> Measured:
            key = (size.own, size.rows)
            if key not in known:
                known[key] = measured(a, *key)
            return known[key]

        (single,) = sizes(job, a.shards, [1], workers, rows)
        alone = simulate(single, vector, link, own_of(single), workers, cores).seconds
        reference = _samples(single, job, rows) / alone
        for size in sizes(job, a.shards, machines, workers, rows):
            own = own_of(size)
            steps = {count: simulate(size, vector, link, own, count, cores) for count in _candidates(size, vector)}
            best = best_of(steps)
            seconds = steps[best].seconds
            rate = _samples(size, job, rows) / seconds
            lost = size.machines / (3600 * hours) * (RESTART + job.output.checkpoint_seconds / 2)
            foreign = (size.machines - 1) * -(-vector.elements // best) * vector.item
            yield Point(
                size=size,
                batch=_samples(size, job, rows),
                coordinators=best,
                step=seconds,
                compute=own.compute * cores.turns(workers),
                samples_per_second=rate,
                efficiency=rate / reference / size.machines,
                sent=steps[best].sent,
                memory=memory + foreign + (vector.elements * vector.item if size.size > 1 else 0),
                lost=min(1.0, lost),
            )


@contextmanager
def _assembled(job: Job) -> Iterator[tuple[Assembly, Vector]]:
    prepared = prepare(job.data, directory=Path(job.directory), seed=job.seed, cache=None)
    with arithmetic.limited(job.arithmetic.threads):
        a = assemble(job, prepared)
        layout, item = a.model.layout, a.dtype.itemsize
        narrow = item if encoding_of(a.gradients().name) in (RAW, SPARSE) else 2
        yield a, Vector(layout.size, layout.parameters, item, narrow)


def cost_of_a_byte(job: Job, machines: int, *, link: Link, count: float, seconds: float) -> float:
    """Cores.byte, from a step that took so long on so many machines of ``count`` cores and one worker each.

    It should be one that waits for cores rather than for links; else the answer is too small.
    """
    with _assembled(job) as (a, vector):
        (size,) = sizes(job, a.shards, [machines], 1, 0)
        return byte_of(seconds, size, vector, link, measured(a, size.own, size.rows), count)


def byte_of(seconds: float, size: Size, vector: Vector, link: Link, own: Measured, count: float) -> float:
    """Cores.byte with which a simulated step takes so long, if any does; up to 100 ns."""
    low, high = 0.0, 1e-7
    while high - low > 1e-12:
        middle = (low + high) / 2
        longer = simulate(size, vector, link, own, size.size, Cores(count, middle)).seconds > seconds
        low, high = (low, middle) if longer else (middle, high)
    return low


def _slowed(own: Measured, times: float) -> Measured:
    """Workers that have to take turns with their shards."""
    final = tuple((lowest, at * times) for lowest, at in own.final)
    return replace(own, compute=own.compute * times, final=final)


def best_of(steps: Mapping[int, Step]) -> int:
    """The number of coordinators, of those whose steps are the quickest or as quick, with which machines send least."""
    quickest = min(step.seconds for step in steps.values())
    alike = [count for count, step in steps.items() if step.seconds < ALIKE * quickest]
    return min(alike, key=lambda count: steps[count].sent)


def _samples(size: Size, job: Job, rows: int) -> int:
    return rows * size.size or job.train.batch_size


def _candidates(size: Size, vector: Vector) -> list[int]:
    """Numbers of coordinators that are tried: powers of four, and all."""
    most = min(size.size, -(-vector.elements // BLOCK))
    return sorted({*(4**i for i in range(6) if 4**i <= most), most})
