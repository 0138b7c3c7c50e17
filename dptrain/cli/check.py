"""``dptrain check``: what a job would do, without training."""

import math
import os
from typing import TYPE_CHECKING

from dptrain.cli.doctor import size
from dptrain.job.spec import Job

if TYPE_CHECKING:
    from dptrain.plan import Plan


def show(job: Job, workers: int) -> None:
    """Print the resolved job as TOML, then its plan for ``workers`` workers. Raises DptrainError as training would."""
    from dptrain import arithmetic, launch
    from dptrain.job.load import to_toml

    print(to_toml(job))
    # The plan starts a program to weigh it; under a launcher that would pass for a worker.
    for name in set(os.environ) - set(launch.without_launcher(os.environ)):
        del os.environ[name]
    arithmetic.choose(job.arithmetic.kernels, job.arithmetic.threads)
    from dptrain.plan import plan

    found = plan(job, workers=workers)
    _print_layers(found)
    print(_data(found))
    print(_memory(found))
    print(_shards(found))


def _print_layers(plan: "Plan") -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("layer", no_wrap=True)
    table.add_column("output", no_wrap=True)
    table.add_column("parameters", no_wrap=True, justify="right")
    table.add_row("a sample", _shape(plan.sample_shape), "")
    for layer in plan.layers:
        table.add_row(layer.name, _shape(layer.output_shape), f"{layer.parameters:,}" if layer.parameters else "")
    table.add_row("all", "", f"{plan.parameters:,}")
    Console(highlight=False).print(table)


def _shape(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "1"


def _data(plan: "Plan") -> str:
    return (
        f"data: {plan.train_rows:,} training rows, {plan.validation_rows:,} validation, {plan.test_rows:,} test; "
        f"{plan.total_steps:,} steps at most, {plan.steps_per_epoch:,} an epoch"
    )


def _memory(plan: "Plan") -> str:
    parts = ", ".join(f"{purpose} {size(count)}" for purpose, count in plan.memory.items())
    who = f"each of {plan.workers} workers" if plan.workers > 1 else "one worker alone"
    return f"memory: {size(plan.memory_total)} for {who} ({parts})"


def _shards(plan: "Plan") -> str:
    whole = plan.rows_per_second_one_shard
    share = plan.rows_per_second / whole
    text = (
        f"shards: {plan.shards} of {plan.rows_per_shard} rows: {plan.rows_per_second:,.0f} rows/s in one worker, "
        f"{share:.0%} of what a single shard of the whole batch gives here ({whole:,.0f})"
    )
    idle = plan.workers - plan.shards
    busiest = math.ceil(plan.shards / plan.workers)
    if idle > 0:
        return f"{text}; of {plan.workers} workers {idle} would stand by, train.shards changes that (and the bits)"
    if plan.workers > 1:
        return f"{text}; of {plan.workers} workers the busiest has {busiest}"
    return f"{text}; at most {plan.shards} workers can share them"
