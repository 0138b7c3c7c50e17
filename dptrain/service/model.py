"""A job as the service knows it, its states, and which may follow which. Numbers are those of the protos."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import Any

from dptrain.errors import JobError, RefusedTransition


class State(IntEnum):
    """Where a job stands."""

    QUEUED = 1
    STARTING = 2
    RUNNING = 3
    PAUSING = 4
    PAUSED = 5
    RECOVERING = 6
    CANCELLING = 7
    SUCCEEDED = 8
    FAILED = 9
    CANCELLED = 10


class Reason(IntEnum):
    """Why a job is in its state."""

    UNSPECIFIED = 0
    WAITING_FOR_SLOTS = 1
    BEHIND_OTHERS = 2
    TOO_LARGE = 3
    BACK_OFF = 4
    RESIZING = 5
    REQUESTED = 6
    JOB_ERROR = 7
    CRASHED = 8
    WORKERS_LOST = 9
    SUPERVISOR_LOST = 10
    TOO_LONG = 11
    STOPPED_FROM_OUTSIDE = 12


_LIVE = frozenset({State.STARTING, State.RUNNING, State.PAUSING, State.CANCELLING})

ENDED = frozenset({State.SUCCEEDED, State.FAILED, State.CANCELLED})
"""Nothing happens any more by itself."""

_STOPS = {State.PAUSING, State.CANCELLING}
_ENDS = {State.SUCCEEDED, State.FAILED, State.RECOVERING}

TRANSITIONS: Mapping[State, frozenset[State]] = {
    State.QUEUED: frozenset({State.STARTING, State.PAUSED, State.CANCELLED, State.FAILED}),
    State.STARTING: frozenset({State.RUNNING, State.QUEUED, *_STOPS, *_ENDS}),
    State.RUNNING: frozenset({*_STOPS, *_ENDS}),
    State.PAUSING: frozenset({State.PAUSED, State.QUEUED, State.CANCELLING, State.SUCCEEDED, State.FAILED}),
    State.PAUSED: frozenset({State.QUEUED, State.CANCELLED}),
    State.RECOVERING: frozenset({State.STARTING, State.RUNNING, State.PAUSED, State.CANCELLED, *_STOPS, *_ENDS}),
    State.CANCELLING: frozenset({State.CANCELLED, State.SUCCEEDED, State.FAILED}),
    State.SUCCEEDED: frozenset(),
    State.FAILED: frozenset({State.QUEUED}),
    State.CANCELLED: frozenset({State.QUEUED}),
}
"""What may follow a state; staying in it is always allowed."""

DEFAULT_RETRIES = 3
MOST_SECONDS = 366 * 86400.0
"""For which a job may be let run, or be given to end."""
MOST_WORKERS = 4096
_RANGE = re.compile(r"(\d{1,6})(?:\.\.(\d{1,6}))?", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class Spec:
    """What was asked for; see JobSpec of the protos. ``run_toml`` is the job with the paths of this machine."""

    job_toml: str
    run_toml: str
    name: str
    workers: tuple[int, int] = (1, 1)
    labels: Mapping[str, str] = field(default_factory=dict)
    priority: int = 0
    max_retries: int = DEFAULT_RETRIES
    max_seconds: float = 0.0
    model_source: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Job:
    """A job at one moment. Times are seconds since 1970, 0 where there was none yet.

    ``launch`` counts its supervisors from 1; ``faults`` those that were lost since ``reached``, the step of the newest
    checkpoint then. ``not_before`` is when it may start again, ``since`` when it began to wait. ``kill_at`` is when a
    job that was asked to stop is killed (0: never). ``trained`` are the seconds that earlier supervisors have run.
    """

    id: str
    owner: str
    spec: Spec
    state: State = State.QUEUED
    reason: Reason = Reason.UNSPECIFIED
    message: str = ""
    created: float = 0.0
    started: float = 0.0
    finished: float = 0.0
    updated: float = 0.0
    since: float = 0.0
    workers: int = 0
    launch: int = 0
    faults: int = 0
    reached: int = 0
    not_before: float = 0.0
    kill_at: float = 0.0
    trained: float = 0.0
    exit_code: int | None = None

    @property
    def live(self) -> bool:
        """Whether it holds slots: its supervisor may be there. One that recovers does as long as that one lives."""
        return self.state in _LIVE or (self.state is State.RECOVERING and self.workers > 0)

    @property
    def waits(self) -> bool:
        """Whether it waits for slots."""
        return self.state is State.QUEUED or (self.state is State.RECOVERING and not self.workers)

    def to(self, state: State, reason: Reason = Reason.UNSPECIFIED, message: str = "", **changes: Any) -> "Job":
        """The job in another state. Raises RefusedTransition where that may not follow."""
        if state is not self.state and state not in TRANSITIONS[self.state]:
            raise refused(self, f"to become {state.name}")
        return replace(self, state=state, reason=reason, message=message, **changes)


def refused(job: Job, wish: str, cure: str = "") -> RefusedTransition:
    """The error for something that a job's state does not allow."""
    after = ", ".join(sorted(state.name for state in TRANSITIONS[job.state]))
    return RefusedTransition(
        f"job {job.id}",
        expected=f"a state that allows it {wish}",
        found=f"{job.state.name}" + (f" ({job.message})" if job.message else ""),
        cure=cure or (f"it can become {after}" if after else "it has ended for good; submit it again"),
    )


def workers_of(text: str, slots: int) -> tuple[int, int]:
    """The least and the most workers that "4" or "2..8" mean. Raises JobError, also where ``slots`` are too few."""
    found = _RANGE.fullmatch(text or "1")
    least, most = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
    if not 1 <= least <= most <= MOST_WORKERS:
        raise JobError(
            "workers",
            expected=f'a number from 1 to {MOST_WORKERS} such as "4", or a range such as "2..8"',
            found=repr(text[:40]),
            cure="correct it",
        )
    if least > slots:
        raise JobError(
            "workers",
            expected=f"at most {slots}, the slots of this server",
            found=str(least),
            cure=f'ask for fewer, or for a range such as "1..{most}": the result has the same bits',
        )
    return least, most
