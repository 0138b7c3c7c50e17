"""Whole training steps of dptrain beside its peers and the machine's limits, at one worker and at several."""

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from typing import Any

from bench import machine, plot, report, spawn
from bench.interleave import Runs, interleaved, ratios, spread
from bench.options import Options, data_folder
from bench.spawn import Found, NotRun
from bench.workload import CASES, Workload

RATE = "samples_per_second"

LOSS_TOLERANCE = 0.1
"""How far a contestant's loss may be from the median of all, as a share of it.

All train on the same rows; weights and order are drawn anew by each contestant in each repetition. Draws of one
contestant differed by up to 0.05; a forgotten momentum, or gradients summed over two workers where their mean is meant,
by 0.3 and more on the perceptrons.
"""

BF16 = {"avx512_bf16", "amx_bf16"}


@dataclass(frozen=True)
class Contestant:
    """``kind`` is "ours", "other" or "limit"; ``several``: it makes sense for more than one worker only."""

    name: str
    kind: str
    run: Callable[[Workload], Found]
    several: bool = False


def _ours(
    exchange: str, shards: int = 0, compiled: str = "never", products: str = "numpy"
) -> Callable[[Workload], Found]:
    def run(work: Workload) -> Found:
        if compiled == "auto" and not find_spec("numba"):
            raise NotRun("numba is not installed: pip install '.[compiled]'")
        if products == "mkl" and not any(metadata.distributions(name="mkl")):
            raise NotRun("MKL is not installed: pip install '.[mkl]'")
        arguments = (work.text(), str(shards or work.workers), exchange, compiled, products)
        if work.workers == 1:
            return spawn.alone("bench.contestants.ours", *arguments)
        return spawn.mpirun(work.workers, "bench.contestants.ours", *arguments)

    return run


def _mpi(module: str, *flags: str) -> Callable[[Workload], Found]:
    return lambda work: spawn.mpirun(work.workers, module, work.text(), *flags)


def _ddp(*flags: str) -> Callable[[Workload], Found]:
    def run(work: Workload) -> Found:
        return spawn.meeting(
            work.workers, "bench.contestants.torch_ddp", work.text(), *flags, interpreter="BENCH_TORCH"
        )

    return run


def _torch(*flags: str) -> Callable[[Workload], Found]:
    def run(work: Workload) -> Found:
        module, interpreter = "bench.contestants.torch_alone", "BENCH_TORCH"
        return spawn.alone(module, work.text(), *flags, interpreter=interpreter, threads=work.workers)

    return run


def _jax(work: Workload) -> Found:
    return spawn.alone("bench.contestants.jax_devices", work.text(), interpreter="BENCH_JAX")


def _narrow(run: Callable[[Workload], Found]) -> Callable[[Workload], Found]:
    def checked(work: Workload) -> Found:
        if not BF16 & machine.flags():
            raise NotRun(f"this CPU has no bf16 instructions ({', '.join(sorted(BF16))})")
        return run(work)

    return checked


CONTESTANTS = {
    "dptrain": Contestant("dptrain, shards = workers", "ours", _ours("auto")),
    "dptrain-compiled": Contestant(
        "dptrain, shards = workers, extra `compiled`", "ours", _ours("auto", compiled="auto")
    ),
    "dptrain-mkl": Contestant(
        "dptrain, shards = workers, extras `compiled` and `mkl`", "ours", _ours("auto", compiled="auto", products="mkl")
    ),
    "dptrain-8": Contestant("dptrain, 8 shards", "ours", _ours("auto", 8), several=True),
    "dptrain-segments": Contestant("dptrain, shards = workers, messages", "ours", _ours("segments"), several=True),
    "dptrain-allreduce": Contestant("dptrain, `allreduce`", "ours", _ours("allreduce"), several=True),
    "ddp": Contestant("PyTorch DDP, gloo, float32", "other", _ddp(), several=True),
    "ddp-bf16": Contestant("PyTorch DDP, gloo, bf16 autocast", "other", _narrow(_ddp("--bf16")), several=True),
    "torch": Contestant("PyTorch, one process, a thread a worker, float32", "other", _torch()),
    "torch-bf16": Contestant("PyTorch, one process, bf16 autocast", "other", _narrow(_torch("--bf16"))),
    "jax": Contestant("JAX, a CPU device a worker, jit(shard_map)", "other", _jax),
    "numpy": Contestant("numpy + mpi4py, one Allreduce in place", "other", _mpi("bench.contestants.numpy_allreduce")),
    "chainermn-style": Contestant(
        "ChainerMN-style (naive communicator), numpy",
        "other",
        _mpi("bench.contestants.numpy_allreduce", "--naive"),
        several=True,
    ),
    "limit": Contestant("limit: products + exchange's bytes", "limit", _mpi("bench.contestants.limits")),
}

PRODUCTS = {
    "limit-products": ("limit: products alone, numpy's BLAS", "products_samples_per_second"),
    "limit-products-mkl": ("limit: products alone, MKL", "mkl_products_samples_per_second"),
}
"""Rows that the limit's runs give besides, and their figure; MKL's where it is installed."""


def main(options: Options) -> None:
    """Run the cases and leave steps.json, steps.md and steps.png; cases measured before on this machine stay there."""
    settings = {"repeats": options.repeats, "quick": options.quick}
    content = report.kept(options.results, "steps", settings)
    with data_folder() as folder:
        for name in options.cases or tuple(CASES):
            for workers in options.workers:
                work = options.case(name, folder).at(workers=workers)
                content[work.title] = _figures(work, _measure(work, options))
                # After every case, so that a run that is stopped leaves what it measured.
                _write(options, settings, content)


def _write(options: Options, settings: dict[str, Any], content: dict[str, Any]) -> None:
    title = (
        "Whole training steps, data gathering and loss included: medians of "
        f"{options.repeats} interleaved repetitions (lowest to highest)"
    )
    tables = "\n".join(f"{case}\n\n{_table(figures)}" for case, figures in content.items())
    report.write(options.results, "steps", title, settings, {"cases": content}, tables)
    plot.bars(
        options.results / "steps.png", {case: _bars(figures) for case, figures in content.items()}, "samples a second"
    )


def _measure(work: Workload, options: Options) -> dict[str, Runs]:
    some = {
        key: (lambda repeat, run=contestant.run: run(work.at(seed=repeat)))
        for key, contestant in CONTESTANTS.items()
        if options.wants(key) and (work.workers > 1 or not contestant.several)
    }
    return interleaved(some, options.repeats, work.title)


def _figures(work: Workload, runs: Mapping[str, Runs]) -> dict[str, Any]:
    """Of every contestant what the table shows, and every repetition as it was."""
    losses = {key: some.median("loss") for key, some in runs.items() if some.found and "loss" in some.found[0]}
    middle = statistics.median(losses.values()) if losses else 0.0
    found: dict[str, Any] = {}
    for key, some in runs.items():
        figures: dict[str, Any] = {"name": CONTESTANTS[key].name, "kind": CONTESTANTS[key].kind}
        if some.reason:
            figures["not_run"] = some.reason
        if some.found:
            figures |= {RATE: spread(some.values(RATE)), "runs": some.found}
            for reference in ("ddp", "torch", "limit"):
                if reference in runs and runs[reference].found:
                    figures[f"times_{reference}"] = spread(ratios(some, runs[reference], RATE))
        if key in losses:
            figures["loss"] = losses[key]
            figures["same_work"] = abs(losses[key] - middle) <= LOSS_TOLERANCE * middle
        found[key] = figures
    for key, (name, rate) in PRODUCTS.items():
        if "limit" not in runs or not all(rate in some for some in runs["limit"].found) or not runs["limit"].found:
            continue
        figures = {"name": name, "kind": "limit", RATE: spread(runs["limit"].values(rate))}
        for reference in ("ddp", "torch"):
            if reference in runs and runs[reference].found:
                pairs = zip(runs["limit"].values(rate), runs[reference].values(RATE), strict=False)
                figures[f"times_{reference}"] = spread([a / b for a, b in pairs])
        found[key] = figures
    return found


def _table(figures: Mapping[str, Any]) -> str:
    references = [key for key in ("ddp", "torch", "limit") if any(f"times_{key}" in some for some in figures.values())]
    names = {"ddp": "x DDP", "torch": "x PyTorch, one process", "limit": "of the limit"}
    heads = ["", "samples/s", *(names[key] for key in references), "loss"]
    rows = []
    for some in figures.values():
        if RATE not in some:
            rows.append(report.not_run(some["name"], some["not_run"], len(heads)))
            continue
        rate = some[RATE]
        cells = [some["name"], f"{rate['median']:,.0f} ({rate['lowest']:,.0f} to {rate['highest']:,.0f})"]
        if layouts := {run["layout"] for run in some.get("runs", []) if run.get("layout")}:
            cells[0] += f", {' or '.join(sorted(layouts))}"
        for key in references:
            times = some.get(f"times_{key}")
            cells.append(f"{times['median']:.2f} (at least {times['lowest']:.2f})" if times else "")
        loss = f"{some['loss']:.4f}" if "loss" in some else ""
        if not some.get("same_work", True):
            loss += " **other work**"
        rows.append([*cells, loss])
    return report.table(heads, rows)


def _bars(figures: Mapping[str, Any]) -> list[plot.Bar]:
    return [plot.Bar(some["name"], **some[RATE], kind=some["kind"]) for some in figures.values() if RATE in some]
