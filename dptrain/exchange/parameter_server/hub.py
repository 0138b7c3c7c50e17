"""A server's side of the wire: who takes part, what each is to do, what came back. All of it behind one lock.

Workers join at the chief, which gives out leases. The other servers know of both by its notices, take in their segment
of what is computed, and tell the chief when all of a lease is there.
"""

import json
import queue
import secrets
import threading
import time
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from dptrain import errors, supervision
from dptrain.errors import ArithmeticMismatch, BusyError, DataError, DptrainError, LaunchError, WorkerLost
from dptrain.exchange.parameter_server.codec import Piece, Version
from dptrain.exchange.parameter_server.intake import Intake
from dptrain.exchange.parameter_server.leases import Lease
from dptrain.exchange.parameter_server.lending import Lent, look
from dptrain.exchange.parameter_server.outlet import Listening, Outlet
from dptrain.exchange.parameter_server.residuals import Claims, Ledger, claimed
from dptrain.layout import Array
from dptrain.nn.accumulate import TALLIES
from dptrain.tree import subtrees
from dptrain.v1 import parameter_server_pb2 as pb

_AHEAD = 1 << 16
"""How far a lease may be ahead of those that a server knows, so that it is waited for."""

_NEWS = 10.0
"""Seconds in which what the chief has told a worker must have come to the other servers too."""


class Part(NamedTuple):
    """A server's part in a run: it is that of ``rank`` among ``servers`` (their numbers), of which ``owners`` have a
    segment each, by their ranks; ``segments`` is how many there are, empty ones among them.

    ``tell`` tells other servers, by their ranks. ``lent`` is where the weights lie, if workers may look there.
    ``job`` is the number of the job that workers must have, and ``identity`` what else they have to agree with.
    """

    identity: Mapping[str, str]
    job: int
    shards: int
    intake: Intake
    outlet: Outlet
    rank: int
    servers: tuple[int, ...]
    segments: int
    owners: frozenset[int]
    era: int
    lent: Lent | None
    tell: Callable[[pb.Notice, Sequence[int]], None]


class Taken(NamedTuple):
    """What became of a chunk, and why; OUTCOME_UNSPECIFIED: it was taken."""

    place: pb.Place
    outcome: pb.Outcome.ValueType
    reason: str


@dataclass
class Member:
    """A worker that takes part, and what is known of it."""

    number: int
    epoch: int
    host: str
    joined: int
    tasks: "queue.SimpleQueue[pb.WorkResponse | None]" = field(default_factory=queue.SimpleQueue)
    heard: float = 0.0
    beat: int = 0
    working: bool = False
    shards_computed: int = 0
    compute_seconds: float = 0.0
    wait_seconds: float = 0.0
    peak_memory_bytes: int = 0
    seconds_a_shard: float = 0.0
    processes: int = 1
    figures: Sequence[pb.ProcessFigures] = ()
    """What each of several processes of its host has done."""
    claims: Claims = field(default_factory=dict)
    """The residuals that it had when it joined, as far as it may have them still."""
    leaves: bool = False
    """Whether it wants to leave, as soon as what only it has is handed over."""


class Answered:
    """What came of one lease of a step: its tallies or sums, and at which servers its vectors are not all there yet."""

    def __init__(self, lease: Lease, step: int, missing: frozenset[int], *, again: bool = False) -> None:
        self.lease, self.step = lease, step
        self.missing = set(missing)
        self.finite = True
        """Whether all that is at other servers is."""
        self.again = again
        """Whether somebody was lost with some of the shards before."""
        self.begun = False
        """Whether the member, which is asked to where it is ``again``, has said that it is at them: it may have been
        gone when it was given them.
        """
        self.rows: npt.NDArray[np.float64] | None = None

    @property
    def whole(self) -> bool:
        """Whether all vectors are there."""
        return not self.missing


class Hub:
    """``changed`` is notified whenever the exchange, which waits on it, has something to look at."""

    def __init__(self, job: Mapping[str, Any]) -> None:
        self.job = json.dumps(job).encode()
        self.servers: list[str] = []
        self.changed = threading.Condition()
        self.members: dict[int, Member] = {}
        self.all: list[Member] = []
        """Everyone who ever took part."""
        self.open: dict[int, Answered] = {}
        self.failure: DptrainError | None = None
        self.step = 0
        self.number = 0
        self.losses: list[tuple[Member, str]] = []
        """Who is gone since the exchange looked last, and how."""
        self.part: Part | None = None
        self.residuals: Ledger | None = None
        """Where those of the shards are, at the chief, if they keep any."""
        self.server = 0
        """This server's number."""
        self._lease = 0
        self._closed = False
        self.stands_by = False
        self._epochs: dict[int, int] = {}
        """Whom messages may be of."""
        self._looks: dict[int, Array] = {}
        """The memory of those that lend theirs."""
        self._early: list[tuple[int, pb.Notice]] = []
        """Notices of a time that has not come here yet."""

    # The exchange's side.

    def admit(self, part: Part) -> None:
        """Play a part from now on. Who took part before has to join again."""
        with self.changed:
            if self.part is not None:
                self.part.outlet.close(changed=True)
            for member in self.members.values():
                member.tasks.put(None)
            for forgotten in (self.members, self.open, self._epochs, self._looks, self.losses):
                forgotten.clear()
            self.part, self.number = part, part.job
            self.stands_by = part.rank != 0
            # So that no two chiefs number their leases alike.
            self._lease = part.era << 32
            early, self._early = self._early, []
            for server, notice in early:
                self._understand(server, notice)
            self.changed.notify_all()

    def ring(self) -> None:
        """Have the exchange look at the servers."""
        with self.changed:
            self.changed.notify_all()

    def lease(
        self,
        member: int,
        lo: int,
        hi: int,
        *,
        count: int = 0,
        step: int | None = None,
        weights: Version | None = None,
        again: bool = False,
    ) -> Lease:
        """A new lease, open from now on; to be called with ``changed`` held.

        ``count`` is which of the member's leases that are not added up yet it is, where vectors are to come of it, of
        ``step`` (None: the present one). ``weights`` are handed to the member.
        ``again``: somebody else was lost with some of this.
        """
        part = self.part
        assert part is not None
        self._lease += 1
        lease = Lease(self._lease, member, lo, hi)
        step = self.step if step is None else step
        self.open[lease.number] = Answered(lease, step, part.owners if count else frozenset(), again=again)
        self.members[member].heard = time.monotonic()
        if count or weights is not None:
            granted = pb.Granted(lease=lease.number, worker=member, count=count, step=step, lo=lo, hi=hi)
            if weights is not None:
                part.outlet.hand(member, weights)
                granted.weights, granted.best = weights
            part.tell(pb.Notice(granted=granted), sorted(part.owners))
        return lease

    def chosen(self, late: Container[int] = ()) -> None:
        """The open leases are over: what still comes of them, but for those that are ``late``, is of no interest."""
        with self.changed:
            if self.part is not None:
                self.part.intake.shut(list(self.open))
            self.open = {number: open_ for number, open_ in self.open.items() if number in late}

    def over(self, leases: Iterable[int]) -> None:
        """These leases are over, and only these."""
        with self.changed:
            if self.part is not None:
                self.part.intake.shut(list(leases))
            for lease in leases:
                self.open.pop(lease, None)

    def present(self) -> int:
        """How many processes compute; to be called with ``changed`` held."""
        return sum(member.processes for member in self.members.values() if member.working)

    def working(self) -> list[int]:
        """The members that have begun to work; to be called with ``changed`` held.

        Those that want to leave are among them only where all do.
        """
        found = sorted(number for number, member in self.members.items() if member.working)
        return [number for number in found if not self.members[number].leaves] or found

    def claims(self) -> dict[int, Claims]:
        """What residuals each member has from before; to be called with ``changed`` held."""
        return {number: member.claims for number, member in self.members.items()}

    def heard(self) -> dict[int, float]:
        """When each member last gave a sign of life; to be called with ``changed`` held."""
        return {number: member.heard for number, member in self.members.items()}

    def send(self, member: int, **task: Any) -> None:
        """Give a member a task; to be called with ``changed`` held."""
        there = self.members[member]
        there.tasks.put(pb.WorkResponse(membership=self._membership(there), **task))

    def lose(self, number: int, why: str) -> None:
        """A member is gone, or taken for dead; its stream ends. To be called with ``changed`` held."""
        member = self.members.pop(number, None)
        if member is None:
            return
        member.tasks.put(None)
        self.losses.append((member, why))
        self._epochs.pop(number, None)
        self._looks.pop(number, None)
        assert self.part is not None
        self.part.outlet.forget(number)
        self.part.tell(pb.Notice(lost=number), range(len(self.part.servers)))
        supervision.meet(self.present())
        self.changed.notify_all()

    def close(self, code: int) -> None:
        """Tell all to leave with a code; nobody joins any more."""
        with self.changed:
            self._closed = True
            for number, member in self.members.items():
                self.send(number, end=pb.End(code=code))
                member.tasks.put(None)
            self.changed.notify_all()
            if self.part is not None:
                self.part.outlet.close()

    # The other servers' side: called by threads of their links.

    def heed(self, server: int, notice: pb.Notice) -> None:
        """What another server tells beside."""
        with self.changed:
            if self.part is None:
                self._early.append((server, notice))
            else:
                self._understand(server, notice)

    def _understand(self, server: int, notice: pb.Notice) -> None:
        part = self.part
        assert part is not None
        if notice.era != part.era:
            if notice.era > part.era:
                self._early.append((server, notice))
            return
        what = notice.WhichOneof("what")
        if what == "joined":
            self._epochs[notice.joined.worker] = notice.joined.epoch
        elif what == "lost":
            self._epochs.pop(notice.lost, None)
            self._looks.pop(notice.lost, None)
            part.intake.forget(notice.lost)
            part.outlet.forget(notice.lost)
        elif what == "granted":
            granted = notice.granted
            lease = Lease(granted.lease, granted.worker, granted.lo, granted.hi)
            self._lease = granted.lease
            if granted.HasField("weights"):
                part.outlet.hand(lease.member, (granted.weights, granted.best))
            else:
                self.step = granted.step
            if granted.count:
                self.open[lease.number] = Answered(lease, granted.step, frozenset((part.rank,)))
                part.intake.expect(lease.number, lease.member, granted.count, subtrees(lease.lo, lease.hi, part.shards))
        elif what == "whole":
            open_ = self.open.get(notice.whole)
            if open_ is not None and server in part.servers:
                open_.finite = open_.finite and not notice.not_finite
                open_.missing.discard(part.servers.index(server))
        self.changed.notify_all()

    # The workers' side: called by threads of the server.

    def join(self, request: pb.JoinRequest, deadline: float) -> pb.JoinResponse:
        """Take a worker in. Raises DptrainError where it would compute something else."""
        with self.changed:
            if self.stands_by:
                raise _no_chief()
            if not self.changed.wait_for(lambda: self.part is not None or self._closed, deadline):
                raise WorkerLost(
                    "the parameter server",
                    expected=f"to be ready within {deadline:g} s",
                    found="it is not",
                    cure="look at its own messages",
                )
            if self._closed:
                raise LaunchError(
                    "the parameter server", expected="a run", found="its end", cure="nothing is left to do"
                )
            part = self.part
            assert part is not None
            if self.stands_by:
                raise _no_chief()
            self._compare(request, part.identity)
            # Not to be guessed: it is what tells a member from whoever else may call.
            epoch = secrets.randbits(63)
            member = Member(len(self.all) + 1, epoch, request.host, self.step, heard=time.monotonic())
            member.processes = max(1, request.processes)
            member.claims = claimed(request.residuals)
            self.all.append(member)
            self.members[member.number] = member
            self._epochs[member.number] = epoch
            membership = self._membership(member)
            part.tell(pb.Notice(joined=membership), range(len(part.servers)))
            self.changed.notify_all()
            return pb.JoinResponse(membership=membership, step=self.step, servers=part.servers, segments=part.segments)

    def leave(self, membership: pb.Membership, seconds: float | None = None) -> None:
        """A worker leaves of its own will; one that may have residuals once they are handed over, or in any case after
        so many seconds.
        """
        with self.changed:
            member = self.member(membership)
            if member is None:
                return
            if self.residuals is not None and not self._closed:
                member.leaves = True
                self.changed.notify_all()
                self.changed.wait_for(lambda: self._closed or self.member(membership) is None, seconds)
            self.lose(membership.worker, "left")

    def member(self, membership: pb.Membership) -> Member | None:
        """Whom a message is of; None where that is nobody who takes part."""
        found = self.members.get(membership.worker)
        valid = found is not None and found.epoch == membership.epoch and membership.job == self.number
        return found if valid else None

    def tasks(self, member: Member) -> Iterator[pb.WorkResponse]:
        """The member's tasks, until it is gone."""
        with self.changed:
            member.working = True
            supervision.meet(self.present())
            self.changed.notify_all()
        while (task := member.tasks.get()) is not None:
            yield task

    def hear(self, request: pb.WorkRequest) -> bool:
        """What a worker says; False where it is no member any more."""
        with self.changed:
            member = self.member(request.membership)
            if member is None:
                return False
            said = request.WhichOneof("said")
            if said == "sign":
                if request.sign.beat > member.beat:
                    member.beat, member.heard = request.sign.beat, time.monotonic()
                return True
            member.heard = time.monotonic()
            if said == "failure":
                self.failure = self.failure or _error(request.failure)
                self.changed.notify_all()
            elif said == "answer":
                self._answer(member, request.answer)
            elif said == "blocks":
                self._blocks(member, request.blocks)
            elif said == "begun":
                open_ = self.open.get(request.begun.lease)
                if open_ is not None and open_.lease.member == member.number:
                    open_.begun = True
            elif said == "residual" and self.residuals is not None:
                self.residuals.take(member.number, request.residual)
                self.changed.notify_all()
            return True

    def push(self, piece: Piece) -> list[Taken]:
        """What became of the chunks of a partial that a message stands for."""
        place = piece.place
        part = self.part
        if part is None or place.membership.job != self.number:
            return [Taken(place, pb.OUTCOME_STALE, "it is of another job")]
        with self.changed:
            # The chief's word on a lease may come later than what is computed by it.
            if part.rank and self._lease < place.lease < self._lease + _AHEAD:
                self.changed.wait_for(lambda: self._lease >= place.lease or self._over(part), _NEWS)
            open_ = self.open.get(place.lease)
            known = part is self.part and self._known(place.membership)
            if not known or open_ is None or open_.lease.member != place.membership.worker:
                return [Taken(place, pb.OUTCOME_STALE, f"lease {place.lease} does not count any more")]
            if place.step != open_.step:
                return [Taken(place, pb.OUTCOME_STALE, f"lease {place.lease} is not of step {place.step}")]
            memory = self._looks.get(place.membership.worker)
        try:
            pieces = part.intake.looked_at(piece, memory)
        except ValueError as error:
            return [Taken(place, pb.OUTCOME_REFUSED, str(error))]
        taken = [Taken(one.place, *part.intake.take(one)) for one in pieces]
        if any(one.outcome == pb.OUTCOME_COMPLETE for one in taken):
            self._complete(part, open_, place)
        return taken

    def _complete(self, part: Part, open_: Answered, place: pb.Place) -> None:
        """All vectors of a lease are here."""
        with self.changed:
            open_.missing.discard(part.rank)
            if part.rank:
                part.tell(pb.Notice(whole=place.lease, not_finite=not part.intake.finite(place.lease)), [0])
            else:
                if place.membership.worker in self.members:
                    self.members[place.membership.worker].heard = time.monotonic()
                if open_.rows is not None and open_.whole:
                    self.changed.notify_all()

    def listen(self, request: pb.PullRequest) -> Listening | None:
        """To the weights; None for who doesn't take part."""
        with self.changed:
            part = self._part_for(request.membership)
            return None if part is None else part.outlet.listen(request.membership.worker, looks=request.looks)

    def lend(self, request: pb.LendRequest) -> pb.LendResponse:
        """A worker of this machine lends its memory."""
        with self.changed:
            part = self._part_for(request.membership)
            found = None if part is None else look(request.partials)
            if part is None or found is None:
                return pb.LendResponse()
            self._looks[request.membership.worker] = found
            return pb.LendResponse(looks=True, weights=None if part.lent is None else part.lent.told)

    def _part_for(self, membership: pb.Membership) -> Part | None:
        """The part played for who takes part, which the chief's word may still have to say; None for others."""
        part = self.part
        if part is not None and part.rank:
            self.changed.wait_for(lambda: self._known(membership) or self._over(part), _NEWS)
        return part if part is self.part and self._known(membership) else None

    def _known(self, membership: pb.Membership) -> bool:
        epoch = self._epochs.get(membership.worker)
        return epoch is not None and epoch == membership.epoch and membership.job == self.number

    def _over(self, part: Part) -> bool:
        """Whether a part is played no more."""
        return self._closed or part is not self.part

    def vanish(self, member: Member) -> None:
        """A member's stream broke."""
        with self.changed:
            if self.members.get(member.number) is member:
                self.lose(member.number, "vanished")

    def _answer(self, member: Member, answer: pb.Answer) -> None:
        open_ = self.open.get(answer.lease)
        if open_ is None or open_.lease.member != member.number or len(answer.tallies) % (8 * TALLIES):
            return
        if open_.rows is not None:  # said before: the first word counts
            return
        shards = open_.lease.hi - open_.lease.lo
        member.shards_computed += shards
        member.compute_seconds += answer.compute_seconds
        member.wait_seconds += answer.wait_seconds
        member.peak_memory_bytes = answer.peak_memory_bytes
        member.figures = answer.processes
        member.seconds_a_shard = answer.compute_seconds / shards
        open_.rows = np.frombuffer(answer.tallies, "<f8").reshape(-1, TALLIES)
        if open_.whole:
            self.changed.notify_all()

    def _blocks(self, member: Member, blocks: pb.Blocks) -> None:
        open_ = self.open.get(blocks.lease)
        if open_ is None or open_.lease.member != member.number or len(blocks.sums) % 8:
            return
        open_.rows = np.frombuffer(blocks.sums, "<f8")
        self.changed.notify_all()

    def _membership(self, member: Member) -> pb.Membership:
        return pb.Membership(job=self.number, epoch=member.epoch, worker=member.number)

    def _compare(self, request: pb.JoinRequest, mine: Mapping[str, str]) -> None:
        who = f"a worker on {request.host}"
        if request.job_sha256 != mine["job"] and request.data_digest == mine["data"]:
            raise LaunchError(
                who,
                expected=f"the server's job ({mine['job'][:19]})",
                found=f"another ({request.job_sha256[:19]}): its Python model's source, or the weights it starts from",
                cure="copy the same files to every machine",
            )
        if request.data_digest != mine["data"]:
            raise DataError(
                who,
                expected=f"the same data as the server's ({mine['data'][:19]})",
                found=request.data_digest[:19] or "none",
                cure="copy the same files there, or name them with --data",
            )
        if request.fingerprint != mine["fingerprint"]:
            raise ArithmeticMismatch(
                f"{who} ({request.arithmetic})",
                expected=f"the bits of the server's machine ({mine['arithmetic']})",
                found="others for the same step",
                cure='set arithmetic.kernels = "portable" and install the same numpy and mkl everywhere',
            )


def _error(failure: pb.Failure) -> DptrainError:
    kind = getattr(errors, failure.kind, None)
    of_ours = (errors.PeerFailed, errors.WorkerLost)
    if not (isinstance(kind, type) and issubclass(kind, DptrainError)) or kind in of_ours:
        kind = errors.WorkerCrashed
    return kind(failure.where, expected=failure.expected, found=failure.found, cure=failure.cure)


def _no_chief() -> BusyError:
    return BusyError("the parameter server", expected="the chief", found="another server", cure="join the chief")
