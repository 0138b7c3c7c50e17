"""``dptrain compare``: runs side by side, as a table or as JSON."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dptrain.comparison import Comparison, compare
from dptrain.errors import UsageError

BARS = "▁▂▃▄▅▆▇█"
LINE = 40
"""Characters of a drawn curve."""

VERDICTS = {True: "the same", False: "different", None: "not known yet"}


def show(paths: Sequence[Path], as_json: bool, names: Sequence[str] | None = None) -> None:
    """Print in what runs differ; ``names`` are what they are called where that isn't their path."""
    if len(paths) < 2:
        raise UsageError("compare", expected="two runs or more", found=str(len(paths)), cure="name another RUN")
    found = compare(paths, names)
    if as_json:
        print(json.dumps(found.plain(), indent=1))
        return
    for line in lines(found):
        print(line)


def lines(found: Comparison) -> list[str]:
    """The report for people. Curves share one logarithmic scale of losses and one of steps."""
    names = _names([run.run for run in found.runs])
    table = [["", *names], ["state", *(run.state for run in found.runs)]]
    keys = list(dict.fromkeys(key for run in found.runs for key in run.figures))
    table += [[key, *(_figure(key, run.figures.get(key)) for run in found.runs)] for key in keys]
    report = _columns(table)
    report += ["", f"job      {VERDICTS[found.same_job]}", f"weights  {VERDICTS[found.same_weights]}", ""]
    if found.differences:
        report += ["keys of the job that differ", ""]
        report += _columns([["", *names], *([key, *map(_value, values)] for key, values in found.differences.items())])
    else:
        report += ["no key of the job differs"]
    curves = drawn([run.curve for run in found.runs])
    if any(curves):
        wide = max(map(len, names))
        report += ["", "loss"]
        for name, curve, run in zip(names, curves, found.runs, strict=True):
            ends = f"{run.curve[0][1]:.4g} -> {run.curve[-1][1]:.4g}" if run.curve else "no steps yet"
            report.append(f"{name:{wide}}  {curve:{LINE}}  {ends}")
    return report


def drawn(curves: Sequence[Sequence[tuple[int, float]]]) -> list[str]:
    """Each curve as a row of blocks, over the steps of the longest, in one scale of the losses' logarithms."""
    values = [math.log(max(loss, 1e-12)) for curve in curves for _, loss in curve]
    if not values:
        return ["" for _ in curves]
    low, high = min(values), max(values)
    last = max(step for curve in curves for step, _ in curve)
    return [_row(curve, last, low, high) for curve in curves]


def _row(curve: Sequence[tuple[int, float]], last: int, low: float, high: float) -> str:
    places: dict[int, list[float]] = {}
    for step, loss in curve:
        places.setdefault(min(LINE - 1, step * LINE // (last + 1)), []).append(math.log(max(loss, 1e-12)))
    row, shown = "", " "
    for place in range(max(places, default=-1) + 1):
        if place in places:
            mean = sum(places[place]) / len(places[place])
            share = (mean - low) / (high - low) if high > low else 0.0
            shown = BARS[round(share * (len(BARS) - 1))]
        row += shown
    return row


def _names(runs: Sequence[str]) -> list[str]:
    """The directories' own names, whole paths where two are called alike, numbered where one is named twice."""
    short = [Path(run).name or run for run in runs]
    if len(set(short)) == len(short):
        return short
    return list(runs) if len(set(runs)) == len(runs) else [f"{name} ({i})" for i, name in enumerate(short, 1)]


def _figure(key: str, value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if key.endswith("sha256"):
        return str(value).removeprefix("sha256:")[:16]
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _value(value: Any) -> str:
    if value is None:
        return "-"
    return value if isinstance(value, str) else json.dumps(value)


def _columns(table: Sequence[Sequence[str]]) -> list[str]:
    wide = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    return ["  ".join(f"{cell:{size}}" for cell, size in zip(row, wide, strict=True)).rstrip() for row in table]
