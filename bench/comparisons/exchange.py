"""The exchange alone, two workers: dptrain's against the installed MPI's reductions and against memory bandwidth."""

from typing import Any

from bench import plot, report, spawn
from bench.interleave import spread
from bench.options import Options
from bench.spawn import NotRun

SIZES = (1_000, 10_000, 100_000, 1_000_000, 6_000_000, 30_000_000)
WORKERS = 2
ELEMENTS = 30_000_000
"""That go through each way in one round, where a thousand times are enough for less."""

TOLERANCE = 1e-4
"""How far weights may differ from those after Allreduce, as a share of the largest: rounding over many updates."""

BOUND = "bound: bytes over bandwidth"


def main(options: Options) -> None:
    """From 1e3 to 3e7 parameters; leaves exchange.json, .md and .png."""
    sizes = SIZES[:4] if options.quick else SIZES
    content = {str(n): _measure(n, options) for n in sizes}
    names = list(dict.fromkeys(name for found in content.values() for name in found.get("milliseconds", {})))
    heads = ["parameters", *names, BOUND]
    rows = [_row(int(n), found, names) for n, found in content.items()]
    title = (
        f"The exchange alone, {WORKERS} workers, SGD with momentum: milliseconds, medians of {options.repeats} "
        "interleaved rounds (times the bound)"
    )
    report.write(
        options.results, "exchange", title, {"repeats": options.repeats}, {"sizes": content}, report.table(heads, rows)
    )
    ran = {int(n): found for n, found in content.items() if "milliseconds" in found}
    lines = []
    for name in names:
        # Compiled updates are for large vectors only.
        some = {n: found["milliseconds"][name] for n, found in ran.items() if name in found["milliseconds"]}
        median, lowest, highest = ([each[what] for each in some.values()] for what in ("median", "lowest", "highest"))
        lines.append(plot.Line(name, list(some), median, lowest, highest))
    lines.append(plot.Line(BOUND, list(ran), [found["bound_milliseconds"] for found in ran.values()], dashed=True))
    plot.lines(options.results / "exchange.png", {title.split(":")[0]: lines}, "parameters", "milliseconds", log="xy")


def _measure(n: int, options: Options) -> dict[str, Any]:
    elements = ELEMENTS // 10 if options.quick else ELEMENTS
    try:
        found = spawn.mpirun(WORKERS, "bench.contestants.exchange_alone", str(n), str(options.repeats), str(elements))
    except NotRun as error:
        return {"not_run": str(error)}
    return {
        "times_a_round": found["times"],
        "milliseconds": {name: spread([1e3 * s for s in some]) for name, some in found["seconds"].items()},
        "bytes": found["bytes"],
        "bound_milliseconds": 1e3 * found["bound"],
        "gigabytes_per_second": found["bytes"] / found["bound"] / 1e9,
        "same_weights": {name: difference <= TOLERANCE for name, difference in found["differences"].items()},
        "differences": found["differences"],
    }


def _row(n: int, found: dict[str, Any], names: list[str]) -> list[str]:
    if "milliseconds" not in found:
        return report.not_run(f"{n:,}", found["not_run"], len(names) + 2)
    cells = [f"{n:,}"]
    bound = found["bound_milliseconds"]
    for name in names:
        if name not in found["milliseconds"]:
            cells.append("")
            continue
        median = found["milliseconds"][name]["median"]
        wrong = "" if found["same_weights"][name] else " **other weights**"
        cells.append(f"{median:.4g} ({median / bound:.1f}){wrong}")
    return [*cells, f"{bound:.4g}"]
