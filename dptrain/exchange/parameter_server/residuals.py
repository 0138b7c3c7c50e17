"""Where shards' residuals are, and how they get from one worker to another.

A residual lies with the worker that computed its shard last. It goes by way of the chief to who computes the shard
next, and to a checkpoint. Which of a shard's residuals one is, its age tells: steps and updates when it was made. As
the state before each step is the same whoever leads to it, so is the residual of an age. That before the first update
is zero, and everybody has it.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from dptrain.exchange.parameter_server.codec import checksum, cuts
from dptrain.exchange.parameter_server.leases import Lease
from dptrain.layout import Array
from dptrain.nn.accumulate import Residuals
from dptrain.v1 import parameter_server_pb2 as pb

SERVER = 0
"""This server among the holders of a residual."""


class Age(NamedTuple):
    """Which of a shard's residuals: made by ``step`` steps, of which ``updates`` updated the weights."""

    step: int
    updates: int

    @classmethod
    def of(cls, said: pb.Age) -> "Age":
        """As it came."""
        return cls(said.step, said.updates)

    @property
    def said(self) -> pb.Age:
        """As it is sent."""
        return pb.Age(step=self.step, updates=self.updates)


Claims = dict[int, set[Age]]
"""What a worker said, when it joined, that it has of each shard."""


def claimed(said: Iterable[pb.Kept]) -> Claims:
    """What a worker that joins has."""
    found: Claims = {}
    for kept in said:
        found.setdefault(kept.shard, set()).add(Age.of(kept.age))
    return found


def parts(vector: Array, shard: int, age: Age) -> Iterator[pb.Residual]:
    """A residual as it is sent."""
    for start, stop in cuts(len(vector), vector.itemsize):
        data = vector[start:stop].tobytes()
        kept = pb.Kept(shard=shard, age=age.said)
        yield pb.Residual(kept=kept, offset=start, data=data, checksum=checksum(data))


class Arriving:
    """A residual that comes in parts, in their order, into ``into``."""

    def __init__(self, into: Array) -> None:
        self._into, self._next = into, 0

    def take(self, part: pb.Residual) -> bool:
        """Whether it is whole with this part. Raises ValueError where that is not the next, or damaged."""
        stop = dict(cuts(len(self._into), self._into.itemsize)).get(part.offset)
        if part.offset != self._next or stop is None or len(part.data) != (stop - part.offset) * self._into.itemsize:
            raise ValueError("not the next part")
        if checksum(part.data) != part.checksum:
            raise ValueError("not the bytes that were sent")
        self._into[part.offset : stop] = np.frombuffer(part.data, self._into.dtype)
        self._next = stop
        return stop == len(self._into)


class Ledger:
    """Which members hold which shard's residual of the committed age. To be used with the hub's lock held.

    ``rows`` are this server's own, of as many shards, and count where it is among the holders itself.
    """

    def __init__(self, rows: Sequence[Array]) -> None:
        self.rows = rows
        self.age: Age | None = None
        self._holders: list[set[int]] = [set() for _ in rows]
        self._asked: dict[int, tuple[int, Arriving]] = {}

    def begin(self) -> None:
        """This server has those of the state that is gone on from."""
        self.age = None
        self._holders = [{SERVER} for _ in self.rows]
        self._asked.clear()

    def ask_no_more(self) -> None:
        """What was asked for and has not come is of no interest."""
        self._asked.clear()

    def renew(self) -> None:
        """Workers join anew, and say what they have."""
        for holders in self._holders:
            holders &= {SERVER}
        self._asked.clear()

    def at(self, age: Age) -> None:
        """Another server may have committed what this one has not seen: then nobody is known to have anything."""
        if self.age is not None and self.age.updates != age.updates:
            self.committed(age, ())
        elif self.age is None:
            self.age = age

    def committed(self, age: Age, computed: Iterable[Lease]) -> None:
        """A step counts; who computed which shards has their residuals."""
        self.age = age
        self._holders = [set() for _ in self.rows]
        for lease in computed:
            for shard in range(lease.lo, lease.hi):
                self._holders[shard] = {lease.member}

    def holders(self, shard: int, claims: Mapping[int, Claims]) -> list[int]:
        """Who has a shard's residual, of members with these claims and this server."""
        known = {member for member in self._holders[shard] if member == SERVER or member in claims}
        return sorted(known | {member for member, their in claims.items() if self.age in their.get(shard, ())})

    def lacks(self, shard: int, member: int, claims: Mapping[int, Claims]) -> bool:
        """Whether a member has to be sent a shard's residual before it computes the shard."""
        assert self.age is not None
        return bool(self.age.updates) and member not in self.holders(shard, claims)

    def here(self, shard: int) -> bool:
        """Whether this server has it."""
        return SERVER in self._holders[shard]

    def granted(self, shard: int, member: int, claims: Claims) -> None:
        """The member has it now, and what it said before of that shard will be true no longer."""
        self._holders[shard].add(member)
        claims.pop(shard, None)

    def ask(self, shard: int, member: int) -> pb.Kept | None:
        """What to ask a member for, so that it comes here; None where that was done."""
        assert self.age is not None
        if shard in self._asked and self._asked[shard][0] == member:
            return None
        self._asked[shard] = member, Arriving(self.rows[shard])
        return pb.Kept(shard=shard, age=self.age.said)

    def take(self, member: int, part: pb.Residual) -> None:
        """A part from a member. What was not asked for is of no interest."""
        shard = part.kept.shard
        asked, arriving = self._asked.get(shard, (None, None))
        if asked != member or arriving is None or Age.of(part.kept.age) != self.age:
            return
        try:
            whole = arriving.take(part)
        except ValueError:
            # It is asked for again.
            del self._asked[shard]
            return
        if whole:
            del self._asked[shard]
            self._holders[shard].add(SERVER)


class Keeping:
    """A worker's residuals: of each shard that it has computed the last two, in ``memory`` (2, shards, parameters).

    One that ``updates`` updates led to lies on the side of their parity, so that the next is written beside it, and
    stays where the step that made it does not count.
    """

    def __init__(self, memory: Array) -> None:
        self._sides = [list(side) for side in memory]
        self._ages: list[list[Age | None]] = [[None] * len(side) for side in memory]
        self._arriving: dict[int, tuple[Age, Arriving]] = {}

    def begin(self, age: Age, lo: int, hi: int) -> None:
        """Shards lo to hi are to be computed with those of that age. Raises KeyError where one is missing."""
        for shard in range(lo, hi):
            if age.updates == 0 and self._ages[0][shard] != age:
                self._sides[0][shard].fill(0)
                self._ages[0][shard] = age
            self.row(shard, age)
            self._ages[1 - age.updates % 2][shard] = None

    def ended(self, age: Age, step: int, lo: int, hi: int) -> None:
        """They were computed at ``step``."""
        for shard in range(lo, hi):
            self._ages[1 - age.updates % 2][shard] = Age(step + 1, age.updates + 1)

    def row(self, shard: int, age: Age) -> Array:
        """The residual of that age. Raises KeyError where it is not here."""
        side = age.updates % 2
        if not shard < len(self._ages[side]) or self._ages[side][shard] != age:
            raise KeyError(f"residual of shard {shard} after step {age.step}")
        row: Array = self._sides[side][shard]
        return row

    def take(self, part: pb.Residual) -> None:
        """A part of one that is computed with next. Raises ValueError where it can't be."""
        age, shard = Age.of(part.kept.age), part.kept.shard
        side = age.updates % 2
        if not shard < len(self._sides[side]):
            raise ValueError("no such shard")
        if part.offset == 0:
            self._ages[side][shard] = None
            self._arriving[shard] = age, Arriving(self._sides[side][shard])
        coming, arriving = self._arriving.get(shard, (None, None))
        if coming != age or arriving is None:
            raise ValueError("not the next part")
        if arriving.take(part):
            del self._arriving[shard]
            self._ages[side][shard] = age

    def claims(self) -> list[pb.Kept]:
        """All that is here."""
        return [
            pb.Kept(shard=shard, age=age.said)
            for ages in self._ages
            for shard, age in enumerate(ages)
            if age is not None
        ]


def beside(memory: Array, updates: int) -> Residuals:
    """Where shards' residuals lie that so many updates led to, and where the next are to be written."""
    return Residuals(list(memory[updates % 2]), list(memory[1 - updates % 2]))
