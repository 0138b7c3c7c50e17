"""The chief's side of the wire: who takes part, what each is to do, what came back. All of it behind one lock."""

import json
import queue
import secrets
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from dptrain import errors
from dptrain.errors import ArithmeticMismatch, BusyError, DataError, DptrainError, LaunchError, WorkerLost
from dptrain.exchange.parameter_server.codec import Piece
from dptrain.exchange.parameter_server.intake import Intake
from dptrain.exchange.parameter_server.leases import Lease
from dptrain.exchange.parameter_server.outlet import Listening, Outlet
from dptrain.v1 import parameter_server_pb2 as pb

TALLIES = 3


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


class Answered:
    """What came of one lease of a step: its tallies or sums, and whether its vectors are all here."""

    def __init__(self, lease: Lease, step: int, vectors: bool) -> None:
        self.lease, self.step = lease, step
        self.whole = not vectors
        self.rows: npt.NDArray[np.float64] | None = None


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
        self._identity: Mapping[str, str] | None = None
        self._lease = 0
        self._closed = False
        self.stands_by = False
        self.intake: Intake | None = None
        self.outlet: Outlet | None = None

    # The exchange's side.

    def admit(self, identity: Mapping[str, str], intake: Intake, outlet: Outlet, number: int) -> None:
        """Let workers join that agree with ``identity``."""
        with self.changed:
            self._identity, self.intake, self.outlet, self.number = identity, intake, outlet, number
            self.stands_by = False
            self.changed.notify_all()

    def lease(self, member: int, lo: int, hi: int, *, vectors: bool) -> Lease:
        """A new lease, open from now on; to be called with ``changed`` held."""
        self._lease += 1
        lease = Lease(self._lease, member, lo, hi)
        self.open[lease.number] = Answered(lease, self.step, vectors)
        self.members[member].heard = time.monotonic()
        return lease

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
        self.changed.notify_all()

    def close(self, code: int) -> None:
        """Tell all to leave with a code; nobody joins any more."""
        with self.changed:
            self._closed = True
            for number, member in self.members.items():
                self.send(number, end=pb.End(code=code))
                member.tasks.put(None)
            self.changed.notify_all()
        if self.outlet is not None:
            self.outlet.close()

    # The workers' side: called by threads of the server.

    def join(self, request: pb.JoinRequest, deadline: float) -> pb.JoinResponse:
        """Take a worker in. Raises DptrainError where it would compute something else."""
        with self.changed:
            if self.stands_by:
                raise BusyError(
                    "the parameter server", expected="the chief", found="its standby", cure="join the chief"
                )
            if not self.changed.wait_for(lambda: self._identity is not None or self._closed, deadline):
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
            assert self._identity is not None
            self._compare(request, self._identity)
            # Not to be guessed: it is what tells a member from whoever else may call.
            epoch = secrets.randbits(63)
            member = Member(len(self.all) + 1, epoch, request.host, self.step, heard=time.monotonic())
            member.processes = max(1, request.processes)
            self.all.append(member)
            self.members[member.number] = member
            self.changed.notify_all()
            return pb.JoinResponse(membership=self._membership(member), step=self.step)

    def leave(self, membership: pb.Membership) -> None:
        """A worker leaves of its own will."""
        with self.changed:
            if self.member(membership) is not None:
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
            return True

    def push(self, piece: Piece) -> tuple[pb.Outcome.ValueType, str]:
        """A chunk of a partial."""
        place = piece.place
        if self.intake is None or place.membership.job != self.number:
            return pb.OUTCOME_STALE, "it is of another job"
        with self.changed:
            member = self.member(place.membership)
            open_ = self.open.get(place.lease)
            if member is None or open_ is None or open_.lease.member != member.number:
                return pb.OUTCOME_STALE, f"lease {place.lease} does not count any more"
            if place.step != open_.step:
                return pb.OUTCOME_STALE, f"lease {place.lease} is not of step {place.step}"
        outcome, reason = self.intake.take(piece)
        if outcome == pb.OUTCOME_COMPLETE:
            with self.changed:
                member.heard = time.monotonic()
                open_.whole = True
                if open_.rows is not None:
                    self.changed.notify_all()
        return outcome, reason

    def listen(self) -> Listening:
        """To the weights."""
        assert self.outlet is not None
        return self.outlet.listen()

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
    if not (isinstance(kind, type) and issubclass(kind, DptrainError)) or kind is errors.PeerFailed:
        kind = errors.WorkerCrashed
    return kind(failure.where, expected=failure.expected, found=failure.found, cure=failure.cure)
