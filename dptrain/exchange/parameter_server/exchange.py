"""The servers' way from partials to the next state: the partials are those of workers elsewhere.

To the loop it is the exchange of workers that own no shards. ``swap`` leases the step's shards out, at the chief, to
whoever takes part, gives those of who is gone to others, and goes on as solo does as soon as all are in.

Of several servers each takes in its segment of all partials, finishes its sum, hands that to the others and the new
weights of its segment to the workers. All apply all sums, so that each holds the whole state and any may die; those
beyond the number of segments have none and stand by.
"""

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from dptrain.arrivals import arrival
from dptrain.errors import (
    DeadlineError,
    DisagreementError,
    PeerFailed,
    PoisonError,
    ResidualsLost,
    WorkerLost,
    exit_code,
)
from dptrain.exchange.communicator import Message
from dptrain.exchange.parameter_server import leases, lending
from dptrain.exchange.parameter_server.codec import Written
from dptrain.exchange.parameter_server.hub import Member, Part
from dptrain.exchange.parameter_server.intake import Box, Intake
from dptrain.exchange.parameter_server.leases import Grant, Lease, Range
from dptrain.exchange.parameter_server.outlet import Outlet
from dptrain.exchange.parameter_server.residuals import Age, Ledger, parts
from dptrain.exchange.parameter_server.servers import Chief
from dptrain.exchange.protocol import Exchange
from dptrain.exchange.segments import in_place
from dptrain.exchange.verdict import Ballot, Report, Verdict, summed
from dptrain.layout import BLOCK, Array, segments
from dptrain.membership import Led, Membership
from dptrain.nn.accumulate import TALLIES, Partials
from dptrain.packing import encoding_of
from dptrain.phases import Phase
from dptrain.state import Segment, State, Store, Update
from dptrain.tree import Node, additions, subtrees
from dptrain.v1 import parameter_server_pb2 as pb

Memory = tuple[int, int]
"""A member, and which of the places for its partials."""

LOOK = 0.5
"""Seconds between looks at the clock while nothing comes."""

LATE = 256
"""Leases that another's answer overtook, of which what still comes is compared; older ones are forgotten."""

_PREPARED = 32
"""Sums over different leases that are kept prepared."""


class ParameterServer(Exchange):
    """``lease_seconds`` without a sign of life end a lease; ``backup_workers`` shards of a step are computed twice.

    ``membership`` is a coordinating one: this process has no shards of its own. ``servers`` of the communicator's have
    a segment each, as long as there are so many.
    """

    name = "ps"
    hands_out = False
    """Whether weights go to a worker with what it is to do with them, or to all as soon as there are new ones."""

    def __init__(
        self,
        communicator: Chief,
        membership: Membership,
        update: Update,
        dtype: npt.DTypeLike,
        *,
        lease_seconds: float,
        deadline: float,
        backup_workers: int = 0,
        servers: int = 1,
    ) -> None:
        super().__init__(communicator, membership, update)
        self.hub, self._servers = communicator.hub, communicator
        self.lease_seconds, self.deadline, self.backup_workers = lease_seconds, deadline, backup_workers
        size = update.layout.size
        self.outbox = np.zeros((1, size), dtype)
        kept = membership.shards if update.gradients.feeds_back else 0
        slots = len(update.optimizer.slots)
        vectors, self._lent = lending.rows(2, size, dtype)
        self.store = Store(update.layout, slots, dtype, kept, elsewhere=True, vectors=vectors)
        self._ledger = Ledger(self.store.residuals(0)) if kept else None
        self.hub.residuals = self._ledger
        self._begun = False
        self._patience = 0.0
        """Until then those that come back to another chief may have residuals that nobody else has."""
        self._wanted_segments = servers
        self._goal = Node(0, membership.shards)
        self._question: tuple[Array | None, str] = (None, "")
        self._suspects: dict[int, list[int]] = {}
        self._suspected_at = -1, ""
        self._boxes: dict[int, tuple[Memory, Box]] = {}
        self._sums: Array = np.zeros(size if membership.size > 1 else 0, dtype)
        """Of the others' segments."""
        self._cut()

    def _cut(self) -> None:
        """Give each of the present servers its segment, if it is to have one."""
        update, membership = self.update, self.membership
        size, dtype = update.layout.size, self.outbox.dtype
        count = min(self._wanted_segments, membership.size)
        self._segments = segments(size, count) + [(size, size)] * (membership.size - count)
        self._count = count
        lo, hi = self._segments[membership.rank]
        written = Written(encoding_of(update.gradients.name), update.layout.parameters)
        self.intake = Intake(membership.rank, lo, hi, dtype, written)
        self._prepared: dict[tuple[tuple[int, int, int, int], ...], tuple[Segment, Array]] = {}
        self._late: dict[int, tuple[Lease, int, int]] = {}
        """Leases that another's answer overtook: the other's, its step, and the member that is late."""
        self._published: tuple[int, int] | None = None
        self._own: Segment | None = None
        self._total: Array = self.outbox[0]
        if lo == hi:
            # There is nothing that anybody would send here.
            self._total = self.outbox[0, :0]
            self._own = update.segment(self.store, lo, hi, self._total)
        self._chosen: list[tuple[int, int, int]] | None = None
        self._ended: list[int] | None = None
        """The leases that are over with this step; None: all."""
        self._followed = {
            rank: update.segment(self.store, start, stop, self._sums[start:stop])
            for rank, (start, stop) in enumerate(self._segments)
            if rank != membership.rank and start < stop
        }

    @property
    def ballot(self) -> Ballot:
        """That of workers of which the chief had all shards."""
        if self._ballot is None:
            led = Led(self.membership.rank, self.membership.size, self.membership.shards)
            self._ballot = Ballot(led, self.squares_of_workers(), self.update.clip_norm)
        return self._ballot

    def admit(self, identity: Mapping[str, str]) -> None:
        """See Exchange."""
        self._identity = identity
        self._admit()

    def _admit(self) -> None:
        job = int(self._identity["job"].removeprefix("sha256:")[:16], 16)
        rank, servers = self.membership.rank, self._servers
        lo, hi = self._segments[rank]
        # Who gets one version alone may come for it when its memory is another's.
        lent = None if self.hands_out else self._lent
        self.outlet = Outlet(job, rank, lo, hi, asked=self.hands_out, lent=lent)
        part = Part(
            identity=self._identity,
            job=job,
            shards=self.membership.shards,
            intake=self.intake,
            outlet=self.outlet,
            rank=rank,
            servers=tuple(servers.members),
            segments=self._count,
            owners=frozenset(rank for rank, (lo, hi) in enumerate(self._segments) if lo < hi),
            era=servers.era,
            lent=lent,
            tell=servers.notify,
        )
        self.hub.admit(part)

    @property
    def leads(self) -> bool:
        """Whether this is the chief, who meets the workers."""
        return self.membership.rank == 0

    def lead(self, membership: Membership) -> None:
        """Go on with the servers that are left."""
        self.membership, self._ballot = membership, None
        self._patience = time.monotonic() + self.lease_seconds
        if self._ledger is not None:
            with self.hub.changed:
                self._ledger.renew()
        self._cut()
        self._admit()

    @property
    def suspects(self) -> range:
        """All: the chief has the data, and looks itself."""
        return range(self.membership.shards)

    def squares_of_workers(self) -> Sequence[int]:
        """The blocks of each server's segment."""
        return [-(-(hi - lo) // BLOCK) for lo, hi in self._segments]

    def collect(self, partials: Partials) -> None:
        """All partials are here; the other servers get the sum of this one's segment, and this one theirs."""
        if self.membership.size == 1:
            return
        assert self._own is not None
        self._own.add()
        rank = self.membership.rank
        mine = [] if not len(self._total) else [Message(r, self._total, 0) for r in range(self.membership.size)]
        theirs = [Message(r, self._sums[slice(*self._segments[r])], 0) for r in self._followed]
        self._servers.post([message for message in mine if message.peer != rank], theirs, "sums").wait()

    def squares(self) -> npt.NDArray[np.float64]:
        """Finish the tree for this server's segment."""
        assert self._own is not None
        if self.membership.size == 1:
            self._own.add()
        return self._own.squares()

    def advance(self, state: State, verdict: Verdict) -> bool:
        """Update everything."""
        assert self._own is not None
        add = not self.update.clip_norm and self.membership.size == 1
        scale, rows, share = verdict.scale, verdict.rows, verdict.share
        good = self._own.advance(state, scale=scale, rows=rows, add=add, share=share)
        for other in self._followed.values():
            good = other.advance(state, scale=scale, rows=rows, add=False, share=share) and good
        return good

    def begin(self, step: int, total: int, pending: Sequence[int]) -> bool:
        """See Exchange."""
        if self._begun:
            self._retract()
        with self.hub.changed:
            if self._ledger is not None:
                self._ledger.begin()
            for number in list(self.hub.members) if self._begun else ():
                # It has newer weights than there are from now on, and a task that counts no more.
                self.hub.lose(number, "left")
            self._begun = True
        return super().begin(step, total, pending)

    def swap(self, state: State, partials: Partials, report: Report) -> tuple[State, Verdict]:
        """See Exchange; ``partials`` are none."""
        try:
            return self._swap(state, partials, report)
        except ResidualsLost:
            self._retract()
            raise

    def _swap(self, state: State, partials: Partials, report: Report) -> tuple[State, Verdict]:
        failure: BaseException | None = None
        tallies = np.zeros((1, TALLIES))
        if self._ledger is not None:
            with self.hub.changed:
                self._ledger.at(Age(state.step, state.updates))
        self._computed_by: list[Lease] = []
        self._publish(state)
        self._chosen = None
        if self.leads and not report.failure:
            try:
                if self._ledger is not None:
                    self._see_off()
                tallies = self._computed(state)
            except BaseException as error:  # the other servers must not be left waiting
                if self._servers.disturbed and isinstance(error, WorkerLost):
                    raise _disturbed() from None
                failure, report = error, report._replace(failure=exit_code(error))
        nodes = [self._goal] if self.leads else []
        try:
            if self.membership.size > 1:
                self._choose()
            after, verdict = super().swap(state, Partials(nodes, self.outbox, tallies[: len(nodes)]), report)
        except (PeerFailed, WorkerLost) as error:
            if isinstance(failure, ResidualsLost):
                # Where another server is gone too, all hear of this when they meet.
                raise failure from None
            if failure is not None:
                self.communicator.agreed = True
                raise failure from None
            if isinstance(error, PeerFailed) and error.exit_code == ResidualsLost.exit_code:
                raise _lost() from None
            raise
        if self._ledger is not None and verdict.finite:
            with self.hub.changed:
                self._ledger.committed(Age(after.step, after.updates), self._computed_by)
        self._publish(after)
        with self.hub.changed:
            workers = self.hub.present()
        return after, verdict._replace(workers=workers)

    def _choose(self) -> None:
        """Have all servers add up the same leases: those that the chief has chosen."""
        self.phases.begin(Phase.WAITING, "partials")
        started = time.perf_counter()
        said = [self._chosen, self._ended, self.arrival]
        chosen, ended, arrived = self._servers.broadcast_json(said, "partials")
        self.waited += time.perf_counter() - started
        self.arrival = arrival(arrived)
        if self.leads or chosen is None or not len(self._total):
            return
        boxes = [((member, count), self.intake.box(lease)) for lease, member, count in chosen]
        if ended is None:
            self.hub.chosen()
        else:
            self.hub.over(ended)
        self._add_up(boxes)

    def judging(self, weights: Array, part: str, state: State) -> None:
        """See Exchange."""
        best = weights is not state.weights
        if best:
            self.outlet.publish(weights, state.step, best=True)
            self._published = None
        else:
            self._publish(state)
        self._question = (weights if best else None), part

    def gather(
        self, rows: npt.NDArray[np.float64], total: int, report: Report, step: int, phase: str
    ) -> npt.NDArray[np.float64]:
        """All rows, from the workers; ``rows`` are none."""
        found, failure = np.zeros((total, rows.shape[1])), None
        if self.leads:
            try:
                found = self._evaluated(rows, total, step, phase)
            except BaseException as error:  # as above
                if self._servers.disturbed and isinstance(error, WorkerLost):
                    raise
                failure = error
        if self.membership.size > 1:
            codes = self.communicator.allgather(np.array([float(exit_code(failure) if failure else 0)]), phase)
            if failure is None and codes.any():
                raise PeerFailed(0, step, phase, int(codes.max()))
        if failure is not None:
            self.communicator.agreed = True
            raise failure
        self.communicator.broadcast(found, phase)
        return found

    def _evaluated(self, rows: npt.NDArray[np.float64], total: int, step: int, phase: str) -> npt.NDArray[np.float64]:
        best, part = self._question
        width = rows.shape[1]
        hub = self.hub

        def ask(grants: Sequence[Grant]) -> None:
            for some, member in grants:
                again = self._lost_before((step, part), some)
                lease = hub.lease(member, some.lo, some.hi, again=again)
                some.leases.append(lease)
                question = pb.Evaluate(
                    lease=lease.number,
                    step=step,
                    part=part,
                    lo=some.lo,
                    hi=some.hi,
                    best=best is not None,
                    again=again,
                )
                hub.send(member, evaluate=question)

        def fits(some: Range, found: npt.NDArray[np.float64]) -> bool:
            return bool(found.size == (some.hi - some.lo) * width)

        self.phases.begin(Phase.WAITING, phase)
        done = self._answered((step, part), total, ask, fits, 0)
        self.phases.begin(Phase.EVALUATION)
        parts = []
        for some in done:
            assert some.answer is not None
            parts.append(self._rows[some.answer.number].reshape(-1, width))
        return np.concatenate(parts) if parts else rows

    def complete(self, state: State) -> bool:
        """See Exchange."""
        if self._ledger is None:
            return True
        self.phases.begin(Phase.WAITING, "residuals")
        try:
            with self.hub.changed:
                self._ledger.at(Age(state.step, state.updates))
                self._bring(self._ledger, range(self.membership.shards))
        except WorkerLost:
            # Of which all are told with the next step.
            return False
        finally:
            self.phases.begin(Phase.OTHER)
        return True

    def complete_for_all(self, state: State) -> None:
        """See Exchange."""
        if self._ledger is None:
            return
        found = self.complete(state) if self.leads else None
        if self._servers.disturbed:
            self._look_up()
        if not self._servers.broadcast_json(found, "residuals"):
            self._retract()
            raise _lost()

    def _retract(self) -> None:
        """The run goes back: what is under way counts no more, nor do the weights that were handed out."""
        self.outlet.retract()
        self._published = None
        self.hub.chosen()
        if self._ledger is not None:
            with self.hub.changed:
                self._ledger.ask_no_more()

    def _see_off(self) -> None:
        """Let those go that want to, once what only they have is here. Raises ResidualsLost."""
        hub, ledger = self.hub, self._ledger
        assert ledger is not None
        with hub.changed:
            leaving = [number for number, member in hub.members.items() if member.leaves]
            if not leaving:
                return
            if ledger.age is not None and ledger.age.updates:
                claims = hub.claims()
                theirs = [
                    shard for shard in range(self.membership.shards) if {*ledger.holders(shard, claims)} <= {*leaving}
                ]
                self._bring(ledger, theirs)
            for number in leaving:
                hub.lose(number, "left")

    def _handed_over(self, ledger: Ledger, grants: Sequence[Grant]) -> list[Grant]:
        """The grants to members that are there still, once those have the residuals of their shards.

        To be called with the lock held. Raises ResidualsLost.
        """
        hub = self.hub
        lacking = [
            (shard, member)
            for some, member in grants
            for shard in range(some.lo, some.hi)
            if ledger.lacks(shard, member, hub.claims())
        ]
        self._bring(ledger, [shard for shard, _ in lacking])
        for shard, member in lacking:
            if member in hub.members:
                for part in parts(ledger.rows[shard], shard, ledger.age or Age(0, 0)):
                    hub.send(member, residual=part)
        there = [grant for grant in grants if grant.member in hub.members]
        for some, member in there:
            for shard in range(some.lo, some.hi):
                ledger.granted(shard, member, hub.members[member].claims)
        return there

    def _bring(self, ledger: Ledger, shards: Sequence[int]) -> None:
        """Have the residuals of these shards here; to be called with the lock held. Raises ResidualsLost."""
        hub = self.hub
        until = time.monotonic() + self.deadline
        assert ledger.age is not None
        if not ledger.age.updates:
            for shard in shards:
                ledger.rows[shard].fill(0)
            return
        while missing := [shard for shard in shards if not ledger.here(shard)]:
            self._look_up()
            now, heard, claims = time.monotonic(), hub.heard(), hub.claims()
            asked = set()
            for shard in missing:
                holders = ledger.holders(shard, claims)
                if holders:
                    asked.add(holders[0])
                    question = ledger.ask(shard, holders[0])
                    if question is not None:
                        hub.send(holders[0], give=question)
                elif now > self._patience:
                    raise _lost()
            for member in asked:
                if now - heard[member] > self.lease_seconds:
                    hub.lose(member, f"said nothing for {self.lease_seconds:g} s")
            if now > until:
                raise DeadlineError(
                    f"the parameter server at step {hub.step}",
                    expected=f"the residuals of all shards within {self.deadline:g} s",
                    found="some missing",
                    cure="see what the workers do, or raise exchange.deadline",
                )
            hub.changed.wait(LOOK)

    def others(self) -> list[dict[str, Any]]:
        """See Exchange."""
        with self.hub.changed:
            return [
                {
                    "rank": member.number,
                    "host": member.host,
                    "joined_at": member.joined,
                    "shards_computed": member.shards_computed,
                    "compute_seconds": round(member.compute_seconds, 4),
                    "wait_seconds": round(member.wait_seconds, 4),
                    "peak_memory_bytes": member.peak_memory_bytes,
                    **_processes(member),
                }
                for member in self.hub.all
            ]

    def _publish(self, state: State) -> None:
        """Hand out a state's weights, once."""
        if self._published != (state.step, state.updates):
            self._published = state.step, state.updates
            self.outlet.publish(state.weights, state.step)

    def _computed(self, state: State) -> npt.NDArray[np.float64]:
        """The tallies of the whole step; all partials are here, and their sum is prepared."""
        hub, shards = self.hub, self.membership.shards
        boxes = self._boxes = {}
        counts: dict[int, int] = {}

        def ask(grants: Sequence[Grant]) -> None:
            if self._ledger is not None:
                grants = self._handed_over(self._ledger, grants)
            for some, member in grants:
                count = counts[member] = counts.get(member, 0) + 1
                again = self._lost_before((state.step, ""), some)
                lease = hub.lease(member, some.lo, some.hi, count=count, again=again)
                some.leases.append(lease)
                nodes = subtrees(some.lo, some.hi, shards)
                boxes[lease.number] = (member, count), self.intake.expect(lease.number, member, count, nodes)
                task = pb.Compute(lease=lease.number, step=state.step, lo=some.lo, hi=some.hi, again=again)
                if self._ledger is not None and self._ledger.age is not None:
                    task.residuals.CopyFrom(self._ledger.age.said)
                hub.send(member, compute=task)

        def fits(some: Range, found: npt.NDArray[np.float64]) -> bool:
            return len(found) == len(subtrees(some.lo, some.hi, shards))

        self.phases.begin(Phase.WAITING, "partials")
        started = time.perf_counter()
        done = self._answered((state.step, ""), shards, ask, fits, self.backup_workers)
        self.waited += time.perf_counter() - started
        self.phases.begin(Phase.EXCHANGE)
        self._computed_by = [some.answer for some in done if some.answer is not None]
        chosen = [lease.number for lease in self._computed_by]
        self._chosen = [(lease, *boxes[lease][0]) for lease in chosen]
        return self._finished([(*boxes[lease], self._rows[lease]) for lease in chosen])

    def _finished(self, chosen: Sequence[tuple[Memory, Box, npt.NDArray[np.float64]]]) -> npt.NDArray[np.float64]:
        """The tallies of a step that has come in these boxes, whose sum is prepared."""
        tallies: dict[Node, list[float]] = {}
        for _, box, rows in chosen:
            tallies |= {node: rows[i].tolist() for i, node in enumerate(box.nodes)}
        self._add_up([(memory, box) for memory, box, _ in chosen])
        return np.array([summed(tallies, additions(tallies, self._goal), self._goal)])

    def _add_up(self, boxes: Sequence[tuple[Memory, Box]]) -> None:
        """The sum over these, made once for as long as the same members have the same shards."""
        lo, hi = self._segments[self.membership.rank]
        if lo == hi:
            return
        key = tuple((*member, box.memory, box.nodes[0].lo) for member, box in boxes)
        found = self._prepared.get(key)
        if found is None:
            if len(self._prepared) >= _PREPARED:
                self._prepared.clear()
            vectors = {node: box.vectors[i] for _, box in boxes for i, node in enumerate(box.nodes)}
            pairs, total = in_place(vectors, additions(vectors, self._goal), self._goal)
            segment = self.update.segment(self.store, lo, hi, total, pairs)
            found = self._prepared[key] = segment, total
        self._own, self._total = found

    def _answered(
        self,
        at: tuple[int, str],
        total: int,
        ask: Callable[[Sequence[Grant]], None],
        fits: Callable[[Range, npt.NDArray[np.float64]], bool],
        backup: int,
    ) -> list[Range]:
        """Have ``total`` pieces of work done by whoever is there; the ranges, in order, each with its answer.

        ``at`` is the step, and the part of the data where that is evaluated.
        """
        hub, (step, _) = self.hub, at
        if not total:
            return []
        self._rows: dict[int, npt.NDArray[np.float64]] = {}
        self._outvoted: set[int] = set()
        with hub.changed:
            hub.step = step
            members = self._members()
            grants = leases.shared(0, total, members)
            if backup:
                seconds = {m.number: m.seconds_a_shard for m in hub.members.values()}
                grants = leases.singled(grants, seconds, backup)
            ranges = [grant.range for grant in grants]
            ask(grants)
            alone_since = time.monotonic()
            while True:
                self._look_up()
                for some in self._read(ranges, fits):
                    self._ask_another(some, ranges, ask)
                self._disagree(self.intake.differing())
                if all(some.answer is not None for some in ranges):
                    break
                now = time.monotonic()
                open_ = [
                    lease for some in ranges if some.answer is None for lease in some.leases if self._pending(lease)
                ]
                living = [lease for lease in open_ if lease.member in hub.members]
                heard = hub.heard()
                for number in leases.overdue(living, heard, now, self.lease_seconds):
                    hub.lose(number, f"said nothing for {self.lease_seconds:g} s")
                if hub.losses:
                    self._mourn(at, open_)
                    self._give_anew(at, ranges, ask)
                elif not hub.members:
                    if now - alone_since > self.deadline:
                        raise self._deserted(step)
                else:
                    alone_since = now
                    if leases.orphaned(ranges, hub.members):
                        self._give_anew(at, ranges, ask)
                    elif backup:
                        ask(leases.doubled(ranges, sorted(hub.members), backup))
                wait = leases.until_overdue(living, heard, now, self.lease_seconds)
                hub.changed.wait(min(LOOK, max(0.0, wait)))
            self._disagree(self._compared(ranges, step))
            hub.chosen(self._late)
        return sorted(ranges, key=lambda some: some.lo)

    def _look_up(self) -> None:
        """Raises what a worker failed with, and WorkerLost where a server is gone."""
        if self.hub.failure is not None:
            raise self.hub.failure
        if self._servers.disturbed:
            raise _disturbed()

    def _read(self, ranges: Sequence[Range], fits: Callable[[Range, npt.NDArray[np.float64]], bool]) -> list[Range]:
        """Take the first good answer of each range; the ranges that another is to be asked for, too.

        Of a gradient that is not finite a second worker has to say the same, where there is one: who sends NaN where
        there is none neither ends the run nor moves a bit.
        """
        asked = []
        for some in ranges:
            if some.answer is not None:
                continue
            doubtful = []
            for lease in some.leases:
                open_ = self.hub.open.get(lease.number)
                if open_ is None or not open_.whole or open_.rows is None:
                    continue
                if not fits(some, open_.rows):
                    self.hub.lose(lease.member, "answered something else")
                elif self._finite(lease, open_.rows):
                    some.answer = lease
                    break
                else:
                    doubtful.append(lease)
            if some.answer is None and doubtful:
                if len(doubtful) > 1 or not self._others(some):
                    some.answer = doubtful[0]
                elif all(lease in doubtful or lease.member not in self.hub.members for lease in some.leases):
                    asked.append(some)
            elif some.answer is not None:
                for lease in doubtful:
                    self._outvoted.add(lease.number)
                    print(
                        f"dptrain: worker {lease.member} at step {self.hub.step}: its gradient of shards {some.lo} to "
                        f"{some.hi - 1} is not finite, worker {some.answer.member}'s is: that counts",
                        file=sys.stderr,
                        flush=True,
                    )
            if some.answer is not None:
                rows = self.hub.open[some.answer.number].rows
                assert rows is not None
                self._rows[some.answer.number] = rows
        return asked

    def _finite(self, lease: Lease, rows: npt.NDArray[np.float64]) -> bool:
        """Whether an answer is, or is none of which that is asked."""
        known, open_ = self._boxes.get(lease.number), self.hub.open[lease.number]
        return known is None or (known[1].finite and open_.finite and bool(np.isfinite(rows).all()))

    def _others(self, some: Range) -> list[int]:
        """Who takes part and has not answered yet for a range."""
        answered = {lease.member for lease in some.leases if not self._pending(lease)}
        return [number for number in self.hub.working() if number not in answered]

    def _pending(self, lease: Lease) -> bool:
        """Whether there is no whole answer yet."""
        open_ = self.hub.open.get(lease.number)
        return open_ is None or not open_.whole or open_.rows is None

    def _ask_another(self, some: Range, ranges: Sequence[Range], ask: Callable[[Sequence[Grant]], None]) -> None:
        """Let another worker compute a range too."""
        others = self._others(some)
        ask([Grant(some, [*leases.idle(ranges, others), *others][0])])

    def _compared(self, ranges: Sequence[Range], step: int) -> list[int]:
        """The leases of which something else came than of who was first; what is yet to come is compared later."""
        differing = []
        for some in ranges:
            first = some.answer
            if first is None or first.number not in self._boxes:
                continue
            for lease in some.leases:
                if lease is first or lease.number in self._outvoted or lease.number not in self.hub.open:
                    continue
                while len(self._late) >= LATE:
                    old = next(iter(self._late))
                    del self._late[old]
                    self.hub.open.pop(old, None)
                    self.intake.compare_no_more(old)
                self._late[lease.number] = first, step, lease.member
                rows = self.hub.open[lease.number].rows
                other = rows is not None and rows.tobytes() != self._rows[first.number].tobytes()
                if self.intake.differ(lease.number, self._boxes[first.number][1]) or other:
                    differing.append(lease.number)
        return differing

    def _disagree(self, differing: Sequence[int]) -> None:
        """Raises DisagreementError for leases whose answer is not that of the worker that was first."""
        for number in differing:
            first, step, member = self._late[number]
            raise DisagreementError(
                f"workers {first.member} and {member} at step {step}, shard {first.lo}",
                expected="the same gradient, to the last bit",
                found="two; nobody can tell which is wrong",
                cure="run `dptrain doctor` on their machines, and go on with --resume from a checkpoint of that step "
                "or an earlier one, without the machine that is to blame",
            )

    def _members(self) -> list[int]:
        """Who takes part, as soon as there is somebody; called with the lock held."""
        hub = self.hub
        until = time.monotonic() + self.deadline
        while not (working := hub.working()):
            self._look_up()
            if time.monotonic() > until:
                raise self._deserted(hub.step)
            hub.changed.wait(LOOK)
        return working

    def _give_anew(self, at: tuple[int, str], ranges: list[Range], ask: Callable[[Sequence[Grant]], None]) -> None:
        """Give what the gone had to do to those that are there, if there are any."""
        hub = self.hub
        working = hub.working()
        if not working:
            return
        for some in leases.orphaned(ranges, hub.members):
            ranges.remove(some)
            free = leases.idle(ranges, working)
            order = free + [member for member in working if member not in free]
            cut = leases.narrowed if self._lost_before(at, some) else leases.shared
            grants = cut(some.lo, some.hi, order)
            ranges += [grant.range for grant in grants]
            ask(grants)

    def _mourn(self, at: tuple[int, str], open_: Sequence[leases.Lease]) -> None:
        """Remember who is gone with which shards. Raises PoisonError where a shard is to blame.

        The first loss tells what to look at: those shards are given out alone, again. A shard that is computed alone
        is to blame where a second worker is lost while it is at it: workers that are killed, whenever that is, are
        hardly ever at the same shard of the same step.
        """
        if self._suspected_at != at:
            self._suspects, self._suspected_at = {}, at
        step, part = at
        gone, self.hub.losses = self.hub.losses, []
        for member, why in gone:
            self._told(member, why, step)
            if why == "left":
                continue
            theirs = [self.hub.open.get(lease.number) for lease in open_ if lease.member == member.number]
            had = [lost for lost in theirs if lost is not None]
            for lost in had:
                if not lost.again:
                    for shard in range(lost.lease.lo, lost.lease.hi):
                        self._suspects.setdefault(shard, [])
            begun = [lost.lease for lost in had if lost.again and lost.begun]
            # It computes one after the other.
            at_last = max(begun, key=lambda lease: lease.number, default=None)
            if at_last is not None and at_last.hi - at_last.lo == 1:
                before = self._suspects.setdefault(at_last.lo, [])
                before.append(member.number)
                if len(before) > 1:
                    raise poison(at_last.lo, step, before, part)

    def _lost_before(self, at: tuple[int, str], some: Range) -> bool:
        """Whether somebody was lost with some of this before."""
        return self._suspected_at == at and any(piece in self._suspects for piece in range(some.lo, some.hi))

    def _told(self, member: Member, why: str, step: int) -> None:
        self.intake.forget(member.number)
        self._prepared.clear()

    def _deserted(self, step: int) -> DeadlineError:
        return DeadlineError(
            f"the parameter server at step {step}",
            expected=f"a worker within {self.deadline:g} s",
            found="none",
            cure="start some with `dptrain worker --server ADDRESS`, and go on with --resume",
        )


def poison(shard: int, step: int, lost: Sequence[int], part: str = "") -> PoisonError:
    """What ends a run in which two workers were ``lost`` at a shard, or at a block of the ``part`` evaluated."""
    return PoisonError(
        f"{f'block {shard} of {part}' if part else f'shard {shard}'} at step {step}",
        expected="its owner to live",
        found=f"that workers {lost[0]} and {lost[1]} were lost while they were at it, one after the other",
        cure="look at that shard's rows and at the model: whatever is in them ends every worker",
    )


def _disturbed() -> WorkerLost:
    return WorkerLost("the parameter servers", expected="all to live", found="a death", cure="the others meet")


def _lost() -> ResidualsLost:
    return ResidualsLost(
        "the parameter server",
        expected="the residuals of all shards",
        found="some gone with a worker",
        cure="the run goes back to where all were together",
    )


def _processes(member: Member) -> dict[str, Any]:
    """What the processes of a member's host have done, where there are several."""
    if member.processes == 1:
        return {}
    names = [field.name for field in pb.ProcessFigures.DESCRIPTOR.fields]
    return {"processes": [{name: getattr(one, name) for name in names} for one in member.figures]}
