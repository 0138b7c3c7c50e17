"""Whole training steps over slow links, one worker on each of several machines, beside PyTorch DDP on gloo."""

import math
import os
from collections.abc import Mapping
from typing import Any

from bench import report
from bench.comparisons.steps import RATE
from bench.contestants import networked, ours
from bench.interleave import Runs, interleaved, ratios, spread
from bench.options import Options, data_folder
from bench.workload import Workload
from dptrain.job.load import check, complete
from dptrain.scaling import Link, predict

CASE = "mlp-128"
LINKS = {"100mbit": 25, "1gbit": 200}
"""What comes to a machine and what goes from it, and the steps that are measured."""

SHARDS = {2: 2, 3: 12}
"""Of each number of machines."""

LATENCY = 50e-6
BITS = {"100mbit": 100e6, "1gbit": 1e9}
NAMES = {
    "float32": "dptrain, Open MPI",
    "bfloat16": "dptrain, Open MPI, gradients in bfloat16",
    "mpich": "dptrain, MPICH",
    "ddp": "PyTorch DDP, gloo, float32",
}


def main(options: Options) -> None:
    """Leaves networks.json and .md."""
    content: dict[str, Any] = {}
    tables = []
    with data_folder() as folder:
        for machines, shards in SHARDS.items():
            for rate, steps in LINKS.items():
                work = options.case(CASE, folder).at(workers=machines, steps=5 if options.quick else steps)
                case = f"{machines} machines, links of {rate}"
                runs = interleaved(_contestants(work, rate, shards), options.repeats, case)
                predicted = _predicted(work, rate, shards)
                figures = {
                    name: _figures(work, name, some, runs["ddp"], BITS[rate], predicted) for name, some in runs.items()
                }
                content[case] = {"shards": shards, "contestants": figures}
                heads = ["", "samples/s", "x DDP", "of the link used", "predicted / measured"]
                rows = [_row(name, some, len(heads)) for name, some in figures.items()]
                tables.append(f"{case}, {shards} shards\n\n{report.table(heads, rows)}")
    title = (
        f"{work.network.title}, {work.rows} rows a worker, one worker on each machine: medians of {options.repeats} "
        "interleaved repetitions (lowest to highest)"
    )
    report.write(options.results, "networks", title, {"repeats": options.repeats}, content, "\n".join(tables))


def _predicted(work: Workload, rate: str, shards: int) -> dict[str, float]:
    """What ``dptrain plan`` says of it; all machines share this one's cores."""
    found = {}
    slow = max(1.0, work.workers / len(os.sched_getaffinity(0)))
    for gradients in ("float32", "bfloat16"):
        content = ours.content(work, shards, "segments")
        content["arithmetic"]["gradients"] = {"float32": "auto"}.get(gradients, gradients)
        job = complete(check(content, work.model))
        link = Link(BITS[rate], LATENCY)
        (point,) = predict(job, [work.workers], workers=1, link=link, hours=math.inf, slow=slow)
        found[gradients] = point.samples_per_second
    return {**found, "mpich": found["float32"]}


def _contestants(work: Workload, rate: str, shards: int) -> dict[str, Any]:
    def mine(gradients: str, variable: str) -> Any:
        return lambda repeat: networked.train(
            work.at(seed=repeat), rate, shards=shards, gradients=gradients, variable=variable
        )

    return {
        "float32": mine("auto", "BENCH_OPENMPI"),
        "bfloat16": mine("bfloat16", "BENCH_OPENMPI"),
        "mpich": mine("auto", ""),
        "ddp": lambda repeat: networked.ddp(work.at(seed=repeat), rate),
    }


def _figures(
    work: Workload, name: str, some: Runs, ddp: Runs, bits: float, predicted: Mapping[str, float]
) -> dict[str, Any]:
    if not some.found:
        return {"not_run": some.reason}
    seconds = [work.batch / rate for rate in some.values(RATE)]
    # Each machine sends what it has of all segments but its own, and its own sum to all others.
    elements = 2 * (work.workers - 1) / work.workers * work.network.parameters
    sent = 8 * elements * (2 if name == "bfloat16" else 4)
    return {
        RATE: spread(some.values(RATE)),
        "times_ddp": spread(ratios(some, ddp, RATE)) if ddp.found else None,
        "predicted": spread([predicted[name] / rate for rate in some.values(RATE)]) if name in predicted else None,
        "used": spread([sent / bits / one for one in seconds]),
        "runs": some.found,
    }


def _row(name: str, some: dict[str, Any], columns: int) -> list[str]:
    if "not_run" in some:
        return report.not_run(NAMES[name], some["not_run"], columns)
    cells = [
        f"{found['median']:{form}} ({found['lowest']:{form}} to {found['highest']:{form}})" if found else ""
        for found, form in (
            (some[RATE], ",.0f"),
            (some["times_ddp"], ".2f"),
            (some["used"], ".0%"),
            (some["predicted"], ".2f"),
        )
    ]
    return [NAMES[name], *cells]
