"""A journal as curves, read as it grows: whole lines after an offset, made coarse where there are many."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dptrain.journal import attempt_of

MOST = 1000
"""Points of one answer; more are put together."""

_READ = 32 << 20
_RECENT = 20
"""Lines that a worker's share of computing and waiting is summed over."""


def curves(path: Path, offset: int, most: int = MOST) -> dict[str, Any]:
    """What the journal holds after ``offset``, as plain data for the page.

    ``rows`` are [step, seconds, epoch, loss, lr, samples a second, attempt, compute, wait], the last two the mean
    worker's seconds; ``metrics`` [step, value] by name; ``events`` everything that is no step; ``workers`` the seconds
    of each over the last lines: [compute, wait]. A step that comes again replaces the earlier one, and all after it.
    ``cursor`` is the next offset.
    """
    lines, cursor = _lines(path, offset)
    steps: list[dict[str, Any]] = []
    events: list[dict[str, Any]] = []
    for line in lines:
        if "event" in line:
            events.append(line)
        elif isinstance(line.get("step"), int):
            while steps and steps[-1]["step"] >= line["step"]:
                steps.pop()
            steps.append(line)
    return {
        "rows": _coarse([_row(line) for line in steps], most),
        "metrics": _metrics(steps, most),
        "events": events[-most:],
        "workers": _workers(steps[-_RECENT:]),
        "cursor": cursor,
    }


class Thinned:
    """Values in their order, fewer than ``2 * most`` of them: where there would be more, every other one goes."""

    def __init__(self, most: int) -> None:
        self.values: list[float] = []
        self._most, self._stride, self._count = most, 1, 0

    def add(self, value: float) -> None:
        """The next value."""
        if self._count % self._stride == 0:
            self.values.append(value)
        self._count += 1
        if len(self.values) >= 2 * self._most:
            self.values, self._stride = self.values[::2], 2 * self._stride


def _lines(path: Path, offset: int) -> tuple[list[dict[str, Any]], int]:
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size < offset:
                # Another file than before.
                offset = 0
            file.seek(offset)
            data = file.read(_READ)
    except OSError:
        return [], offset
    whole = data.rfind(b"\n") + 1
    found = []
    for text in data[:whole].splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict):
            found.append(line)
    return found, offset + whole


def _row(line: dict[str, Any]) -> list[Any]:
    def mean(values: Sequence[float]) -> float | None:
        return sum(values) / len(values) if values else None

    plain = [line.get(key) for key in ("step", "seconds", "epoch", "loss", "lr", "samples_per_second")]
    return [*plain, attempt_of(line), mean(line.get("compute") or ()), mean(line.get("wait") or ())]


def _coarse(rows: list[list[Any]], most: int) -> list[list[Any]]:
    """At most ``most`` rows: neighbours become one, whose figures are means and whose place is the last's."""
    if len(rows) <= most:
        return rows
    size = -(-len(rows) // most)
    found = []
    for lo in range(0, len(rows), size):
        group = rows[lo : lo + size]
        last = group[-1]
        means = [_mean([row[i] for row in group]) for i in (3, 4, 5)]
        shares = [_mean([row[i] for row in group]) for i in (7, 8)]
        found.append([*last[:3], *means, last[6], *shares])
    return found


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _metrics(steps: Sequence[dict[str, Any]], most: int) -> dict[str, list[list[float]]]:
    found: dict[str, list[list[float]]] = {}
    for line in steps:
        for name, value in (line.get("metrics") or {}).items():
            found.setdefault(name, []).append([line["step"], value])
    return {name: points[:: -(-len(points) // most)] for name, points in found.items()}


def _workers(steps: Sequence[dict[str, Any]]) -> list[list[float]]:
    """After a death there are fewer workers: only lines of the last line's number are summed."""
    if not steps:
        return []
    size = len(steps[-1].get("compute") or ())
    alike = [line for line in steps if len(line.get("compute") or ()) == len(line.get("wait") or ()) == size]
    return [[round(sum(line[key][i] for line in alike), 6) for key in ("compute", "wait")] for i in range(size)]
