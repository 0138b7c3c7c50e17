"""PyTorch in one process without data parallelism: as many threads as workers, the same global batch."""

import json
import sys

import torch

from bench import clock
from bench.contestants.torch_model import LAYOUTS, layout_seconds, step
from bench.workload import Workload


def main(work: Workload, bf16: bool) -> None:
    """Train and print what it came to."""
    torch.set_num_threads(work.workers)
    torch.set_num_interop_threads(1)
    seconds = layout_seconds(work, work.batch, bf16)
    layout = min(seconds, key=seconds.__getitem__, default="contiguous")
    one = step(work, 0, work.batch, bf16=bf16, layout=LAYOUTS[layout])
    found = clock.train(work, one, lambda: None)
    print(json.dumps({**found, "layout": layout if seconds else ""}), flush=True)


if __name__ == "__main__":
    main(Workload.parse(sys.argv[1]), "--bf16" in sys.argv[2:])
