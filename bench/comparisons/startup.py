"""From `mpirun -n 8 dptrain` to its first step, against eight bare Pythons that import numpy and MPI."""

import tempfile
import time
from pathlib import Path
from typing import Any

from bench import plot, report, spawn
from bench.interleave import interleaved, spread
from bench.options import Options
from bench.spawn import Found, NotRun
from dptrain.rundir import JOURNAL

WORKERS = 8
POLL = 0.002
NAMES = {
    "bare": "bare: import numpy, mpi4py.MPI, and end",
    "first step": "dptrain, to its first step",
    "whole run": "dptrain, the embedded job to its end",
}


def main(options: Options) -> None:
    """Leaves startup.json, .md and .png."""
    runs = interleaved({"bare": _bare, "dptrain": _dptrain}, options.repeats, "start-up")
    found: dict[str, list[float]] = {
        "bare": runs["bare"].values("seconds"),
        "first step": runs["dptrain"].values("first_step"),
        "whole run": runs["dptrain"].values("seconds"),
    }
    content: dict[str, Any] = {}
    rows, bars = [], []
    for key, seconds in found.items():
        owner = runs["bare" if key == "bare" else "dptrain"]
        if not seconds:
            content[key] = {"not_run": owner.reason}
            rows.append(report.not_run(NAMES[key], owner.reason, 3))
            continue
        figures = spread(seconds)
        content[key] = {"seconds": figures, "runs": seconds}
        cell = f"{figures['median']:.2f} ({figures['lowest']:.2f} to {figures['highest']:.2f})"
        times = ""
        if found["bare"]:
            values = [a / b for a, b in zip(seconds, found["bare"], strict=False)]
            times = f"{spread(values)['median']:.2f}"
        rows.append([NAMES[key], cell, times])
        bars.append(plot.Bar(NAMES[key], **figures, kind="limit" if key == "bare" else "ours"))
    title = f"Start-up of {WORKERS} workers in seconds, medians of {options.repeats} interleaved repetitions"
    table = report.table(["", "seconds", "x bare"], rows)
    report.write(
        options.results, "startup", title, {"repeats": options.repeats, "workers": WORKERS}, {"startup": content}, table
    )
    plot.bars(options.results / "startup.png", {title: bars}, "seconds")


def _bare(repeat: int) -> Found:
    line, environ = spawn.mpirun_line(WORKERS, ["-c", "import numpy, mpi4py.MPI"])
    begun = time.perf_counter()
    with spawn.started(line, environ) as process:
        spawn.finish(process)
        seconds = time.perf_counter() - begun
    return {"seconds": seconds}


def _dptrain(repeat: int) -> Found:
    """The embedded job in an empty folder, one journal line a step; its first line is the first step."""
    with tempfile.TemporaryDirectory() as folder:
        journal = Path(folder) / "run" / JOURNAL
        arguments = ["--run-dir", str(journal.parent), "--progress", "none", "--set", "output.journal_steps=1"]
        line, environ = spawn.mpirun_line(WORKERS, ["-P", "-m", "dptrain", "run", *arguments])
        begun = time.perf_counter()
        with spawn.started(line, environ) as process:
            while not _has_line(journal) and process.poll() is None:
                if time.perf_counter() - begun > spawn.TIMEOUT:
                    raise NotRun(f"no step within {spawn.TIMEOUT:g} s")
                time.sleep(POLL)
            first = time.perf_counter() - begun
            spawn.finish(process)
            seconds = time.perf_counter() - begun
    return {"first_step": first, "seconds": seconds}


def _has_line(path: Path) -> bool:
    return path.exists() and b"\n" in path.read_bytes()
