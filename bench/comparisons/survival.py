"""What being able to survive costs while nothing happens: fault tolerance with its watchdog, and checkpoints."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from bench import plot, report, spawn
from bench.contestants.running import python_with
from bench.contestants.survivable import Survival, launch
from bench.interleave import Runs, interleaved, ratios, spread
from bench.options import Options, data_folder
from bench.spawn import Found, NotRun
from bench.workload import Workload

RATE = "samples_per_second"
MODULE = "bench.contestants.survivable"
TOLERANCE_CASES = ("mlp-32", "mlp-128", "big-128")
CHECKPOINT_CASES = ("mlp-128", "big-128")
CHECKPOINTS = 3
"""At least so many in every run that writes them."""

Launch = Callable[[Workload, Survival], Found]


def main(options: Options) -> None:
    """At two workers; leaves survival.json, .md and .png."""
    interval = 0.5 if options.quick else 5.0
    content: dict[str, dict[str, Any]] = {"tolerance": {}, "checkpoints": {}}
    with data_folder() as folder:
        for name in _wanted(options, TOLERANCE_CASES):
            work = options.case(name, folder).at(workers=2)
            content["tolerance"][work.title] = _measured(options, work, _tolerant, Survival(False), Survival(True))
        for name in _wanted(options, CHECKPOINT_CASES):
            work = options.case(name, folder).at(workers=2)
            content["checkpoints"][work.title] = _checkpoints(options, work, interval)
    what = {
        "tolerance": "dying and hanging workers survived (Open MPI with ULFM, watchdog)",
        "checkpoints": f"a checkpoint every {interval:g} s",
    }
    heads = ["milliseconds a step", "without", "with", "times", "checkpoints a run"]
    tables = "\n".join(
        f"{what[key]}\n\n{report.table(heads, [_row(title, case, len(heads)) for title, case in cases.items()])}"
        for key, cases in content.items()
    )
    title = (
        f"What being able to survive costs: medians of {options.repeats} interleaved repetitions (lowest to highest)"
    )
    settings = {"repeats": options.repeats, "quick": options.quick, "checkpoint_seconds": interval}
    report.write(options.results, "survival", title, settings, {"cases": content}, tables)
    panels = {what[key]: _bars(cases) for key, cases in content.items()}
    if drawn := {title: some for title, some in panels.items() if some}:
        plot.bars(options.results / "survival.png", drawn, "times a step without it")


def _wanted(options: Options, names: tuple[str, ...]) -> list[str]:
    """Those that were asked for; where it is just tried out, one of them."""
    some = [name for name in names if not options.cases or name in options.cases]
    return some[:1] if options.quick else some


def _tolerant(work: Workload, survival: Survival) -> Found:
    """Under Open MPI, of whichever environment has it."""
    python_with("Open MPI", "BENCH_OPENMPI")
    found = spawn.alone(MODULE, work.text(), survival.text(), interpreter="BENCH_OPENMPI")
    if found["tolerant"] is not survival.tolerant:
        raise NotRun(f"MPI's fault tolerance was to be {survival.tolerant}, and was {found['tolerant']}")
    return found


def _checkpoints(options: Options, work: Workload, interval: float) -> dict[str, Any]:
    """As many steps with and without as take long enough for CHECKPOINTS, even where they are quicker than these."""
    try:
        rate = launch(work, Survival())[RATE]
    except NotRun as error:
        return {"not_run": str(error)}
    seconds = (CHECKPOINTS + 2) * interval
    steps = int(seconds * rate / work.batch)
    return _measured(options, work.at(steps=steps), launch, Survival(), Survival(checkpoint_seconds=interval))


def _measured(options: Options, work: Workload, run: Launch, without: Survival, given: Survival) -> dict[str, Any]:
    def contestant(survival: Survival, repeat: int) -> Found:
        found = run(work.at(seed=repeat), survival)
        if survival.checkpoint_seconds and found["checkpoints"] < CHECKPOINTS:
            raise NotRun(f"only {found['checkpoints']} checkpoints in a run that was to write {CHECKPOINTS}")
        return found

    some = {"without": partial(contestant, without), "with": partial(contestant, given)}
    return _figures(work, interleaved(some, options.repeats, work.title))


def _figures(work: Workload, runs: Mapping[str, Runs]) -> dict[str, Any]:
    reason = next((some.reason for some in runs.values() if some.reason), "")
    if reason:
        return {"not_run": reason}
    return {
        **{
            key: {"milliseconds": spread([1e3 * work.batch / rate for rate in some.values(RATE)]), "runs": some.found}
            for key, some in runs.items()
        },
        "times": spread(ratios(runs["without"], runs["with"], RATE)),
    }


def _row(title: str, case: Mapping[str, Any], columns: int) -> list[str]:
    if "not_run" in case:
        return report.not_run(title, case["not_run"], columns)
    times = case["times"]
    return [
        title,
        *(f"{case[key]['milliseconds']['median']:.2f}" for key in ("without", "with")),
        f"{times['median']:.3f} ({times['lowest']:.3f} to {times['highest']:.3f})",
        " or ".join(map(str, sorted({run["checkpoints"] for run in case["with"]["runs"]}))),
    ]


def _bars(cases: Mapping[str, Any]) -> list[plot.Bar]:
    return [plot.Bar(title, **case["times"], kind="ours") for title, case in cases.items() if "times" in case]
