"""The servers' way from partials to the next state: the partials are those of workers elsewhere.

To the loop it is the exchange of workers that own no shards. ``swap`` leases the step's shards out, at the chief, to
whoever takes part, gives those of who is gone to others, and goes on as solo does as soon as all are in.

Of several servers each takes in its segment of all partials, finishes its sum, hands that to the others and the new
weights of its segment to the workers. All apply all sums, so that each holds the whole state and any may die; those
beyond the number of segments have none and stand by.
"""

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from dptrain.arrivals import arrival
from dptrain.errors import (
    PeerFailed,
    ResidualsLost,
    WorkerLost,
    exit_code,
)
from dptrain.exchange.communicator import Message
from dptrain.exchange.parameter_server import lending
from dptrain.exchange.parameter_server.assignment import Assignment, Memory, disturbed
from dptrain.exchange.parameter_server.codec import Written
from dptrain.exchange.parameter_server.handover import Handover, residuals_lost
from dptrain.exchange.parameter_server.hub import Member, Part
from dptrain.exchange.parameter_server.intake import Box, Intake
from dptrain.exchange.parameter_server.leases import Grant, Lease, Range
from dptrain.exchange.parameter_server.outlet import Outlet
from dptrain.exchange.parameter_server.residuals import Age, Ledger
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
        self._assignment = Assignment(communicator, self._forget, lease_seconds, deadline)
        size = update.layout.size
        self.outbox = np.zeros((1, size), dtype)
        kept = membership.shards if update.gradients.feeds_back else 0
        slots = len(update.optimizer.slots)
        vectors, self._lent = lending.rows(2, size, dtype)
        self.store = Store(update.layout, slots, dtype, kept, elsewhere=True, vectors=vectors)
        ledger = self.hub.residuals = Ledger(self.store.residuals(0)) if kept else None
        self._handover: Handover | None = None
        if ledger is not None:
            self._handover = Handover(self.hub, self._assignment, ledger, lease_seconds, deadline)
        self._begun = False
        self._wanted_segments = servers
        self._goal = Node(0, membership.shards)
        self._question: tuple[Array | None, str] = (None, "")
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
        self._assignment.renew(self.intake)
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
        if self._handover is not None:
            self._handover.renew()
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
            if self._handover is not None:
                self._handover.ledger.begin()
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
        if self._handover is not None:
            self._handover.at(Age(state.step, state.updates))
        self._computed_by: list[Lease] = []
        self._publish(state)
        self._chosen = None
        if self.leads and not report.failure:
            try:
                if self._handover is not None:
                    self._handover.see_off()
                tallies = self._computed(state)
            except BaseException as error:  # the other servers must not be left waiting
                if self._servers.disturbed and isinstance(error, WorkerLost):
                    raise disturbed() from None
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
                raise residuals_lost() from None
            raise
        if self._handover is not None and verdict.finite:
            self._handover.committed(Age(after.step, after.updates), self._computed_by)
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
                again = self._assignment.lost_before((step, part), some)
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
        done = self._assignment.answered((step, part), total, ask, fits, 0)
        self.phases.begin(Phase.EVALUATION)
        parts = []
        for some in done:
            assert some.answer is not None
            parts.append(self._assignment.rows[some.answer.number].reshape(-1, width))
        return np.concatenate(parts) if parts else rows

    def complete(self, state: State) -> bool:
        """See Exchange."""
        if self._handover is None:
            return True
        self.phases.begin(Phase.WAITING, "residuals")
        try:
            self._handover.all_here(Age(state.step, state.updates))
        except WorkerLost:
            # Of which all are told with the next step.
            return False
        finally:
            self.phases.begin(Phase.OTHER)
        return True

    def complete_for_all(self, state: State) -> None:
        """See Exchange."""
        if self._handover is None:
            return
        found = self.complete(state) if self.leads else None
        if self._servers.disturbed:
            self._assignment.look_up()
        if not self._servers.broadcast_json(found, "residuals"):
            self._retract()
            raise residuals_lost()

    def _retract(self) -> None:
        """The run goes back: what is under way counts no more, nor do the weights that were handed out."""
        self.outlet.retract()
        self._published = None
        self.hub.chosen()
        if self._handover is not None:
            with self.hub.changed:
                self._handover.ledger.ask_no_more()

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
        hub, shards, handover = self.hub, self.membership.shards, self._handover
        boxes = self._assignment.boxes = {}
        counts: dict[int, int] = {}

        def ask(grants: Sequence[Grant]) -> None:
            if handover is not None:
                grants = handover.to(grants)
            for some, member in grants:
                count = counts[member] = counts.get(member, 0) + 1
                again = self._assignment.lost_before((state.step, ""), some)
                lease = hub.lease(member, some.lo, some.hi, count=count, again=again)
                some.leases.append(lease)
                nodes = subtrees(some.lo, some.hi, shards)
                boxes[lease.number] = (member, count), self.intake.expect(lease.number, member, count, nodes)
                task = pb.Compute(lease=lease.number, step=state.step, lo=some.lo, hi=some.hi, again=again)
                if handover is not None and handover.ledger.age is not None:
                    task.residuals.CopyFrom(handover.ledger.age.said)
                hub.send(member, compute=task)

        def fits(some: Range, found: npt.NDArray[np.float64]) -> bool:
            return len(found) == len(subtrees(some.lo, some.hi, shards))

        self.phases.begin(Phase.WAITING, "partials")
        started = time.perf_counter()
        done = self._assignment.answered((state.step, ""), shards, ask, fits, self.backup_workers)
        self.waited += time.perf_counter() - started
        self.phases.begin(Phase.EXCHANGE)
        self._computed_by = [some.answer for some in done if some.answer is not None]
        chosen = [lease.number for lease in self._computed_by]
        self._chosen = [(lease, *boxes[lease][0]) for lease in chosen]
        return self._finished([(*boxes[lease], self._assignment.rows[lease]) for lease in chosen])

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

    def _forget(self, member: Member) -> None:
        """It is gone, and so is its memory."""
        self.intake.forget(member.number)
        self._prepared.clear()


def _processes(member: Member) -> dict[str, Any]:
    """What the processes of a member's host have done, where there are several."""
    if member.processes == 1:
        return {}
    names = [field.name for field in pb.ProcessFigures.DESCRIPTOR.fields]
    return {"processes": [{name: getattr(one, name) for name in names} for one in member.figures]}
