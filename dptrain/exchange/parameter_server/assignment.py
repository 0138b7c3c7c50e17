"""What the chief of the parameter servers has the workers do: it is given out until every piece has an answer.

Who is gone, or says nothing, is given up, and what it had to do goes to others; of answers that differ nobody's counts.
"""

import sys
import time
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from dptrain.errors import DeadlineError, DisagreementError, PoisonError, WorkerLost
from dptrain.exchange.parameter_server import leases
from dptrain.exchange.parameter_server.hub import Hub, Member
from dptrain.exchange.parameter_server.intake import Box, Intake
from dptrain.exchange.parameter_server.leases import Grant, Lease, Range
from dptrain.exchange.parameter_server.servers import Chief

Memory = tuple[int, int]
"""A member, and which of the places for its partials."""

Ask = Callable[[Sequence[Grant]], None]
"""Gives ranges to members; called with the hub's lock held."""

Fits = Callable[[Range, npt.NDArray[np.float64]], bool]
"""Whether the rows of an answer are as many as a range has."""

LOOK = 0.5
"""Seconds between looks at the clock while nothing comes."""

LATE = 256
"""Leases that another's answer overtook, of which what still comes is compared; older ones are forgotten."""


class Assignment:
    """Of work to whoever takes part. ``lease_seconds`` without a sign of life end a lease; a run of which nobody takes
    part for ``deadline`` seconds is over. ``lost`` is told of every worker that is.
    """

    def __init__(self, servers: Chief, lost: Callable[[Member], None], lease_seconds: float, deadline: float) -> None:
        self._hub: Hub = servers.hub
        self._servers, self._lost = servers, lost
        self._lease_seconds, self._deadline = lease_seconds, deadline
        self.boxes: dict[int, tuple[Memory, Box]] = {}
        """By leases of which vectors come: where those lie."""
        self.rows: dict[int, npt.NDArray[np.float64]] = {}
        """By leases whose answer counts: its tallies or sums."""
        self._outvoted: set[int] = set()
        self._suspects: dict[int, list[int]] = {}
        self._suspected_at = -1, ""
        self._late: dict[int, tuple[Lease, int, int]] = {}
        """Leases that another's answer overtook: the other's, its step, and the member that is late."""

    def renew(self, intake: Intake) -> None:
        """Vectors come here from now on; what was late before is not compared any more."""
        self._intake = intake
        self._late = {}

    def answered(
        self,
        at: tuple[int, str],
        total: int,
        ask: Ask,
        fits: Fits,
        backup: int,
    ) -> list[Range]:
        """Have ``total`` pieces of work done by whoever is there; the ranges, in order, each with its answer.

        ``at`` is the step, and the part of the data where that is evaluated.
        """
        hub, (step, _) = self._hub, at
        if not total:
            return []
        self.rows, self._outvoted = {}, set()
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
                self.look_up()
                for some in self.read(ranges, fits):
                    self._ask_another(some, ranges, ask)
                self._disagree(self._intake.differing())
                if all(some.answer is not None for some in ranges):
                    break
                now = time.monotonic()
                open_ = [
                    lease for some in ranges if some.answer is None for lease in some.leases if self._pending(lease)
                ]
                living = [lease for lease in open_ if lease.member in hub.members]
                heard = hub.heard()
                for number in leases.overdue(living, heard, now, self._lease_seconds):
                    hub.lose(number, f"said nothing for {self._lease_seconds:g} s")
                if hub.losses:
                    self._mourn(at, open_)
                    self._give_anew(at, ranges, ask)
                elif not hub.members:
                    if now - alone_since > self._deadline:
                        raise self.deserted(step)
                else:
                    alone_since = now
                    if leases.orphaned(ranges, hub.members):
                        self._give_anew(at, ranges, ask)
                    elif backup:
                        ask(leases.doubled(ranges, sorted(hub.members), backup))
                wait = leases.until_overdue(living, heard, now, self._lease_seconds)
                hub.changed.wait(min(LOOK, max(0.0, wait)))
            self._disagree(self._compared(ranges, step))
            hub.chosen(self._late)
        return sorted(ranges, key=lambda some: some.lo)

    def look_up(self) -> None:
        """Raises what a worker failed with, and WorkerLost where a server is gone."""
        if self._hub.failure is not None:
            raise self._hub.failure
        if self._servers.disturbed:
            raise disturbed()

    def read(self, ranges: Sequence[Range], fits: Fits) -> list[Range]:
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
                open_ = self._hub.open.get(lease.number)
                if open_ is None or not open_.whole or open_.rows is None:
                    continue
                if not fits(some, open_.rows):
                    self._hub.lose(lease.member, "answered something else")
                elif self._finite(lease, open_.rows):
                    some.answer = lease
                    break
                else:
                    doubtful.append(lease)
            if some.answer is None and doubtful:
                if len(doubtful) > 1 or not self._others(some):
                    some.answer = doubtful[0]
                elif all(lease in doubtful or lease.member not in self._hub.members for lease in some.leases):
                    asked.append(some)
            elif some.answer is not None:
                for lease in doubtful:
                    self._outvoted.add(lease.number)
                    print(
                        f"dptrain: worker {lease.member} at step {self._hub.step}: its gradient of shards {some.lo} to "
                        f"{some.hi - 1} is not finite, worker {some.answer.member}'s is: that counts",
                        file=sys.stderr,
                        flush=True,
                    )
            if some.answer is not None:
                rows = self._hub.open[some.answer.number].rows
                assert rows is not None
                self.rows[some.answer.number] = rows
        return asked

    def lost_before(self, at: tuple[int, str], some: Range) -> bool:
        """Whether somebody was lost with some of this before."""
        return self._suspected_at == at and any(piece in self._suspects for piece in range(some.lo, some.hi))

    def deserted(self, step: int) -> DeadlineError:
        """What ends a run in which nobody has taken part for too long."""
        return DeadlineError(
            f"the parameter server at step {step}",
            expected=f"a worker within {self._deadline:g} s",
            found="none",
            cure="start some with `dptrain worker --server ADDRESS`, and go on with --resume",
        )

    def _finite(self, lease: Lease, rows: npt.NDArray[np.float64]) -> bool:
        """Whether an answer is, or is none of which that is asked."""
        known, open_ = self.boxes.get(lease.number), self._hub.open[lease.number]
        return known is None or (known[1].finite and open_.finite and bool(np.isfinite(rows).all()))

    def _others(self, some: Range) -> list[int]:
        """Who takes part and has not answered yet for a range."""
        answered = {lease.member for lease in some.leases if not self._pending(lease)}
        return [number for number in self._hub.working() if number not in answered]

    def _pending(self, lease: Lease) -> bool:
        """Whether there is no whole answer yet."""
        open_ = self._hub.open.get(lease.number)
        return open_ is None or not open_.whole or open_.rows is None

    def _ask_another(self, some: Range, ranges: Sequence[Range], ask: Ask) -> None:
        """Let another worker compute a range too."""
        others = self._others(some)
        ask([Grant(some, [*leases.idle(ranges, others), *others][0])])

    def _compared(self, ranges: Sequence[Range], step: int) -> list[int]:
        """The leases of which something else came than of who was first; what is yet to come is compared later."""
        differing = []
        for some in ranges:
            first = some.answer
            if first is None or first.number not in self.boxes:
                continue
            for lease in some.leases:
                if lease is first or lease.number in self._outvoted or lease.number not in self._hub.open:
                    continue
                while len(self._late) >= LATE:
                    old = next(iter(self._late))
                    del self._late[old]
                    self._hub.open.pop(old, None)
                    self._intake.compare_no_more(old)
                self._late[lease.number] = first, step, lease.member
                rows = self._hub.open[lease.number].rows
                other = rows is not None and rows.tobytes() != self.rows[first.number].tobytes()
                if self._intake.differ(lease.number, self.boxes[first.number][1]) or other:
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
        hub = self._hub
        until = time.monotonic() + self._deadline
        while not (working := hub.working()):
            self.look_up()
            if time.monotonic() > until:
                raise self.deserted(hub.step)
            hub.changed.wait(LOOK)
        return working

    def _give_anew(self, at: tuple[int, str], ranges: list[Range], ask: Ask) -> None:
        """Give what the gone had to do to those that are there, if there are any."""
        hub = self._hub
        working = hub.working()
        if not working:
            return
        for some in leases.orphaned(ranges, hub.members):
            ranges.remove(some)
            free = leases.idle(ranges, working)
            order = free + [member for member in working if member not in free]
            cut = leases.narrowed if self.lost_before(at, some) else leases.shared
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
        gone, self._hub.losses = self._hub.losses, []
        for member, why in gone:
            self._lost(member)
            if why == "left":
                continue
            theirs = [self._hub.open.get(lease.number) for lease in open_ if lease.member == member.number]
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


def poison(shard: int, step: int, lost: Sequence[int], part: str = "") -> PoisonError:
    """What ends a run in which two workers were ``lost`` at a shard, or at a block of the ``part`` evaluated."""
    return PoisonError(
        f"{f'block {shard} of {part}' if part else f'shard {shard}'} at step {step}",
        expected="its owner to live",
        found=f"that workers {lost[0]} and {lost[1]} were lost while they were at it, one after the other",
        cure="look at that shard's rows and at the model: whatever is in them ends every worker",
    )


def disturbed() -> WorkerLost:
    """One of the servers is gone."""
    return WorkerLost("the parameter servers", expected="all to live", found="a death", cure="the others meet")
