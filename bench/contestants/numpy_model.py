"""The models in plain numpy, as a page of a textbook has them: the peer that uses no framework."""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from bench.rows import Floats, Integers
from bench.workload import Layer, Model

Backward = Callable[[Floats], Floats]


class Network:
    """Weights, gradients and momenta of a model; ``flat`` makes each kind views into one vector."""

    def __init__(self, model: Model, seed: int, *, flat: bool) -> None:
        self.model = model
        shapes = model.parameter_shapes()
        self.weights, self.gradients, self.momenta = (_arrays(shapes, flat) for _ in range(3))
        rng = np.random.default_rng([seed, 0])
        for W, b in zip(self.weights[0::2], self.weights[1::2], strict=True):
            bound = 1 / np.sqrt(W.shape[0])
            W[...] = rng.uniform(-bound, bound, W.shape)
            b[...] = rng.uniform(-bound, bound, b.shape)
        # What a reduction and an update go over: one vector, or tensor by tensor.
        kinds = self.weights, self.gradients, self.momenta
        self.whole = list(zip(*map(_owners, kinds), strict=True))

    def differentiate(self, x: Floats, y: Integers) -> float:
        """The mean cross-entropy of some rows; leaves its gradients in ``gradients``."""
        backwards: list[Backward] = []
        i = 0
        for layer in self.model.layers:
            if layer["type"] in ("linear", "conv2d"):
                x, backward = _LINEAR[layer["type"]](layer, x, *self.weights[i : i + 2], *self.gradients[i : i + 2])
                i += 2
            else:
                x, backward = _PLAIN[layer["type"]](layer, x)
            backwards.append(backward)
        loss, dx = _cross_entropy(x, y)
        for backward in reversed(backwards):
            dx = backward(dx)
        return loss

    def update(self, scale: float, lr: float, momentum: float) -> None:
        """SGD with momentum on ``gradients * scale``."""
        for w, g, m in self.whole:
            m *= momentum
            g *= scale
            m += g
            np.multiply(m, lr, out=g)
            w -= g


def _arrays(shapes: list[tuple[int, ...]], flat: bool) -> list[Floats]:
    if not flat:
        return [np.zeros(shape, np.float32) for shape in shapes]
    sizes = [int(np.prod(shape)) for shape in shapes]
    parts = np.split(np.zeros(sum(sizes), np.float32), np.cumsum(sizes)[:-1])
    return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]


def _owners(arrays: list[Floats]) -> list[Floats]:
    base = arrays[0].base
    return arrays if base is None else [np.asarray(base)]


def _linear(layer: Layer, x: Floats, W: Floats, b: Floats, dW: Floats, db: Floats) -> tuple[Floats, Backward]:
    y = x @ W
    y += b

    def backward(dy: Floats) -> Floats:
        np.matmul(x.T, dy, out=dW)
        np.sum(dy, axis=0, out=db)
        return dy @ W.T

    return y, backward


def _conv(layer: Layer, x: Floats, W: Floats, b: Floats, dW: Floats, db: Floats) -> tuple[Floats, Backward]:
    k, (n, h, w, c) = layer["kernel"], x.shape
    edge = k // 2
    padded = np.pad(x, ((0, 0), (edge, edge), (edge, edge), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (k, k), axis=(1, 2))
    columns = windows.transpose(0, 1, 2, 4, 5, 3).reshape(n * h * w, k * k * c)
    y = columns @ W
    y += b

    def backward(dy: Floats) -> Floats:
        flat = dy.reshape(n * h * w, -1)
        np.matmul(columns.T, flat, out=dW)
        np.sum(flat, axis=0, out=db)
        taps = (flat @ W.T).reshape(n, h, w, k, k, c)
        dx = np.zeros_like(padded)
        for i in range(k):
            for j in range(k):
                dx[:, i : i + h, j : j + w] += taps[:, :, :, i, j]
        return dx[:, edge : edge + h, edge : edge + w]

    return y.reshape(n, h, w, -1), backward


def _relu(layer: Layer, x: Floats) -> tuple[Floats, Backward]:
    np.maximum(x, 0, out=x)

    def backward(dy: Floats) -> Floats:
        dy *= x > 0
        return dy

    return x, backward


def _max_pool(layer: Layer, x: Floats) -> tuple[Floats, Backward]:
    k, (n, h, w, c) = layer["kernel"], x.shape
    cells = x.reshape(n, h // k, k, w // k, k, c)
    y = cells.max(axis=(2, 4))

    def backward(dy: Floats) -> Floats:
        # Ties are zeros of the relu before, whose gradient is zero.
        won = cells == y[:, :, None, :, None]
        dx: Floats = np.multiply(won, dy[:, :, None, :, None], dtype=np.float32)
        return dx.reshape(x.shape)

    return y, backward


def _flatten(layer: Layer, x: Floats) -> tuple[Floats, Backward]:
    return x.reshape(len(x), -1), lambda dy: dy.reshape(x.shape)


_LINEAR = {"linear": _linear, "conv2d": _conv}
_PLAIN = {"relu": _relu, "max_pool2d": _max_pool, "flatten": _flatten}


def _cross_entropy(z: Floats, y: Integers) -> tuple[float, Floats]:
    z -= z.max(axis=1, keepdims=True)
    p: npt.NDArray[np.float32] = np.exp(z)
    sums = p.sum(axis=1, keepdims=True)
    rows = np.arange(len(y))
    loss = float(np.mean(np.log(sums[:, 0]) - z[rows, y]))
    p /= sums
    p[rows, y] -= 1
    p /= len(y)
    return loss, p
