"""``dptrain plan``: what a job will take on other numbers of machines."""

import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict

from dptrain.cli.doctor import size
from dptrain.errors import UsageError
from dptrain.job.spec import Job
from dptrain.moving import Cores, seconds_a_byte
from dptrain.scaling import Link, Point, predict

_RATES = {"k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}
_TIMES = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0}


def machines(text: str) -> list[int]:
    """``2..1024`` doubles from 2 on; ``2,3,8`` are just these. Raises UsageError."""
    try:
        if ".." in text:
            low, high = map(int, text.split("..", 1))
            found = [low << i for i in range(64) if low << i <= high] if low > 0 else []
        else:
            found = sorted({int(one) for one in text.split(",")})
    except ValueError:
        found = []
    if not found or found[0] < 1 or found[-1] > 4096:
        raise UsageError(
            f"--nodes {text}",
            expected="a range, as 2..1024, or numbers, as 2,3,8, from 1 to 4096",
            found=repr(text),
            cure="say for instance --nodes 2..64",
        )
    return found


def link(text: str) -> Link:
    """``100Gbit,2us``: bits a second each way, and the time from one machine to another. Raises UsageError."""
    pattern = r"([\d.]+)\s*([kmgt])?bit(?:/s)?\s*(?:,\s*([\d.]+)\s*(ns|us|µs|ms|s))?"
    found = re.fullmatch(pattern, text.strip(), re.IGNORECASE)
    try:
        if found is None:
            raise ValueError("none")
        rate = float(found[1]) * _RATES.get((found[2] or "").lower(), 1.0)
        latency = float(found[3]) * _TIMES[found[4].lower()] if found[3] else 50e-6
        if rate <= 0:
            raise ValueError("no rate")
    except ValueError:
        raise UsageError(
            f"--link {text}",
            expected="a rate and a latency, as 100Gbit,2us or 1Gbit,50us",
            found=repr(text),
            cure="say for instance --link 10Gbit,20us",
        ) from None
    return Link(rate, latency)


def show(
    job: Job,
    counts: Sequence[int],
    over: Link,
    *,
    workers: int,
    cores: float,
    byte: float,
    rows: int,
    hours: float,
    as_json: bool,
) -> None:
    """Print the prediction for each number of machines of ``cores``, each of which moves a byte in ``byte`` ns.

    0 of either is what this machine has. Raises DptrainError as training would.
    """
    of_each = Cores(cores or len(os.sched_getaffinity(0)), byte / 1e9 or seconds_a_byte())
    points = predict(job, counts, workers=workers, link=over, rows=rows, hours=hours, cores=of_each)
    if as_json:
        for point in points:
            print(json.dumps(asdict(point)), flush=True)
        return
    _table(points, over, workers, of_each, hours)


def _table(points: Iterable[Point], over: Link, workers: int, cores: Cores, hours: float) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    heads = "nodes", "workers", "batch", "step", "of it\ncomputing", "samples/s", "effi-\nciency"
    for head in (*heads, "sent by\na node", "coordi-\nnators", "memory of\na worker", "lost to\nfailures"):
        table.add_column(head, justify="right", no_wrap=True)
    for point in points:
        table.add_row(
            f"{point.size.machines:,}",
            f"{point.size.size:,}",
            f"{point.batch:,}",
            f"{1e3 * point.step:.3g} ms",
            f"{point.compute / point.step:.0%}",
            f"{point.samples_per_second:,.0f}",
            f"{point.efficiency:.0%}",
            size(int(point.sent)),
            f"{point.coordinators:,}",
            size(point.memory),
            f"{point.lost:.2%}",
        )
    # Its columns are worth more than a narrow window's width.
    console = Console(highlight=False)
    console.width = max(console.width, 125)
    console.print(table)
    print(
        f"{workers} workers and {cores.count:g} cores a node; links of {over.rate / 1e9:g} Gbit/s each way, "
        f"{1e6 * over.latency:g} us. Forward, backward, additions and updates were measured here, on one worker; the "
        f"exchange is simulated. A core moves a byte, at each of its ends, in {1e9 * cores.byte:.2g} ns.\n"
        f"A node fails once in {hours:,.0f} hours, which costs a restart and half of output.checkpoint_seconds."
    )
