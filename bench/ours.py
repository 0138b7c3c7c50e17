"""dptrain on a case: run under mpirun; rank 0 prints one line of JSON."""

import json
import os
import sys
import tempfile
from typing import Any

from bench.cases import CASES, Case
from dptrain.job.load import check, complete
from dptrain.job.spec import Job
from dptrain.launch import announced
from dptrain.ranks import alone, follow, lead


def job(case: Case, shards: int, exchange: str, shared_memory: bool = True) -> Job:
    """The case as a job of ``shards`` shards."""
    layers: list[dict[str, Any]] = []
    for width in case.widths[1:]:
        layers += [{"type": "linear", "units": width, "init": "uniform"}, {"type": "relu"}]
    content = {
        "data": {
            "source": "synthetic",
            "synthetic": {"rows": case.data_rows, "shape": [case.widths[0]], "classes": case.widths[-1]},
            "validation": 0.0,
            "test": 0.0,
        },
        "model": {"layers": layers[:-1]},
        "optimizer": {"lr": case.lr, "momentum": case.momentum},
        "train": {"batch_size": case.batch, "shards": shards, "steps": case.steps},
        "exchange": {"type": exchange, "shared_memory": shared_memory},
        "output": {"checkpoint_seconds": 0.0},
    }
    return complete(check(content, case.name))


def main(name: str, shards: int, exchange: str, shared_memory: bool) -> None:
    """Train the case and print what it came to."""
    place = announced(os.environ)
    if place.rank:
        sys.exit(follow(place))
    case = CASES[name]
    with tempfile.TemporaryDirectory() as folder:
        options = {"run_dir": f"{folder}/run"}
        if place.alone:
            result = alone(job(case, shards, exchange, shared_memory), **options)
        else:
            with lead(place) as leader:
                result = leader.train(job(case, shards, exchange, shared_memory), run_dir=options["run_dir"])
    print(json.dumps({"samples_per_second": result.samples_per_second, "loss": result.loss}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3], "--messages" not in sys.argv[4:])
