"""One layer or model, run by hand: no worker, no tree, no exchange."""

from dataclasses import dataclass, field

import numpy as np

from dptrain.job import spec
from dptrain.nn.chain import LAYERS
from dptrain.nn.dropout import Dropout
from dptrain.nn.layer import Pass, Workspace


class Collected:
    """A sink that keeps everything, and checks that each tensor is opened and closed once."""

    def __init__(self, layout, k, dtype):
        self.vectors = np.full((k, layout.size), np.nan, dtype)
        self.tensors = layout.views(self.vectors)
        self.opened, self.closed = [], []

    def open(self, name):
        assert name not in self.opened
        self.opened.append(name)
        return self.tensors[name]

    def close(self, name):
        assert name in self.opened
        assert name not in self.closed
        self.closed.append(name)


@dataclass
class Result:
    y: np.ndarray
    dx: np.ndarray | None = None
    grads: dict = field(default_factory=dict)

    def bytes(self):
        parts = [self.y, self.dx, *self.grads.values()]
        return [None if part is None else part.tobytes() for part in parts]


def make_run(k, b, counts=None, *, training=True, shards=None, dtype=np.float64, workspace=None, step=3):
    counts = [b] * k if counts is None else counts
    rows = (np.arange(b) < np.array(counts).reshape(-1, 1)).astype(dtype)
    return Pass(
        training=training,
        seed=7,
        step=step,
        shards=range(k) if shards is None else shards,
        rows=rows,
        counts=counts,
        workspace=workspace or Workspace(),
    )


def bind(settings, shape, dtype):
    if isinstance(settings, spec.Dropout):
        return Dropout(settings, "layer", shape, dtype, 4)
    return LAYERS[settings.type](settings, "layer", shape, dtype)


def make_tensors(layer, rng, dtype):
    """Random tensors; variances positive."""
    tensors = {}
    for name, shape in [*layer.parameters, *[(name, shape) for name, shape, _ in layer.buffers]]:
        tensors[name] = rng.standard_normal(shape).astype(dtype)
        if name == "running_var":
            tensors[name] = np.abs(tensors[name]) + dtype(0.5)
    return tensors


def run_layer(layer, tensors, x, dy, run, need_dx=True):
    """Copies of what a layer's forward and backward give."""
    y, backward = layer.forward(tensors, x, run)
    result = Result(y.copy())
    if dy is not None:
        shapes = [*layer.parameters, *[(name, shape) for name, shape, _ in layer.buffers]]
        grads = {name: np.full((len(x), *shape), np.nan, dy.dtype) for name, shape in shapes}
        dx = backward(dy.copy(), grads, need_dx)
        result.dx = None if dx is None or not need_dx else dx.copy()
        result.grads = grads
    return result


def spaced(rng, shape, dtype=np.float64):
    """Numbers in about (-2, 2) in random order, no two nearer than 4 / size and none near 0: no kink is met."""
    size = int(np.prod(shape))
    return ((rng.permutation(size) - size // 2 + 1 / 3) * (4 / max(size, 4))).reshape(shape).astype(dtype)


def difference(f, x, rng, h=1e-6):
    """A direction u, and the central difference of f along it at x."""
    u = rng.standard_normal(x.shape)
    return u, (f(x + h * u) - f(x - h * u)) / (2 * h)
