"""What shards cost: of their number in one worker, and of promised bits at two workers."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from bench import plot, report, spawn
from bench.interleave import Runs, interleaved, ratios, spread
from bench.options import Options, data_folder
from bench.workload import Workload

RATE = "samples_per_second"
SHARDS = (1, 2, 4, 8, 16)


def shards(options: Options) -> None:
    """G = 1 to 16 at a fixed batch in one worker; leaves shards.json, .md and .png."""
    cases = {"mlp-128": 256, "big-128": 256, "cnn-64": 64}
    content = _measure(options, cases, 1, SHARDS)
    rows = [[title, *_cells(case)] for title, case in content.items()]
    heads = ["milliseconds a step (times G = 1)", *(f"G = {G}" for G in SHARDS)]
    title = f"The number of shards in one worker: medians of {options.repeats} interleaved repetitions"
    report.write(
        options.results, "shards", title, {"repeats": options.repeats}, {"cases": content}, report.table(heads, rows)
    )
    panels = {title: [_line(case)] for title, case in content.items()}
    plot.lines(options.results / "shards.png", panels, "shards (G)", "ms a step")


def bits(options: Options) -> None:
    """G = workers against G = 8 at two workers, the same global batch; leaves bits.json, .md and .png."""
    cases = {"mlp-128": 256, "big-128": 128}
    content = _measure(options, cases, 2, (2, 8))
    rows = [[title, *_cells(case)] for title, case in content.items()]
    heads = ["milliseconds a step (times G = 2)", "G = 2, as many as workers", "G = 8, bits for 1 to 8 workers"]
    title = f"The price of promised bits: medians of {options.repeats} interleaved repetitions"
    report.write(
        options.results, "bits", title, {"repeats": options.repeats}, {"cases": content}, report.table(heads, rows)
    )
    panels = {
        title: [
            plot.Bar(f"G = {G}", **figures["milliseconds"], kind="ours")
            for G, figures in case.items()
            if "milliseconds" in figures
        ]
        for title, case in content.items()
    }
    plot.bars(options.results / "bits.png", panels, "ms a step")


def _measure(options: Options, cases: Mapping[str, int], workers: int, some: tuple[int, ...]) -> dict[str, Any]:
    """Of every case and number of shards, milliseconds a step and how many times those of the first number."""
    content = {}
    with data_folder() as folder:
        for name, rows in cases.items():
            if options.cases and name not in options.cases:
                continue
            work = options.case(name, folder).at(workers=workers, rows=rows)
            runs = interleaved({str(G): partial(_run, work, G) for G in some}, options.repeats, work.title)
            content[work.title] = {G: _figures(work, each, runs[str(some[0])]) for G, each in runs.items()}
    return content


def _run(work: Workload, G: int, repeat: int) -> spawn.Found:
    arguments = (work.at(seed=repeat).text(), str(G), "auto", "never")
    if work.workers == 1:
        return spawn.alone("bench.contestants.ours", *arguments)
    return spawn.mpirun(work.workers, "bench.contestants.ours", *arguments)


def _figures(work: Workload, some: Runs, first: Runs) -> dict[str, Any]:
    if not some.found:
        return {"not_run": some.reason}
    figures = {"milliseconds": spread([1e3 * work.batch / rate for rate in some.values(RATE)]), "runs": some.found}
    if first.found:
        figures["times_first"] = spread(ratios(first, some, RATE))
    return figures


def _cells(case: Mapping[str, Any]) -> list[str]:
    cells = []
    for figures in case.values():
        if "milliseconds" not in figures:
            cells.append(f"not run: {figures['not_run'].replace('|', '/')}")
            continue
        cell = f"{figures['milliseconds']['median']:.2f}"
        if "times_first" in figures:
            times = figures["times_first"]
            cell += f" ({times['median']:.2f}, {times['lowest']:.2f} to {times['highest']:.2f})"
        cells.append(cell)
    return cells


def _line(case: Mapping[str, Any]) -> plot.Line:
    ran = {int(G): figures["milliseconds"] for G, figures in case.items() if "milliseconds" in figures}
    median, lowest, highest = ([each[what] for each in ran.values()] for what in ("median", "lowest", "highest"))
    return plot.Line("dptrain", list(ran), median, lowest, highest)
