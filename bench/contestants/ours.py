"""dptrain: run under mpirun, or alone. Rank 0 prints one line of JSON."""

import json
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

from bench.workload import WARMUP, Workload
from dptrain.job.load import check, complete
from dptrain.job.spec import Job
from dptrain.launch import announced
from dptrain.ranks import alone, follow, lead
from dptrain.watch import Observer, Unwatched


class Lines(Unwatched):
    """Keeps the lines of the journal."""

    def __init__(self) -> None:
        self.lines: list[Mapping[str, Any]] = []

    def progressed(self, line: Mapping[str, Any]) -> None:
        """See Observer."""
        self.lines.append(line)


def content(
    work: Workload, shards: int, exchange: str, compiled: str = "never", products: str = "numpy"
) -> dict[str, Any]:
    """The workload as a job of ``shards`` shards, as its file has it."""
    layers = [
        {**layer, "init": "uniform"} if layer["type"] in ("linear", "conv2d") else dict(layer)
        for layer in work.network.layers
    ]
    return {
        "seed": work.seed,
        "data": {"source": work.data, "features": ["x"], "label": "y", "validation": 0.0, "test": 0.0},
        "model": {"layers": layers},
        "optimizer": {"lr": work.lr, "momentum": work.momentum},
        "train": {"batch_size": work.batch, "shards": shards, "steps": work.total_steps},
        "exchange": {"type": exchange},
        "arithmetic": {"compiled": compiled, "products": products},
        "output": {"checkpoint_seconds": 0.0},
    }


def job(work: Workload, shards: int, exchange: str, compiled: str = "never", products: str = "numpy") -> Job:
    """The same, checked."""
    return complete(check(content(work, shards, exchange, compiled, products), work.model))


def run(it: Job, observer: Observer) -> None:
    """Train with all workers of this launch; only rank 0 comes back, the others leave."""
    place = announced(os.environ)
    if place.rank and not place.alone:
        sys.exit(follow(place))
    with tempfile.TemporaryDirectory() as folder:
        if place.alone:
            alone(it, run_dir=f"{folder}/run", observer=observer)
        else:
            with lead(place) as leader:
                leader.train(it, run_dir=f"{folder}/run", observer=observer)


def measured(work: Workload, lines: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Samples a second between the first line after the warm-up and the last, and the loss of the judged steps."""
    first = next(line for line in lines if line["step"] >= WARMUP)
    last = lines[-1]
    rows = (last["step"] - first["step"]) * work.batch
    ends = [0, *(line["step"] for line in lines)]
    judged = [
        (line["loss"], hi - lo)
        for line, lo, hi in zip(lines, ends[:-1], ends[1:], strict=True)
        if lo >= work.judged_from
    ]
    return {
        "samples_per_second": rows / (last["seconds"] - first["seconds"]),
        "loss": sum(loss * steps for loss, steps in judged) / sum(steps for _, steps in judged),
    }


def main(work: Workload, shards: int, exchange: str, compiled: str, products: str = "numpy") -> None:
    """Train and print what it came to."""
    observer = Lines()
    run(job(work, shards, exchange, compiled, products), observer)
    print(json.dumps(measured(work, observer.lines)), flush=True)


if __name__ == "__main__":
    main(Workload.parse(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:6])
