"""Models of a user's own over the digits, well-behaved and not, and the small jobs that train them."""

import copy
import os
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Backward = Callable[[Array], dict[str, Array]]

JOB: dict[str, Any] = {
    "name": "softmax",
    "seed": 3,
    "data": {"source": "digits", "validation": 0.1, "test": 0.1},
    "optimizer": {"lr": 0.5, "momentum": 0.9},
    "train": {"batch_size": 60, "shards": 5, "steps": 20, "evaluate_steps": 5, "evaluate_rows": 50},
    "output": {"journal_steps": 1, "checkpoint_seconds": 0.0},
}
"""Needs a model: an object of the user's own, or LAYERS."""

LAYERS: dict[str, Any] = {
    "model": {
        "layers": [
            {"type": "linear", "units": 24},
            {"type": "dropout", "rate": 0.2},
            {"type": "tanh"},
            {"type": "linear", "units": 10},
        ]
    }
}


def job(*parts: Mapping[str, Any], **sections: Mapping[str, Any]) -> dict[str, Any]:
    """JOB with more keys in its sections."""
    made = copy.deepcopy(JOB)
    for part in (*parts, sections):
        for key, value in part.items():
            made[key] = {**made.get(key, {}), **value} if isinstance(value, Mapping) else value
            if key == "train" and "epochs" in value:
                made["train"].pop("steps", None)
    return made


class Softmax:
    """z = x W, one shard at a time."""

    def parameters(self, rng: np.random.Generator) -> dict[str, Array]:
        return {"W": rng.standard_normal((64, 10)) * 0.1}

    def forward(self, params: Mapping[str, Array], x: Array, rng: Any) -> tuple[Array, Backward]:
        return x @ params["W"], lambda dz: {"W": x.T @ dz}


class Batched(Softmax):
    """The same, k shards at a time."""

    batched = True

    def forward(self, params: Mapping[str, Array], x: Array, rng: Any) -> tuple[Array, Backward]:
        return x @ params["W"], lambda dz: {"W": x.transpose(0, 2, 1) @ dz}


class Merging(Batched):
    """Says that shards don't meet in it, but looks at the mean of all of them."""

    def forward(self, params: Mapping[str, Array], x: Array, rng: Any) -> tuple[Array, Backward]:
        shifted = x - x.mean()
        return shifted @ params["W"], lambda dz: {"W": shifted.transpose(0, 2, 1) @ dz}


class Single(Softmax):
    """What Merging is one shard at a time."""

    def forward(self, params: Mapping[str, Array], x: Array, rng: Any) -> tuple[Array, Backward]:
        shifted = x - x.mean()
        return shifted @ params["W"], lambda dz: {"W": shifted.T @ dz}


class MergingMany(Batched):
    """Merges only where more than two shards come together."""

    def forward(self, params: Mapping[str, Array], x: Array, rng: Any) -> tuple[Array, Backward]:
        shifted = x - (x.mean() if len(x) > 2 else x.mean(axis=(1, 2), keepdims=True))
        return shifted @ params["W"], lambda dz: {"W": shifted.transpose(0, 2, 1) @ dz}


class Noisy(Softmax):
    """Draws from a generator of its own."""

    def __init__(self) -> None:
        self.rng = np.random.default_rng()

    def forward(self, params: Mapping[str, Array], x: Array, rng: Any) -> tuple[Array, Backward]:
        noisy = x + self.rng.standard_normal(x.shape) * 1e-3
        return noisy @ params["W"], lambda dz: {"W": noisy.T @ dz}


class Drawing(Softmax):
    """Does something to the output where the first number of its generator says so."""

    def __init__(self, chance: float, act: Callable[[Array], Array]) -> None:
        self.chance, self.act = chance, act

    def forward(self, params: Mapping[str, Array], x: Array, rng: Any) -> tuple[Array, Backward]:
        z, back = super().forward(params, x, rng)
        return (self.act(z) if rng is not None and rng.random() < self.chance else z), back


class Counting(Softmax):
    """Does something after so many forward passes of training (``training``) or of evaluation; after 0 nothing."""

    def __init__(self, passes: int, act: Callable[[], None], training: bool = True) -> None:
        self.left, self.act, self.training = passes, act, training

    def forward(self, params: Mapping[str, Array], x: Array, rng: Any) -> tuple[Array, Backward]:
        if (rng is not None) == self.training and len(x):
            self.left -= 1
            if self.left == 0:
                self.act()
        return super().forward(params, x, rng)


def nan(z: Array) -> Array:
    """An output with NaN."""
    return np.full_like(z, np.nan)


def fail() -> None:
    """An exception in the user's code."""
    raise RuntimeError("no more of this")


def quit() -> None:
    """The user's code wants to leave."""
    raise SystemExit(3)


def kill(number: int) -> Callable[[], None]:
    """A signal to this very process."""
    return lambda: os.kill(os.getpid(), number)


def build(kind: str = "Softmax") -> Softmax:
    """For model.python."""
    return globals()[kind]()  # type: ignore[no-any-return]
