"""The frame of the campaign: a fault, what became of it, how kinds are mixed, and the table at the end."""

import math
import random
import statistics
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

GOOD = ("survived", "restarted", "refused")
BAD = ("hung", "wrong hash", "wrong error", "wrong code", "leftover", "no verdict")
"""What may become of a fault; "no verdict" is an exception of the fault's own."""


@dataclass(frozen=True)
class Outcome:
    """What became of a fault. ``note`` is enough to understand it, ``phase`` where the fault struck.

    ``more`` are further strikes at the same run, each with its phase and the seconds until it was recovered from.
    """

    verdict: str
    phase: str = ""
    recovery_seconds: float | None = None
    note: str = ""
    more: tuple[tuple[str, float | None], ...] = ()

    def __post_init__(self) -> None:
        assert self.verdict in GOOD + BAD, self.verdict

    @property
    def good(self) -> bool:
        return self.verdict in GOOD


@dataclass(frozen=True)
class Fault:
    """Something that is done to a job. ``run`` does it in an empty folder of its own and says what became of it."""

    kind: str
    name: str
    run: Callable[[Path], Outcome]


def perform(fault: Fault, folder: Path) -> Outcome:
    """Do it; ``folder`` must not exist yet."""
    folder.mkdir(parents=True)
    try:
        return fault.run(folder)
    except Exception:
        return Outcome("no verdict", note=traceback.format_exc())


def mixed(sources: Mapping[str, Iterator[Fault]], weights: Mapping[str, int], seed: int) -> Iterator[Fault]:
    """Faults of all kinds, each as often as its weight says; a kind that ends drops out."""
    rng = random.Random(seed)
    left = dict(sources)
    while left:
        (kind,) = rng.choices(list(left), [weights[name] for name in left])
        fault = next(left[kind], None)
        if fault is None:
            del left[kind]
        else:
            yield fault


COLUMNS = (
    "kind", "phase", "faults", "survived", "restarted", "refused", "hung", "wrong hash", "other",
    "median s", "p99 s", "max s",
)  # fmt: skip


@dataclass
class Tally:
    """What became of faults, by kind and phase."""

    outcomes: dict[tuple[str, str], list[Outcome]] = field(default_factory=dict)

    def add(self, fault: Fault, outcome: Outcome) -> None:
        """Count one, and each of its strikes: a run's verdict is that of all that struck it."""
        strikes = ((outcome.phase, outcome.recovery_seconds), *outcome.more)
        for phase, seconds in strikes:
            one = replace(outcome, phase=phase, recovery_seconds=seconds, more=())
            self.outcomes.setdefault((fault.kind, phase), []).append(one)

    @property
    def strikes(self) -> int:
        """How many were counted."""
        return sum(map(len, self.outcomes.values()))

    @property
    def bad(self) -> int:
        """How many ended otherwise than they should."""
        return sum(not outcome.good for some in self.outcomes.values() for outcome in some)

    def table(self) -> str:
        """Markdown: a line for each kind and phase, and one for all. Times are those of recovery."""
        rows = [[*key, *_counts(some)] for key, some in sorted(self.outcomes.items())]
        every = [outcome for some in self.outcomes.values() for outcome in some]
        rows.append(["all", "", *_counts(every)])
        lines = [list(COLUMNS), ["---", "---", *["---:"] * (len(COLUMNS) - 2)], *rows]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _counts(some: list[Outcome]) -> list[str]:
    verdicts = [outcome.verdict for outcome in some]
    named = ("survived", "restarted", "refused", "hung", "wrong hash")
    counts = [len(some), *(verdicts.count(name) for name in named), sum(name not in named for name in verdicts)]
    seconds = sorted(outcome.recovery_seconds for outcome in some if outcome.recovery_seconds is not None)
    if not seconds:
        return [*map(str, counts), "", "", ""]
    p99 = seconds[math.ceil(0.99 * len(seconds)) - 1]
    return [*map(str, counts), *(f"{value:.3f}" for value in (statistics.median(seconds), p99, seconds[-1]))]
