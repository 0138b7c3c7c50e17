"""Who runs next: a pure function from what waits and what runs to what to do. It knows no clock and no process.

Order is by priority, which grows by one for every ``AGING`` seconds of waiting, then by time of submission. All workers
of a job start together or not at all; a job with a range gets its least number first and then what is left over. Where
the first in order does not fit, later ones may go past it for ``PATIENCE`` seconds of its waiting, not longer: what is
freed then is kept for it, so every job that fits the server at all gets its turn.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from dptrain.service.model import Reason

AGING = 600.0
"""Seconds of waiting that are worth one priority."""

PATIENCE = 60.0
"""Seconds for which the first in order lets others pass that fit where it does not."""

SETTLED = 30.0
"""Seconds that a job runs before its number of workers is changed, unless the server is told: a relaunch costs some."""

SWIFT = 5.0
"""At most as many where workers come and leave at a step: they cost the reading of their data."""

BACK_OFF, LONGEST_BACK_OFF = 1.0, 60.0


@dataclass(frozen=True)
class Waiting:
    """A job that has no slots. ``since``: when it began to wait; ``not_before``: when it may start."""

    id: str
    least: int
    most: int
    priority: int
    created: float
    since: float
    not_before: float = 0.0


@dataclass(frozen=True)
class Running:
    """A job that holds ``workers`` slots; one that is ``leaving`` gives them back soon, by itself.

    ``started``: since when it has had so many, which it has for ``settles`` seconds at least. It is ``changing`` while
    others come at a step, and gives ``returned`` slots back soon where some leave.
    """

    id: str
    workers: int
    least: int
    most: int
    priority: int
    started: float
    leaving: bool = False
    settles: float = SETTLED
    changing: bool = False
    returned: int = 0


@dataclass(frozen=True)
class Plan:
    """What to do now: jobs to start, with so many workers; running jobs to start again with so many; why others wait.

    ``wake`` is when to ask again though nothing has changed; None: never.
    """

    starts: Mapping[str, int] = field(default_factory=dict)
    resizes: Mapping[str, int] = field(default_factory=dict)
    reasons: Mapping[str, tuple[Reason, str]] = field(default_factory=dict)
    wake: float | None = None


def plan(waiting: Sequence[Waiting], running: Sequence[Running], slots: int, now: float) -> Plan:
    """Decide. Never gives out more than ``slots``; says of every job that does not start why."""
    free = slots - sum(job.workers for job in running)
    order = sorted(waiting, key=lambda job: (-(job.priority + (now - job.since) // AGING), job.created, job.id))
    starts: dict[str, int] = {}
    reasons: dict[str, tuple[Reason, str]] = {}
    wakes: list[float] = []
    first: Waiting | None = None
    for place, job in enumerate(order):
        if job.least > slots:
            reasons[job.id] = Reason.TOO_LARGE, f"it wants {_workers(job.least)}, this server has {_slots(slots)}"
        elif job.not_before > now:
            wakes.append(job.not_before)
            reasons[job.id] = Reason.BACK_OFF, ""
        elif first is not None and now - first.since >= PATIENCE:
            reasons[job.id] = Reason.BEHIND_OTHERS, f"{_jobs(place)} before it; slots are kept for {first.id}"
        elif job.least <= free:
            starts[job.id] = job.least
            free -= job.least
        else:
            why = (
                f"it wants {_workers(job.least)}, {_free(free)} of {_slots(slots)} {'is' if free == 1 else 'are'} free"
            )
            reasons[job.id] = Reason.WAITING_FOR_SLOTS, why
            if first is None:
                first = job
                if now - job.since < PATIENCE:
                    wakes.append(job.since + PATIENCE)
    by_id = {job.id: job for job in order}
    if first is None:
        # What nobody waits for goes to those that start, in order.
        for name in starts:
            more = min(by_id[name].most - starts[name], free)
            starts[name] += more
            free -= more
    resizes = _shrink(first, running, free, now) if first is not None else _grow(running, free, now)
    wakes += [_settles(job) for job in running if _elastic(job) and _settles(job) > now]
    return Plan(starts, resizes, reasons, min(wakes, default=None))


def place(workers: int, free: Mapping[str, int]) -> dict[str, int]:
    """On which nodes so many workers go, of those that have slots free: as few as can be, and of one the tightest.

    Less than ``workers`` where there are not so many slots.
    """
    enough = [(slots, name) for name, slots in free.items() if slots >= workers]
    if enough:
        return {min(enough)[1]: workers}
    found: dict[str, int] = {}
    for name in sorted(free, key=lambda name: (-free[name], name)):
        taken = min(free[name], workers - sum(found.values()))
        if taken > 0:
            found[name] = taken
    return found


def reshaped(placed: Mapping[str, int], workers: int, free: Mapping[str, int]) -> dict[str, int]:
    """Where so many workers are that were ``placed`` so: who need not move does not.

    Those that come go where slots are ``free``, if they can where others are; those that leave do it where there are
    the fewest. Less than ``workers`` where there are not so many slots.
    """
    found = dict(placed)
    surplus = sum(found.values()) - workers
    for name in sorted(found, key=lambda name: (found[name], name)):
        taken = max(0, min(found[name], surplus))
        found[name] -= taken
        surplus -= taken
    for name in sorted(found, key=lambda name: (-found[name], name)):
        more = max(0, min(free.get(name, 0), -surplus))
        found[name] += more
        surplus += more
    if surplus < 0:
        for name, more in place(-surplus, {name: slots for name, slots in free.items() if name not in found}).items():
            found[name] = more
    return {name: slots for name, slots in found.items() if slots}


def _shrink(first: Waiting, running: Sequence[Running], free: int, now: float) -> dict[str, int]:
    """Take from jobs that have more than their least, the least important first, just enough for the first in order."""
    lacking = first.least - free - sum(job.workers if job.leaving else job.returned for job in running)
    if lacking <= 0:
        return {}
    found: dict[str, int] = {}
    for job in sorted(running, key=lambda job: (job.priority, -job.started)):
        if lacking > 0 and _settled(job, now) and job.workers > job.least:
            taken = min(job.workers - job.least, lacking)
            found[job.id] = job.workers - taken
            lacking -= taken
    return found if lacking <= 0 else {}


def _grow(running: Sequence[Running], free: int, now: float) -> dict[str, int]:
    """Give what is free to the most important job that can use it. One at a time."""
    if any(job.leaving or job.changing for job in running):
        return {}
    for job in sorted(running, key=lambda job: (-job.priority, job.started)):
        if free > 0 and _settled(job, now) and job.workers < job.most:
            return {job.id: job.workers + min(free, job.most - job.workers)}
    return {}


def _elastic(job: Running) -> bool:
    return job.least < job.most and not job.leaving and not job.changing


def _settles(job: Running) -> float:
    return job.started + job.settles


def _settled(job: Running, now: float) -> bool:
    return _elastic(job) and now >= _settles(job)


def back_off(faults: int) -> float:
    """Seconds before the start after the ``faults``-th fault in a row."""
    return min(LONGEST_BACK_OFF, BACK_OFF * 2.0 ** (max(1, faults) - 1))


@dataclass(frozen=True)
class Kept:
    """A job that has ended, and how many bytes it takes."""

    id: str
    finished: float
    bytes: int


def outlived(kept: Sequence[Kept], now: float, seconds: float, most: int) -> list[str]:
    """The jobs to remove: those that ended more than ``seconds`` ago, and the oldest until ``most`` bytes are left.

    0 means no such limit. The newest is never removed for its size.
    """
    order = sorted(kept, key=lambda job: (job.finished, job.id))
    found = [job.id for job in order if seconds and now - job.finished > seconds]
    left = [job for job in order if job.id not in set(found)]
    total = sum(job.bytes for job in left)
    for job in left[:-1]:
        if not most or total <= most:
            break
        found.append(job.id)
        total -= job.bytes
    return found


def _workers(n: int) -> str:
    return "1 worker" if n == 1 else f"{n} workers"


def _slots(n: int) -> str:
    return "1 slot" if n == 1 else f"{n} slots"


def _free(n: int) -> str:
    return "none" if n <= 0 else str(n)


def _jobs(n: int) -> str:
    return "1 job is" if n == 1 else f"{n} jobs are"
