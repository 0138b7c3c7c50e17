"""A parameter server beside PyTorch DDP, and its wire beside a bare gRPC stream."""

from typing import Any

from bench import plot, report, spawn
from bench.comparisons.steps import RATE
from bench.contestants import served
from bench.interleave import Runs, interleaved, ratios, spread
from bench.options import Options, data_folder
from bench.spawn import NotRun
from bench.workload import MODELS, Workload

CASE = "mlp-128"
NAMES = {
    "ps": "dptrain, a server, each worker sends its own",
    "ps-host": "dptrain, a server, the host sends one sum",
    "ddp": "PyTorch DDP, gloo, float32",
}
WIRE = {
    f"{MODELS['mlp'].title} ({MODELS['mlp'].parameters:,} elements)": (MODELS["mlp"].parameters, 50),
    "16,000,000 elements": (16_000_000, 3),
}
"""Vectors, and how often each goes each way in a round."""
WAYS = {"": "its bytes sent", "lent": "looked at where it lies, as a run on one machine does"}


def main(options: Options) -> None:
    """Two workers and one server on this machine; leaves ps.json, .md and .png."""
    with data_folder() as folder:
        work = options.case(CASE, folder).at(workers=2)
        runs = interleaved(
            {
                "ps": lambda repeat: served.train(work.at(seed=repeat), host_sum=False),
                "ps-host": lambda repeat: served.train(work.at(seed=repeat), host_sum=True),
                "ddp": lambda repeat: _ddp(work.at(seed=repeat)),
            },
            options.repeats,
            work.title,
        )
    steps, rows = _steps(runs)
    wire = {f"{title}, {WAYS[way]}": _wire(*sizes, way, options) for way in WAYS for title, sizes in WIRE.items()}
    lines = [row for title, found in wire.items() for row in _wire_rows(title, found)]
    title = f"A parameter server and its workers on one machine: medians of {options.repeats} interleaved repetitions"
    tables = "\n".join(
        [
            f"{work.title} and a server, whole training steps\n",
            report.table(["", "samples/s (lowest to highest)", "x DDP"], rows),
            "A vector on its way alone, over a Unix socket, both processes' checksums and copies included\n",
            report.table(["", "GB/s (lowest to highest)", "x a bare gRPC stream of 1 MiB chunks"], lines),
        ]
    )
    report.write(options.results, "ps", title, {"repeats": options.repeats}, {"steps": steps, "wire": wire}, tables)
    bars = [
        plot.Bar(NAMES[key], **some[RATE], kind="other" if key == "ddp" else "ours")
        for key, some in steps.items()
        if RATE in some
    ]
    plot.bars(options.results / "ps.png", {work.title: bars}, "samples a second")


def _ddp(work: Workload) -> spawn.Found:
    return spawn.meeting(work.workers, "bench.contestants.torch_ddp", work.text(), interpreter="BENCH_TORCH")


def _steps(runs: dict[str, Runs]) -> tuple[dict[str, Any], list[list[str]]]:
    content: dict[str, Any] = {}
    rows = []
    for key, some in runs.items():
        if not some.found:
            content[key] = {"not_run": some.reason}
            rows.append(report.not_run(NAMES[key], some.reason, 3))
            continue
        times = spread(ratios(some, runs["ddp"], RATE)) if runs["ddp"].found else None
        content[key] = {RATE: spread(some.values(RATE)), "times_ddp": times, "runs": some.found}
        rows.append([NAMES[key], _cell(content[key][RATE], 1, ",.0f"), _cell(times, 1, ".2f") if times else ""])
    return content, rows


def _wire(elements: int, times: int, way: str, options: Options) -> dict[str, Any]:
    try:
        arguments = [elements, 1 if options.quick else times, options.repeats]
        rates = spawn.alone("bench.contestants.wire", *map(str, arguments), *filter(None, [way]))["bytes_per_second"]
    except NotRun as error:
        return {"not_run": str(error)}
    found: dict[str, Any] = {"bytes_per_second": {way: spread(some) for way, some in rates.items()}, "runs": rates}
    for to in ("push", "pull"):
        found[f"{to}_times_bare"] = spread([a / b for a, b in zip(rates[to], rates[f"bare_{to}"], strict=True)])
    return found


def _wire_rows(title: str, found: dict[str, Any]) -> list[list[str]]:
    if "not_run" in found:
        return [report.not_run(title, found["not_run"], 3)]
    return [
        [
            f"{title}: {way}",
            _cell(found["bytes_per_second"][way], 1e9, ".2f"),
            _cell(found[f"{way}_times_bare"], 1, ".2f"),
        ]
        for way in ("push", "pull")
    ]


def _cell(some: dict[str, float], unit: float, form: str) -> str:
    median, lowest, highest = (some[key] / unit for key in ("median", "lowest", "highest"))
    return f"{median:{form}} ({lowest:{form}} to {highest:{form}})"
