"""The models in PyTorch, and one step of training."""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from bench.clock import Step
from bench.rows import Integers, read
from bench.workload import Model, Workload


def build(model: Model) -> nn.Sequential:
    """The model with PyTorch's own start: uniform in +-1 / sqrt(fan in)."""
    layers: list[nn.Module] = []
    for layer, before, after in model.tensors():
        match layer["type"]:
            case "linear":
                layers.append(nn.Linear(before[0], after[0]))
            case "conv2d":
                layers.append(nn.Conv2d(before[2], after[2], layer["kernel"], padding="same"))
            case "max_pool2d":
                layers.append(nn.MaxPool2d(layer["kernel"]))
            case "flatten":
                layers.append(nn.Flatten())
            case "relu":
                layers.append(nn.ReLU())
    return nn.Sequential(*layers)


def step(
    work: Workload,
    rank: int,
    rows: int,
    *,
    bf16: bool,
    layout: torch.memory_format,
    wrapped: Callable[[nn.Module], nn.Module] = lambda model: model,
) -> Step:
    """Training on rows ``rank * rows`` on of every batch, with the fused SGD."""
    torch.manual_seed(work.seed)
    model = build(work.network)
    x_all, y_all = map(torch.from_numpy, read(work.data))
    if len(work.network.shape) == 3:
        model = model.to(memory_format=layout)
        x_all = x_all.permute(0, 3, 1, 2).contiguous(memory_format=layout)
    trained = wrapped(model)
    optimizer = torch.optim.SGD(trained.parameters(), lr=work.lr, momentum=work.momentum, fused=True)
    criterion = nn.CrossEntropyLoss()

    def narrow() -> AbstractContextManager[object]:
        return torch.autocast("cpu", dtype=torch.bfloat16) if bf16 else nullcontext()

    def one(batch: Integers) -> torch.Tensor:
        mine = torch.from_numpy(batch[rank * rows : (rank + 1) * rows])
        optimizer.zero_grad(set_to_none=True)
        with narrow():
            loss: torch.Tensor = criterion(trained(x_all[mine]), y_all[mine])
        loss.backward()
        optimizer.step()
        return loss.detach()

    return one


LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def layout_seconds(work: Workload, rows: int, bf16: bool) -> dict[str, float]:
    """The quickest of some steps in each memory layout of images; nothing where the samples are flat."""
    if len(work.network.shape) != 3:
        return {}
    import numpy as np

    found = {}
    for name, layout in LAYOUTS.items():
        one = step(work, 0, rows, bf16=bf16, layout=layout)
        seconds = []
        for _ in range(6):
            started = time.perf_counter()
            one(np.arange(rows))
            seconds.append(time.perf_counter() - started)
        found[name] = min(seconds)
    return found
