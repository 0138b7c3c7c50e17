"""PyTorch DDP on gloo under torchrun, with a checkpoint every second that a restart goes on from.

As torchrun's documentation has it: load the checkpoint if there is one, train, save now and then from rank 0.
Every worker says in its cell of a file, laid out as dptrain's board, what step it is at.
"""

import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from bench.contestants.running import BEGUN, CELLS
from bench.contestants.torch_model import build
from bench.rows import orders, read
from bench.workload import Workload
from dptrain import board
from dptrain.board import STEP

CHECKPOINT = "checkpoint.pt"
"""In the run's folder."""


def main(work: Workload, folder: Path, seconds: float) -> None:
    """Train without end as one of torchrun's workers."""
    torch.set_num_threads(1)
    torch.set_num_interop_threads(1)
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    with (folder / CELLS).open("r+b") as file:
        cell = board.mapped(file.fileno(), world)[1 + rank]
    cell[STEP] = 0
    board.sign(cell, rank)

    torch.manual_seed(work.seed)
    model = build(work.network)
    optimizer = torch.optim.SGD(model.parameters(), lr=work.lr, momentum=work.momentum, fused=True)
    done = 0
    if (folder / CHECKPOINT).exists():
        kept = torch.load(folder / CHECKPOINT, weights_only=True)
        model.load_state_dict(kept["model"])
        optimizer.load_state_dict(kept["optimizer"])
        done = kept["step"]
    if rank == 0:
        with (folder / BEGUN).open("a") as file:
            file.write(f"{done}\n")
    trained = DistributedDataParallel(model, gradient_as_bucket_view=True, static_graph=True)
    criterion = nn.CrossEntropyLoss()
    x, y = map(torch.from_numpy, read(work.data))
    epochs = orders(work.seed)
    for _ in range(done // work.steps_per_epoch):
        next(epochs)
    order, saved = next(epochs), time.perf_counter()
    while True:
        cell[STEP] = done + 1
        at = done % work.steps_per_epoch * work.batch + rank * work.rows
        mine = torch.from_numpy(order[at : at + work.rows])
        optimizer.zero_grad(set_to_none=True)
        criterion(trained(x[mine]), y[mine]).backward()
        optimizer.step()
        done += 1
        if done % work.steps_per_epoch == 0:
            order = next(epochs)
        if rank == 0 and time.perf_counter() - saved >= seconds:
            saved = time.perf_counter()
            # A kill in the middle must not cost the one before.
            part = folder / f"{CHECKPOINT}.part"
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": done}, part)
            os.replace(part, folder / CHECKPOINT)


if __name__ == "__main__":
    main(Workload.parse(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3]))
