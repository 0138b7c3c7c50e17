"""PyTorch DistributedDataParallel on gloo, one thread a worker, on a case; rank 0 prints one line of JSON."""

import json
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from bench.cases import CASES


def main(name: str, rank: int, meeting: str) -> None:
    """Train the case as one of its workers; they meet at a file."""
    case = CASES[name]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=Path(meeting).as_uri(), rank=rank, world_size=case.workers)
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for inputs, outputs in zip(case.widths[:-1], case.widths[1:], strict=True):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    model = DistributedDataParallel(nn.Sequential(*layers[:-1]), gradient_as_bucket_view=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=case.lr, momentum=case.momentum)
    criterion = nn.CrossEntropyLoss()
    x = torch.randn(case.data_rows, case.widths[0])
    y = torch.argmax(x @ torch.randn(case.widths[0], case.widths[-1]), dim=1)
    steps_per_epoch = case.data_rows // case.batch

    def step(number: int, order: torch.Tensor) -> torch.Tensor:
        lo = (number % steps_per_epoch) * case.batch + rank * case.rows
        rows = order[lo : lo + case.rows]
        optimizer.zero_grad(set_to_none=True)
        loss: torch.Tensor = criterion(model(x[rows]), y[rows])
        loss.backward()
        optimizer.step()
        return loss.detach()

    order = torch.randperm(case.data_rows, generator=torch.Generator().manual_seed(0))
    for number in range(20):
        step(number, order)
    dist.barrier()
    started = time.perf_counter()
    total = torch.zeros(())
    for number in range(case.steps):
        if number % steps_per_epoch == 0:
            order = torch.randperm(case.data_rows, generator=torch.Generator().manual_seed(number))
            total = torch.zeros(())
        total = total + step(number, order)
    dist.barrier()
    seconds = time.perf_counter() - started
    if rank == 0:
        counted = (case.steps - 1) % steps_per_epoch + 1
        rate = case.steps * case.batch / seconds
        print(json.dumps({"samples_per_second": rate, "loss": float(total) / counted}), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(os.environ["RANK"]), sys.argv[2])
