"""Who computes what: decided from who is there, what is answered and what time it is. Nothing here waits or sends."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

NARROWED = 16
"""The ranges at most that one is cut into."""


class Lease(NamedTuple):
    """A member's task: pieces of work lo to hi."""

    number: int
    member: int
    lo: int
    hi: int


@dataclass
class Range:
    """Work that is done as a whole, by whoever of its leases answers first."""

    lo: int
    hi: int
    leases: list[Lease] = field(default_factory=list)
    answer: Lease | None = None


class Grant(NamedTuple):
    """A range and who is to get it."""

    range: Range
    member: int


def shared(lo: int, hi: int, members: Sequence[int]) -> list[Grant]:
    """Contiguous ranges of lo to hi for members, in their order; lengths differ by at most one.

    Members beyond the amount of work get none.
    """
    work = hi - lo
    owners = members[:work]
    cuts = [lo + work * i // len(owners) for i in range(len(owners) + 1)] if owners else []
    return [Grant(Range(cuts[i], cuts[i + 1]), member) for i, member in enumerate(owners)]


def narrowed(lo: int, hi: int, members: Sequence[int]) -> list[Grant]:
    """Small ranges of lo to hi, one piece each where there are not many, for members in turn: one that is lost tells
    where it was.
    """
    size = -(-(hi - lo) // NARROWED)
    return [Grant(Range(at, min(at + size, hi)), members[i % len(members)]) for i, at in enumerate(range(lo, hi, size))]


def singled(grants: Sequence[Grant], seconds: Mapping[int, float], k: int) -> list[Grant]:
    """The grants with the last ``k`` shards of the slowest members, judged by their last seconds, one by one."""
    slowest = sorted(grants, key=lambda grant: -seconds.get(grant.member, 0.0))
    single: dict[int, int] = {}
    for grant in slowest:
        take = min(k - sum(single.values()), grant.range.hi - grant.range.lo)
        single[grant.member] = take
    found = []
    for grant in grants:
        lo, hi, member = grant.range.lo, grant.range.hi, grant.member
        cut = hi - single[member]
        found += [Grant(Range(lo, cut), member)] if lo < cut else []
        found += [Grant(Range(shard, shard + 1), member) for shard in range(cut, hi)]
    return found


def orphaned(ranges: Sequence[Range], living: Iterable[int]) -> list[Range]:
    """The ranges without an answer that none of the living computes."""
    alive = set(living)
    return [some for some in ranges if some.answer is None and not any(lease.member in alive for lease in some.leases)]


def idle(ranges: Sequence[Range], members: Sequence[int]) -> list[int]:
    """The members that have nothing left to answer."""
    busy = {lease.member for some in ranges for lease in some.leases if some.answer is None}
    return [member for member in members if member not in busy]


def doubled(ranges: Sequence[Range], members: Sequence[int], k: int) -> list[Grant]:
    """Single pieces that are computed by one member, for members with nothing to do: ``k`` at most of all ranges."""
    left = k - sum(len(some.leases) > 1 for some in ranges)
    free = idle(ranges, members)
    grants: list[Grant] = []
    for some in reversed(ranges):
        if left <= len(grants) or len(grants) >= len(free):
            break
        if some.answer is None and some.hi - some.lo == 1 and len(some.leases) == 1:
            grants.append(Grant(some, free[len(grants)]))
    return grants


def overdue(leases: Iterable[Lease], heard: Mapping[int, float], now: float, seconds: float) -> set[int]:
    """The members with a lease that were not heard of for too long."""
    return {lease.member for lease in leases if now - heard[lease.member] > seconds}


def until_overdue(leases: Iterable[Lease], heard: Mapping[int, float], now: float, seconds: float) -> float:
    """Seconds until the first of them would be overdue; infinite without leases."""
    return min((heard[lease.member] + seconds - now for lease in leases), default=float("inf"))
