"""PyTorch DistributedDataParallel on gloo, one thread a worker."""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from bench import clock
from bench.contestants.torch_model import LAYOUTS, layout_seconds, step
from bench.workload import Workload


def main(work: Workload, rank: int, meeting: str, bf16: bool) -> None:
    """Train as one of the workers, which meet at a file; rank 0 prints what it came to."""
    torch.set_num_threads(1)
    torch.set_num_interop_threads(1)
    dist.init_process_group("gloo", init_method=Path(meeting).as_uri(), rank=rank, world_size=work.workers)
    seconds = layout_seconds(work, work.rows, bf16)
    layout = "contiguous"
    if seconds:
        # All ranks must lay out their parameters alike.
        every = torch.tensor(list(seconds.values()))
        dist.all_reduce(every)
        layout = list(seconds)[int(every.argmin())]

    def wrapped(model: nn.Module) -> nn.Module:
        return DistributedDataParallel(model, gradient_as_bucket_view=True, static_graph=True)

    one = step(work, rank, work.rows, bf16=bf16, layout=LAYOUTS[layout], wrapped=wrapped)
    found = clock.train(work, one, dist.barrier)
    loss = torch.tensor(found["loss"], dtype=torch.float64)
    dist.all_reduce(loss)
    if rank == 0:
        found["loss"] = float(loss) / work.workers
        print(json.dumps({**found, "layout": layout if seconds else ""}), flush=True)
    dist.destroy_process_group()
    # Threads of gloo's now and then end the interpreter's own end with "terminate called".
    os._exit(0)


if __name__ == "__main__":
    main(Workload.parse(sys.argv[1]), int(os.environ["RANK"]), os.environ["MEETING"], "--bf16" in sys.argv[2:])
