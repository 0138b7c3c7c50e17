"""y = x W + b, and the layer that makes a sample flat for it."""

import math
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from dptrain.job import spec
from dptrain.nn.bound import BoundLayer, Misfit, draw
from dptrain.nn.layer import Array, LayerBackward, Pass


class Linear(BoundLayer):
    """y = x W + b over the last axis of a flat sample or of a sequence; W is (inputs, units).

    One product per shard: (rows, inputs) by (inputs, units).
    """

    def __init__(self, settings: spec.Linear, name: str, shape: tuple[int, ...], dtype: npt.DTypeLike) -> None:
        if len(shape) not in (1, 2):
            raise Misfit("a flat input", "put a flatten before it")
        super().__init__(name, shape, (*shape[:-1], settings.units), dtype)
        self.inputs, self.units = shape[-1], settings.units
        self.bias, self.init = settings.bias, settings.init
        self.parameters = [("W", (self.inputs, self.units))]
        if self.bias:
            self.parameters.append(("b", (self.units,)))

    def initialise(self, tensors: Mapping[str, Array], rng: np.random.Generator) -> None:
        """W as ``init`` says, b zero."""
        tensors["W"][...] = draw((self.inputs, self.units), self.init, self.inputs, self.units, rng)
        if self.bias:
            tensors["b"][...] = 0

    def forward(self, tensors: Mapping[str, Array], x: Array, run: Pass) -> tuple[Array, LayerBackward]:
        """(k, b, ..., inputs) -> (k, b, ..., units)."""
        W = tensors["W"]
        y = self.output(run, x)
        flat, flat_y = self._flat(x), self._flat(y)
        self.matmul(flat, W, out=flat_y)
        if self.bias:
            np.add(flat_y, tensors["b"], out=flat_y)

        def backward(dy: Array, grads: Mapping[str, Array], need_dx: bool) -> Array | None:
            flat_dy = self._flat(dy)
            self.matmul(flat.swapaxes(1, 2), flat_dy, out=grads["W"])
            if self.bias:
                self.matmul(self.ones(run, flat_dy.shape[1]), flat_dy, out=grads["b"][:, None, :])
            if not need_dx:
                return None
            dx = self.input_gradient(run, dy)
            self.matmul(flat_dy, W.T, out=self._flat(dx))
            return dx

        return y, backward

    def _flat(self, array: Array) -> Array:
        """(k, rows, elements): the positions of a sequence are rows of the product."""
        return array if array.ndim == 3 else array.reshape(len(array), -1, array.shape[-1])


class Flatten(BoundLayer):
    """All axes of a sample become one, in row-major order; nothing is copied."""

    hands_through = True
    hands_back = True

    def __init__(self, settings: spec.Flatten, name: str, shape: tuple[int, ...], dtype: npt.DTypeLike) -> None:
        super().__init__(name, shape, (math.prod(shape),), dtype)

    def forward(self, tensors: Mapping[str, Array], x: Array, run: Pass) -> tuple[Array, LayerBackward]:
        """(k, b, ...) -> (k, b, elements)."""

        def backward(dy: Array, grads: Mapping[str, Array], need_dx: bool) -> Array | None:
            return dy.reshape(*dy.shape[:2], *self.input_shape)

        return x.reshape(*x.shape[:2], *self.output_shape), backward
