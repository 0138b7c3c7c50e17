"""What the page needs to know, and from whom: the service's store, or a folder of run directories."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol


class Who(Protocol):
    """A person as the server knows them; ``role`` is "read", "submit" or "admin"."""

    @property
    def name(self) -> str:
        """Who owns what they submit."""

    @property
    def role(self) -> str:
        """What they may do."""


@dataclass(frozen=True)
class Local:
    """Whoever can reach a server that wants no token: loopback only."""

    name: str = "local"
    role: str = "admin"


class Door(Protocol):
    """Knows the tokens."""

    def identify(self, token: str) -> Who | None:
        """Whose token it is, compared in constant time; None: nobody's."""


@dataclass(frozen=True, kw_only=True)
class JobView:
    """A job as the page shows it. Times are seconds since 1970, 0 where there was none; ``remaining`` are seconds.

    ``state`` is a name of the proto's states without its prefix, ``verbs`` what may be asked of it now, ``losses`` a
    few points of its curve, ``result`` what result.json holds of it.
    """

    id: str
    name: str
    state: str
    owner: str = ""
    reason: str = ""
    message: str = ""
    created: float = 0.0
    started: float = 0.0
    finished: float = 0.0
    workers: int = 0
    priority: int = 0
    launches: int = 0
    step: int = 0
    total_steps: int = 0
    epoch: float = 0.0
    loss: float | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    samples_per_second: float = 0.0
    remaining: float | None = None
    recoveries: int = 0
    losses: Sequence[float] = ()
    verbs: Sequence[str] = ()
    result: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Line:
    """A line of a log. ``stream`` is "out" or "err"."""

    time: float
    stream: str
    rank: int
    text: str


@dataclass(frozen=True)
class Lines:
    """Some lines, and where the next begin."""

    lines: Sequence[Line]
    cursor: str


@dataclass(frozen=True)
class File:
    """A file of a run, by its path below the run directory."""

    path: str
    size: int
    modified: float


VERBS = ("pause", "resume", "cancel", "retry")

FIRST_READ = 0.1
"""Seconds of one call for jobs whose journals were never read: a list of many long ones is not waited for."""


class Reading(Protocol):
    """What is shown, and what may be asked for. Every method may be called by several threads at once.

    A job of another owner raises NotFoundError, as one does that isn't there; nobody learns which it was.
    """

    def server(self, who: Who) -> Mapping[str, Any]:
        """What stands at the top: ``version``, ``slots``, ``busy``, ``title``; all but the first may be left out."""

    def jobs(self, who: Who) -> Sequence[JobView]:
        """The newest jobs, newest first; what the journals of some say may come with later calls (``FIRST_READ``)."""

    def job(self, who: Who, job_id: str) -> JobView:
        """One job."""

    def journal(self, who: Who, job_id: str) -> Path:
        """Where its journal is, or will be."""

    def log(self, who: Who, job_id: str, cursor: str, most: int) -> Lines:
        """At most so many lines after a cursor; after "" the last ones there are."""

    def config(self, who: Who, job_id: str) -> str:
        """Its job file."""

    def files(self, who: Who, job_id: str) -> Sequence[File]:
        """What can be downloaded."""

    def file(self, who: Who, job_id: str, path: str) -> int:
        """A descriptor of a file that ``files`` names, which the caller closes.

        Raises NotFoundError, or UsageError for a path that would lead elsewhere.
        """

    def act(self, who: Who, job_id: str, verb: str) -> JobView:
        """Ask for one of ``VERBS``. Raises RefusedTransition where the job's state does not allow it."""
