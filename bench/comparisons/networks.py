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
from dptrain.job.spec import Job
from dptrain.moving import Cores
from dptrain.scaling import Link, cost_of_a_byte, predict

CASE = "mlp-128"
LINKS = {"100mbit": 15, "1gbit": 100}
"""What comes to a machine and what goes from it, and the steps that are measured."""

SHARDS = {2: 2, 3: 12}
"""Of each number of machines."""

MEASURED_AT, OF_MACHINES = "1gbit", 2
"""Where the cores are the bound: what a byte costs them is told by that case, for the predictions of all others."""

LATENCY = 50e-6
BITS = {"100mbit": 100e6, "1gbit": 1e9}
NAMES = {
    "float32": "dptrain, Open MPI",
    "bfloat16": "dptrain, Open MPI, gradients in bfloat16",
    "mpich": "dptrain, MPICH",
    "ddp": "PyTorch DDP, gloo, float32",
}
BYTES_OF = {"float32": "float32", "bfloat16": "float32", "mpich": "mpich"}
"""Which run tells what a byte costs."""


def main(options: Options) -> None:
    """Leaves networks.json and .md."""
    content: dict[str, Any] = {}
    tables, found = [], {}
    with data_folder() as folder:
        for machines, shards in SHARDS.items():
            for rate, steps in LINKS.items():
                work = options.case(CASE, folder).at(workers=machines, steps=5 if options.quick else steps)
                title = f"{machines} machines, links of {rate}"
                found[machines, rate] = work, interleaved(_contestants(work, rate, shards), options.repeats, title)
        bytes_of = _bytes_of(*found[OF_MACHINES, MEASURED_AT])
        for (machines, rate), (work, runs) in found.items():
            shards = SHARDS[machines]
            predicted = _predicted(work, rate, shards, bytes_of)
            if (machines, rate) == (OF_MACHINES, MEASURED_AT):
                predicted = {name: one for name, one in predicted.items() if BYTES_OF[name] != name}
            figures = {
                name: _figures(work, name, some, runs["ddp"], BITS[rate], predicted) for name, some in runs.items()
            }
            case = f"{machines} machines, links of {rate}"
            content[case] = {"shards": shards, "contestants": figures}
            heads = ["", "samples/s", "x DDP", "of the link used", "predicted / measured"]
            rows = [_row(name, some, len(heads)) for name, some in figures.items()]
            tables.append(f"{case}, {shards} shards\n\n{report.table(heads, rows)}")
    title = (
        f"{work.network.title}, {work.rows} rows a worker, one worker on each machine: medians of {options.repeats} "
        f"interleaved repetitions (lowest to highest); all machines share {_cores()} cores"
    )
    settings = {"repeats": options.repeats, "seconds_a_byte": bytes_of}
    said = ", ".join(f"{1e9 * one:.1f} ns with {NAMES[name][len('dptrain, ') :]}" for name, one in bytes_of.items())
    tables.append(
        f"Predicted with what a byte costs a core at each end, as float32 tells on {OF_MACHINES} machines and links of "
        f"{MEASURED_AT}: {said}.\n"
    )
    report.write(options.results, "networks", title, settings, content, "\n".join(tables))


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def _bytes_of(work: Workload, runs: Mapping[str, Runs]) -> dict[str, float]:
    """What a byte costs a core with each MPI."""
    job, found = _job(work, SHARDS[work.workers], "float32"), {}
    link, count = Link(BITS[MEASURED_AT], LATENCY), _cores() / work.workers
    for name in sorted(set(BYTES_OF.values())):
        if runs[name].found:
            seconds = work.batch / runs[name].median(RATE)
            found[name] = cost_of_a_byte(job, work.workers, link=link, count=count, seconds=seconds)
    return found


def _job(work: Workload, shards: int, gradients: str) -> Job:
    content = ours.content(work, shards, "segments")
    content["arithmetic"]["gradients"] = {"float32": "auto"}.get(gradients, gradients)
    return complete(check(content, work.model))


def _predicted(work: Workload, rate: str, shards: int, bytes_of: Mapping[str, float]) -> dict[str, float]:
    """What ``dptrain plan`` says of it; all machines share this one's cores."""
    found = {}
    for name, measured in BYTES_OF.items():
        if measured not in bytes_of:
            continue
        job = _job(work, shards, "bfloat16" if name == "bfloat16" else "float32")
        cores = Cores(_cores() / work.workers, bytes_of[measured])
        (point,) = predict(job, [work.workers], workers=1, link=Link(BITS[rate], LATENCY), hours=math.inf, cores=cores)
        found[name] = point.samples_per_second
    return found


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
