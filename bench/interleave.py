"""Contestants one after the other, again and again, so that a noisy moment meets all of them alike."""

import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from bench.spawn import Found, NotRun

Contestant = Callable[[int], Found]
"""Runs once; its argument is the number of the repetition, which seeds the run. Raises NotRun."""


@dataclass
class Runs:
    """What a contestant's repetitions came to; ``reason`` says why it did not run, or not to the end."""

    found: list[Found] = field(default_factory=list)
    reason: str = ""

    def values(self, key: str) -> list[float]:
        """One figure of every repetition."""
        return [run[key] for run in self.found]

    def median(self, key: str) -> float:
        """Its median."""
        return statistics.median(self.values(key))


def interleaved(contestants: Mapping[str, Contestant], repeats: int, title: str) -> dict[str, Runs]:
    """Every contestant ``repeats`` times, in an order that turns round each time; one that fails is left out."""
    runs = {name: Runs() for name in contestants}
    for repeat in range(repeats):
        for name in list(contestants)[:: 1 if repeat % 2 == 0 else -1]:
            if runs[name].reason:
                continue
            try:
                runs[name].found.append(contestants[name](repeat))
            except NotRun as error:
                runs[name].reason = str(error)
                print(f"{title}: {name} not run: {error}", file=sys.stderr, flush=True)
        print(f"{title}: repetition {repeat + 1} of {repeats}", file=sys.stderr, flush=True)
    return runs


def ratios(some: Runs, reference: Runs, key: str) -> list[float]:
    """``some`` as multiples of ``reference``, repetition by repetition."""
    return [a / b for a, b in zip(some.values(key), reference.values(key), strict=False)]


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, lowest and highest."""
    return {"median": statistics.median(values), "lowest": min(values), "highest": max(values)}
