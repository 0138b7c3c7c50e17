"""What all layers of a chain have in common: their shapes, their memory, and what may be overwritten."""

import math
from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from dptrain.nn.layer import Array, LayerBackward, Pass
from dptrain.nn.products import Matmul, numpy_matmul

CACHED = 1 << 20
"""Bytes that several passes over the same elements may touch and still find them in a core's L2 cache."""


class Misfit(Exception):
    """A layer can't take this input shape. The chain, which knows the neighbours, turns it into a ModelError."""

    def __init__(self, expected: str, cure: str) -> None:
        super().__init__(expected)
        self.expected = expected
        self.cure = cure


class BoundLayer(ABC):
    """A layer bound to the shape of its input; subclasses give ``forward``.

    Who may write where is decided once, by the chain: a layer overwrites its input only where nobody needs it any
    more, and a gradient only where it lies in the chain's own memory. ``keeps_output`` says that a layer's backward
    reads its y, so that the next one must leave it alone.
    """

    name: str
    parameters: Sequence[tuple[str, tuple[int, ...]]] = ()
    buffers: Sequence[tuple[str, tuple[int, ...], float]] = ()
    keeps_output = False
    can_overwrite = False
    """Its forward can write to its input's memory, its backward to its output gradient's."""
    hands_through = False
    """y is x, or a view of it, always or when not training."""
    hands_back = False
    """dx is dy, or a view of it."""

    def __init__(
        self, name: str, input_shape: tuple[int, ...], output_shape: tuple[int, ...], dtype: npt.DTypeLike
    ) -> None:
        self.name = name
        self.input_shape = input_shape
        self.output_shape = output_shape
        self.dtype = np.dtype(dtype)
        self.matmul: Matmul = numpy_matmul
        self.overwrites_input = False
        self.overwrites_gradient = False
        self.dx_key: Hashable = (id(self), "dx")

    def initialise(self, tensors: Mapping[str, Array], rng: np.random.Generator) -> None:
        """As ``dptrain.nn.layer.Layer`` says; a layer without tensors has nothing to fill."""
        assert not tensors, f"{self.name} does not say how its tensors start"

    @abstractmethod
    def forward(self, tensors: Mapping[str, Array], x: Array, run: Pass) -> tuple[Array, LayerBackward]:
        """As ``dptrain.nn.layer.Layer`` says."""

    def kept(self, run: Pass, what: str, shape: tuple[int, ...], dtype: npt.DTypeLike | None = None) -> Array:
        """Memory of this layer that lasts from its forward to its backward."""
        return run.workspace.array((id(self), what), shape, self.dtype if dtype is None else dtype)

    def scratch(self, run: Pass, what: str, shape: tuple[int, ...], dtype: npt.DTypeLike | None = None) -> Array:
        """Memory shared by all layers, good until the layer returns."""
        return run.workspace.array(("scratch", what), shape, self.dtype if dtype is None else dtype)

    def ones(self, run: Pass, length: int) -> Array:
        """(1, length) ones: a column sum is a product with them, several times faster than a reduction."""
        return run.workspace.constant(1, (1, length), self.dtype)

    def output(self, run: Pass, x: Array) -> Array:
        """Where y goes."""
        if self.overwrites_input:
            return x
        return self.kept(run, "y", (*x.shape[:2], *self.output_shape))

    def input_gradient(self, run: Pass, dy: Array) -> Array:
        """Where dx goes."""
        if self.overwrites_gradient:
            return dy
        return run.workspace.array(self.dx_key, (*dy.shape[:2], *self.input_shape), self.dtype)


@lru_cache(maxsize=1024)
def blocks(size: int, itemsize: int, limit: int = CACHED // 4) -> tuple[slice, ...]:
    """Slices that cover range(size), of at most ``limit`` bytes where an item, an element or an image, has so many.

    The usual limit lets four arrays stay in the cache together.
    """
    step = max(1, limit // itemsize)
    return tuple(slice(at, min(at + step, size)) for at in range(0, size, step))


@lru_cache(maxsize=1024)
def long_row(shape: tuple[int, ...]) -> int:
    """How many elements of a sample make a run worth an operation of its own: the last axes, 256 elements or all."""
    row = 1
    for length in reversed(shape):
        row *= length
        if row >= 256:
            break
    return row


def draw(shape: tuple[int, ...], kind: str, fan_in: int, fan_out: int, rng: np.random.Generator) -> npt.NDArray[Any]:
    """Initial weights in float64, so that float32 and float64 jobs start at the same point.

    ``he``: normal of variance 2 / fan_in (He et al., 2015). ``glorot``: uniform in +-sqrt(6 / (fan_in + fan_out))
    (Glorot and Bengio, 2010). ``uniform``: uniform in +-1 / sqrt(fan_in).
    """
    if kind == "he":
        drawn = rng.standard_normal(shape)
        return np.multiply(drawn, math.sqrt(2.0 / fan_in), out=drawn)
    bound = math.sqrt(6.0 / (fan_in + fan_out)) if kind == "glorot" else 1.0 / math.sqrt(fan_in)
    return rng.uniform(-bound, bound, shape)
