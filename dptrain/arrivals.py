"""arrivals.jsonl: which gradient led to which update, where that is not decided by the job.

A line of an update has "step" (the number of steps with this one), "batch", "staleness" (the steps done since the
oldest weights that the gradient was computed with), "parts" ([lo, hi, weights, worker]: shards lo to hi, computed with
the weights after so many steps, by that worker), "attempt", and, unless it is 1, "lr_share", its part of the learning
rate. As in the journal, of several lines of a step the last
one of the last attempt counts.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dptrain.errors import StorageError
from dptrain.journal import attempt_of, read_all


class Part(NamedTuple):
    """Shards lo to hi, computed with the weights after ``weights`` steps by that worker."""

    lo: int
    hi: int
    weights: int
    worker: int


class Arrival(NamedTuple):
    """A batch whose gradient makes a step.

    ``share`` is that of the learning rate which it gets, ``pending`` are the batches that were begun before some of
    those which are done.
    """

    batch: int
    parts: tuple[Part, ...]
    staleness: int
    share: float
    pending: tuple[int, ...]

    def line(self, step: int) -> dict[str, Any]:
        """The log's line of this update, the ``step``-th step."""
        parts = [list(part) for part in self.parts]
        line = {"step": step, "batch": self.batch, "staleness": self.staleness, "parts": parts}
        return line if self.share == 1.0 else {**line, "lr_share": self.share}


def arrival(said: Sequence[Any] | None) -> Arrival | None:
    """An arrival as it comes out of JSON."""
    if said is None:
        return None
    batch, parts, staleness, share, pending = said
    return Arrival(batch, tuple(Part(*part) for part in parts), staleness, share, tuple(pending))


def share_of(staleness: int, way: str) -> float:
    """What an update gets of the learning rate: all where ``way`` is "constant"; "inverse": 1 / (1 + staleness)."""
    return 1.0 if way == "constant" else 1.0 / (1 + staleness)


def read(path: Path, *, steps: int, shards: int, bound: int | None) -> list[Arrival]:
    """The arrivals of steps 1 to ``steps``. Raises StorageError where the log can't be that of a run.

    ``bound`` is the highest staleness that the run allowed, None for any.
    """
    if not path.exists():
        raise StorageError(
            str(path),
            expected="the log of a run with exchange.mode async or ssp",
            found="none",
            cure="the result of any other run is that of `dptrain run` of its job.toml",
        )
    lines: dict[int, Mapping[str, Any]] = {}
    for each in read_all(path):
        step = each.get("step")
        if isinstance(step, int) and (step not in lines or attempt_of(each) >= attempt_of(lines[step])):
            lines[step] = each
    found: list[Arrival] = []
    seen: dict[int, int] = {}
    for step in range(1, steps + 1):
        line = lines.get(step, {})
        wrong = _wrong(line, step, shards, bound, seen)
        if wrong:
            raise StorageError(
                f"{path}, step {step}",
                expected="the log as the run wrote it",
                found=wrong,
                cure="restore the file: without it the run can't be replayed",
            )
        seen[line["batch"]] = step
        parts = tuple(Part(*part) for part in line["parts"])
        found.append(Arrival(line["batch"], parts, line["staleness"], line.get("lr_share", 1.0), ()))
    return found


def _wrong(line: Mapping[str, Any], step: int, shards: int, bound: int | None, seen: Mapping[int, int]) -> str:
    """What is wrong with a line, or ""."""
    if not line:
        return "no line of it"
    batch, parts, staleness = line.get("batch"), line.get("parts"), line.get("staleness")
    if not isinstance(batch, int) or batch < 0:
        return f"batch {batch!r}"
    if batch in seen:
        return f"batch {batch}, which made step {seen[batch]} too"
    if not isinstance(parts, list) or not all(_is_part(part, step) for part in parts):
        return f"parts {parts!r}"
    if [part[0] for part in parts] + [shards] != [0] + [part[1] for part in parts]:
        return f"parts {parts!r}, which are not all of {shards} shards once"
    if staleness != step - 1 - min(part[2] for part in parts):
        return f"staleness {staleness!r}, which is not that of parts {parts!r}"
    if bound is not None and staleness > bound:
        return f"staleness {staleness}, where exchange.staleness = {bound}"
    share = line.get("lr_share", 1.0)
    if not isinstance(share, float) or not 0 < share <= 1:
        return f"lr_share {share!r}"
    return ""


def _is_part(part: Any, step: int) -> bool:
    if not isinstance(part, list) or len(part) != len(Part._fields) or not all(map(_natural, part)):
        return False
    return bool(part[0] < part[1] and part[2] < step)


def _natural(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
