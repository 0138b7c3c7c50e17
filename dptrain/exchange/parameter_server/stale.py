"""Servers that make a step of each batch's gradient when it arrives, though it may be of older weights.

A worker computes a whole batch, or several share one where fewer may be under way than there are workers (`flights`
decides), and gets the newest weights with what it is to do next. The order of arrival decides the bits; it is told with
every step, so that it can be logged and replayed.
"""

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from dptrain.arrivals import Arrival, Part, share_of
from dptrain.exchange.parameter_server import leases
from dptrain.exchange.parameter_server.assignment import LOOK, Memory, poison
from dptrain.exchange.parameter_server.exchange import ParameterServer
from dptrain.exchange.parameter_server.flights import Flight, Flights, Piece
from dptrain.exchange.parameter_server.intake import Box
from dptrain.exchange.parameter_server.leases import Lease, Range
from dptrain.exchange.verdict import Report, Verdict
from dptrain.membership import Membership
from dptrain.nn.accumulate import Partials
from dptrain.phases import Phase
from dptrain.state import State
from dptrain.tree import subtrees
from dptrain.v1 import parameter_server_pb2 as pb

Came = tuple[int, Memory, Box, npt.NDArray[np.float64]]
"""What a lease brought: its number, where the vectors lie, their box, the tallies."""


class StaleParameterServer(ParameterServer):
    """``bound`` is the highest staleness of an update, None for any; ``way`` what staleness does to the learning rate.

    The chief alone decides what arrives; other servers are told of it before they add up.
    """

    same_bits = False
    hands_out = True
    bound: int | None = None
    way = "constant"

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._begin_anew()

    def begin(self, step: int, total: int, pending: Sequence[int]) -> bool:
        """See Exchange."""
        self._total_steps = total
        self._left_out = {step: tuple(pending)}
        """By the steps that were made then; of the newest two."""
        with self.hub.changed:
            for number in self._busy:
                # What it computes counts no more, and it can't be told.
                self.hub.lose(number, "left")
        self._begin_anew()
        return True

    def _begin_anew(self) -> None:
        self._flights: Flights | None = None
        self._leased: dict[int, tuple[Piece, Memory, Box]] = {}
        self._came: dict[Piece, Came] = {}
        self._places: dict[int, set[int]] = {}
        self._busy: dict[int, Lease] = {}
        self._abandoned: list[int] = []
        self._lost: dict[tuple[int, int], list[int]] = {}

    def lead(self, membership: Membership) -> None:
        """Go on with the servers that are left; what was under way is begun anew, by workers that join anew."""
        self._begin_anew()
        super().lead(membership)

    def swap(self, state: State, partials: Partials, report: Report) -> tuple[State, Verdict]:
        """See Exchange."""
        self.arrival = None
        try:
            return super().swap(state, partials, report)
        finally:
            # Whether the step counts may turn out later, where another server dies.
            if self.arrival is not None:
                before = self._left_out.get(state.step, ())
                self._left_out = {state.step: before, state.step + 1: self.arrival.pending}

    def _under_way(self, step: int) -> Flights:
        if self._flights is None:
            pending = self._left_out.get(step, ())
            first = step + len(pending)
            self._flights = Flights(self.membership.shards, self._total_steps, self.bound, first, pending)
        return self._flights

    def _computed(self, state: State) -> npt.NDArray[np.float64]:
        """The tallies of the batch that makes the next step; its partials are here, and their sum is prepared."""
        hub, step, flights = self.hub, state.step, self._under_way(state.step)
        self.phases.begin(Phase.WAITING, "partials")
        started = self._alone_since = time.monotonic()
        with hub.changed:
            hub.step = step
            while True:
                self._attend(step)
                flight = flights.ripe(step)
                if flight is not None:
                    break
                working = hub.working()
                for member in self._free(working):
                    piece = flights.wanted(len(working))
                    if piece is not None:
                        self._ask(member, piece, step)
                self._wait()
        self.waited += time.monotonic() - started
        self.phases.begin(Phase.EXCHANGE)
        return self._landed(flight, step)

    def _landed(self, flight: Flight, step: int) -> npt.NDArray[np.float64]:
        """The tallies of a batch that makes a step, and word of it for the other servers."""
        pieces = sorted(flight.pieces, key=lambda piece: piece.lo)
        parts = tuple(Part(piece.lo, piece.hi, piece.version or 0, piece.member) for piece in pieces)
        staleness = step - min(part.weights for part in parts)
        pending = self._under_way(step).pending
        self.arrival = Arrival(flight.batch, parts, staleness, share_of(staleness, self.way), pending)
        came = [self._came.pop(piece) for piece in pieces]
        for _, (member, place), _, _ in came:
            self._places.get(member, set()).discard(place)
        self._chosen = [(lease, *memory) for lease, memory, _, _ in came]
        self._ended = self._abandoned + [lease for lease, *_ in came]
        self._abandoned = []
        self.hub.over(self._ended)
        return self._finished([(memory, box, rows) for _, memory, box, rows in came])

    def _ask(self, member: int, piece: Piece, step: int) -> None:
        """Have a member compute a piece with the newest weights."""
        taken = self._places.setdefault(member, set())
        place = next(i for i in range(1, len(taken) + 2) if i not in taken)
        taken.add(place)
        again = any((piece.batch, shard) in self._lost for shard in range(piece.lo, piece.hi))
        lease = self.hub.lease(
            member, piece.lo, piece.hi, count=place, step=piece.batch, weights=(step, False), again=again
        )
        nodes = subtrees(piece.lo, piece.hi, self.membership.shards)
        box = self.intake.expect(lease.number, member, place, nodes)
        piece.version, piece.member = step, member
        self._leased[lease.number] = piece, (member, place), box
        self._busy[member] = lease
        task = pb.Compute(lease=lease.number, step=piece.batch, lo=piece.lo, hi=piece.hi, weights=step, again=again)
        self.hub.send(member, compute=task)

    def _evaluated(self, rows: npt.NDArray[np.float64], total: int, step: int, phase: str) -> npt.NDArray[np.float64]:
        """By whoever has nothing else to do, in pieces that become smaller: who is slow gets fewer."""
        hub, width = self.hub, rows.shape[1]
        best, part = self._question
        ranges: list[Range] = []
        given = 0
        self._assignment.rows = {}
        self.phases.begin(Phase.WAITING, phase)
        self._alone_since = time.monotonic()
        with hub.changed:
            while True:
                self._attend(step)
                self._assignment.read(ranges, lambda some, found: found.size == (some.hi - some.lo) * width)
                if given == total and all(some.answer is not None for some in ranges):
                    break
                working, orphans = hub.working(), leases.orphaned(ranges, hub.members)
                for member in self._free(working):
                    if not orphans and given == total:
                        break
                    if not orphans:
                        size = max(1, (total - given) // (2 * len(working)))
                        orphans = [Range(given, given + size)]
                        ranges += orphans
                        given += size
                    some = orphans.pop(0)
                    lease = hub.lease(member, some.lo, some.hi, weights=(step, best is not None))
                    some.leases.append(lease)
                    self._busy[member] = lease
                    task = pb.Evaluate(
                        lease=lease.number, step=step, part=part, lo=some.lo, hi=some.hi, best=best is not None
                    )
                    hub.send(member, evaluate=task)
                self._wait()
            hub.over([lease.number for some in ranges for lease in some.leases])
        self.phases.begin(Phase.EVALUATION)
        found = self._assignment.rows
        parts = [found[some.answer.number].reshape(-1, width) for some in ranges if some.answer is not None]
        return np.concatenate(parts) if parts else rows

    def _free(self, working: Sequence[int]) -> list[int]:
        """Those with nothing to do. A member has one task at a time, so that it gets one version at a time."""
        return [member for member in working if member not in self._busy]

    def _attend(self, step: int) -> None:
        """Take in what has come, and see who is gone."""
        self._assignment.look_up()
        hub, flights = self.hub, self._under_way(step)
        for number, (piece, memory, box) in list(self._leased.items()):
            open_ = hub.open[number]
            if open_.rows is None or not open_.whole:
                continue
            if len(open_.rows) != len(box.nodes):
                hub.lose(memory[0], "answered something else")
                continue
            del self._leased[number]
            self._came[piece] = number, memory, box, open_.rows
            flights.arrived(piece)
        for member, lease in list(self._busy.items()):
            answered = hub.open.get(lease.number)
            if answered is None or (answered.whole and answered.rows is not None):
                del self._busy[member]
        now = time.monotonic()
        heard = hub.heard()
        living = [lease for member, lease in self._busy.items() if member in heard]
        for number in leases.overdue(living, heard, now, self.lease_seconds):
            hub.lose(number, f"said nothing for {self.lease_seconds:g} s")
        if hub.losses:
            self._bury(step, flights)
        if hub.members:
            self._alone_since = now
        elif now - self._alone_since > self.deadline:
            raise self._assignment.deserted(step)

    def _bury(self, step: int, flights: Flights) -> None:
        """Let others do what the gone had to do. Raises PoisonError where two were lost at what others had been lost
        with before.
        """
        gone, self.hub.losses = self.hub.losses, []
        for member, why in gone:
            self._forget(member)
            self._busy.pop(member.number, None)
            self._places.pop(member.number, None)
            theirs = [number for number, (_, memory, _) in self._leased.items() if memory[0] == member.number]
            # A member has one task at a time.
            had = [self.hub.open[number] for number in theirs]
            again = any(lost.again for lost in had)
            blames = why != "left" and all(lost.begun or not lost.again for lost in had)
            for number in theirs:
                del self._leased[number]
            self._abandoned += theirs
            for piece in flights.lost(member.number):
                for shard in range(piece.lo, piece.hi) if blames else ():
                    before = self._lost.setdefault((piece.batch, shard), [])
                    if again:
                        before.append(member.number)
                    if len(before) > 1:
                        raise poison(shard, piece.batch, before)

    def _wait(self) -> None:
        """Until something comes, or somebody is overdue."""
        hub = self.hub
        heard = hub.heard()
        living = [lease for member, lease in self._busy.items() if member in heard]
        wait = leases.until_overdue(living, heard, time.monotonic(), self.lease_seconds)
        hub.changed.wait(min(LOOK, max(0.0, wait)))
