"""What is measured: the same model, batch, optimizer, rows and number of steps for every contestant."""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

Layer = Mapping[str, Any]

DATA_ROWS = 16_384
"""Rows of every data set; a whole number of any case's batches."""

CLASSES = 10
WARMUP = 20
"""Steps before the clock starts."""


@dataclass(frozen=True)
class Model:
    """Layers as a job file of dptrain names them, on samples of ``shape`` (height, width, channels for images)."""

    title: str
    shape: tuple[int, ...]
    layers: tuple[Layer, ...]

    def tensors(self) -> Iterator[tuple[Layer, tuple[int, ...], tuple[int, ...]]]:
        """Every layer with the shapes of one sample before and after it."""
        shape = self.shape
        for layer in self.layers:
            before, shape = shape, _after(layer, shape)
            yield layer, before, shape

    @property
    def parameters(self) -> int:
        """Elements of all weights and biases."""
        return sum(math.prod(shape) for shape in self.parameter_shapes())

    def parameter_shapes(self) -> list[tuple[int, ...]]:
        """W and b of every layer that has them; a convolution's W is (kernel * kernel * inputs, channels)."""
        found: list[tuple[int, ...]] = []
        for layer, before, after in self.tensors():
            if layer["type"] == "linear":
                found += [(before[0], after[0]), (after[0],)]
            elif layer["type"] == "conv2d":
                found += [(layer["kernel"] ** 2 * before[2], after[2]), (after[2],)]
        return found


def _after(layer: Layer, shape: tuple[int, ...]) -> tuple[int, ...]:
    match layer["type"]:
        case "linear":
            return (layer["units"],)
        case "conv2d":
            return (*shape[:2], layer["channels"])
        case "max_pool2d":
            return (shape[0] // layer["kernel"], shape[1] // layer["kernel"], shape[2])
        case "flatten":
            return (math.prod(shape),)
    return shape


def _mlp(*widths: int) -> Model:
    layers: list[Layer] = []
    for units in widths[1:]:
        layers += [{"type": "linear", "units": units}, {"type": "relu"}]
    return Model("MLP " + "-".join(map(str, widths)), widths[:1], tuple(layers[:-1]))


def _convolution(channels: int) -> list[Layer]:
    return [
        {"type": "conv2d", "channels": channels, "kernel": 3, "padding": "same"},
        {"type": "relu"},
        {"type": "max_pool2d", "kernel": 2},
    ]


MODELS = {
    "mlp": _mlp(784, 512, 256, CLASSES),
    "big": _mlp(784, 2048, 2048, CLASSES),
    "wide": _mlp(784, 4096, 4096, CLASSES),
    "cnn": Model(
        "CNN conv 32, conv 64, 128, 10",
        (28, 28, 1),
        (
            *_convolution(32),
            *_convolution(64),
            {"type": "flatten"},
            {"type": "linear", "units": 128},
            {"type": "relu"},
            {"type": "linear", "units": CLASSES},
        ),
    ),
}


@dataclass(frozen=True)
class Workload:
    """SGD on a model: ``rows`` rows for each of ``workers`` workers a step, ``steps`` steps after the warm-up.

    ``data`` is the folder with x.npy and y.npy. ``seed`` decides weights and order, never the data.
    """

    model: str
    rows: int
    workers: int
    steps: int
    data: str = ""
    seed: int = 0
    lr: float = 0.01
    momentum: float = 0.9

    @property
    def network(self) -> Model:
        """The model itself."""
        return MODELS[self.model]

    @property
    def batch(self) -> int:
        """Rows of all workers together."""
        return self.rows * self.workers

    @property
    def steps_per_epoch(self) -> int:
        """Steps that use every row once."""
        return DATA_ROWS // self.batch

    @property
    def total_steps(self) -> int:
        """Those that are measured, and the warm-up."""
        return WARMUP + self.steps

    @property
    def judged_from(self) -> int:
        """The first of the steps whose mean loss is compared: the last epoch, or all where there are fewer."""
        return max(0, self.total_steps - self.steps_per_epoch)

    @property
    def title(self) -> str:
        """The case in words."""
        workers = "1 worker" if self.workers == 1 else f"{self.workers} workers"
        return f"{self.network.title}, {self.rows} rows a worker, {workers}"

    def text(self) -> str:
        """This workload as a program's argument."""
        return json.dumps(asdict(self))

    @classmethod
    def parse(cls, text: str) -> "Workload":
        """The reverse of ``text``."""
        return cls(**json.loads(text))

    def at(self, **changes: Any) -> "Workload":
        """A changed copy."""
        return replace(self, **changes)


CASES = {
    "mlp-32": Workload("mlp", 32, 2, 800),
    "mlp-128": Workload("mlp", 128, 2, 400),
    "big-128": Workload("big", 128, 2, 40),
    "cnn-64": Workload("cnn", 64, 2, 50, lr=0.02),
}
