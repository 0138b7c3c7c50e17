"""Functions of one element: y = f(x), dx = dy f'(x)."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from dptrain.job import spec
from dptrain.nn.bound import CACHED, BoundLayer, blocks, long_row
from dptrain.nn.layer import Array, LayerBackward, Pass


class _Activation(BoundLayer):
    """Its backward needs y alone, so y may lie where x was, and dx where dy was.

    Subclasses give ``_value`` (writes y, which may be x) and ``_slope`` (f' from y). Both get two scratch arrays, one
    of numbers and one of booleans: a comparison is cast in place of being multiplied with, which numpy would do in
    buffers made for the occasion.
    """

    keeps_output = True
    can_overwrite = True

    def __init__(self, settings: Any, name: str, shape: tuple[int, ...], dtype: npt.DTypeLike) -> None:
        super().__init__(name, shape, shape, dtype)

    def _value(self, x: Array, y: Array, t: Array) -> None:
        raise NotImplementedError

    def _slope(self, y: Array, t: Array, mask: Array) -> None:
        raise NotImplementedError

    def forward(self, tensors: Mapping[str, Array], x: Array, run: Pass) -> tuple[Array, LayerBackward]:
        """Any shape -> the same shape."""
        y = self.output(run, x)
        self._values(x, y, run)

        def backward(dy: Array, grads: Mapping[str, Array], need_dx: bool) -> Array | None:
            dx = self.input_gradient(run, dy)
            flat_y, flat_dy, flat_dx = y.reshape(-1), dy.reshape(-1), dx.reshape(-1)
            for part in blocks(flat_y.size, self.dtype.itemsize):
                length = (part.stop - part.start,)
                t = self.scratch(run, "slope", length)
                self._slope(flat_y[part], t, self.scratch(run, "mask", length, np.bool_))
                np.multiply(flat_dy[part], t, out=flat_dx[part])
            return dx

        return y, backward

    def _values(self, x: Array, y: Array, run: Pass) -> None:
        flat_x, flat_y = x.reshape(-1), y.reshape(-1)
        for part in blocks(flat_x.size, self.dtype.itemsize):
            t = self.scratch(run, "slope", (part.stop - part.start,))
            self._value(flat_x[part], flat_y[part], t)


class Relu(_Activation):
    """max(x, 0); the slope at 0 is 0."""

    def _values(self, x: Array, y: Array, run: Pass) -> None:
        # Against a row of zeros numpy compares several elements at once, against one zero it does not.
        row = long_row(self.output_shape)
        np.maximum(x.reshape(-1, row), run.workspace.constant(0, (row,), self.dtype), out=y.reshape(-1, row))

    def _slope(self, y: Array, t: Array, mask: Array) -> None:
        np.greater(y, 0, out=mask)
        np.copyto(t, mask)


class LeakyRelu(_Activation):
    """max(x, slope * x); the slope at 0 is ``slope``."""

    def __init__(self, settings: spec.LeakyRelu, name: str, shape: tuple[int, ...], dtype: npt.DTypeLike) -> None:
        super().__init__(settings, name, shape, dtype)
        self.negative = settings.slope

    def _value(self, x: Array, y: Array, t: Array) -> None:
        np.multiply(x, self.negative, out=t)
        np.maximum(x, t, out=y)

    def _slope(self, y: Array, t: Array, mask: Array) -> None:
        np.greater(y, 0, out=mask)
        np.copyto(t, mask)
        np.maximum(t, self.negative, out=t)


class Tanh(_Activation):
    """tanh x."""

    def _value(self, x: Array, y: Array, t: Array) -> None:
        np.tanh(x, out=y)

    def _slope(self, y: Array, t: Array, mask: Array) -> None:
        np.multiply(y, y, out=t)
        np.subtract(1, t, out=t)


class Sigmoid(_Activation):
    """1 / (1 + exp(-x)); below -80 (float32) or -700 (float64) it stays at its value there, which is nearly 0."""

    def __init__(self, settings: spec.Sigmoid, name: str, shape: tuple[int, ...], dtype: npt.DTypeLike) -> None:
        super().__init__(settings, name, shape, dtype)
        self.limit = 80.0 if self.dtype.itemsize == 4 else 700.0

    def _value(self, x: Array, y: Array, t: Array) -> None:
        np.negative(x, out=y)
        np.minimum(y, self.limit, out=y)
        np.exp(y, out=y)
        np.add(y, 1, out=y)
        np.reciprocal(y, out=y)

    def _slope(self, y: Array, t: Array, mask: Array) -> None:
        np.subtract(1, y, out=t)
        np.multiply(t, y, out=t)


class Gelu(BoundLayer):
    """0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))) (Hendrycks and Gimpel, 2016).

    The forward of a training pass writes the slope beside y, while x and the tanh are at hand: y may then lie where
    x was, and the backward is one product.
    """

    can_overwrite = True
    INNER = float(np.sqrt(2 / np.pi))
    CUBIC = 0.044715

    def __init__(self, settings: spec.Gelu, name: str, shape: tuple[int, ...], dtype: npt.DTypeLike) -> None:
        super().__init__(name, shape, shape, dtype)

    def forward(self, tensors: Mapping[str, Array], x: Array, run: Pass) -> tuple[Array, LayerBackward]:
        """Any shape -> the same shape."""
        y = self.output(run, x)
        slope = self.kept(run, "slope", x.shape) if run.training else None
        flat_x, flat_y = x.reshape(-1), y.reshape(-1)
        for part in blocks(x.size, self.dtype.itemsize, CACHED // 5):
            shape = (part.stop - part.start,)
            t, u = self.scratch(run, "t", shape), self.scratch(run, "u", shape)
            self._value(flat_x[part], flat_y[part], None if slope is None else slope.reshape(-1)[part], t, u)

        def backward(dy: Array, grads: Mapping[str, Array], need_dx: bool) -> Array | None:
            assert slope is not None, "the backward of an evaluation"
            dx = self.input_gradient(run, dy)
            np.multiply(dy, slope, out=dx)
            return dx

        return y, backward

    def _value(self, x: Array, y: Array, slope: Array | None, t: Array, u: Array) -> None:
        np.multiply(x, x, out=u)
        np.multiply(u, self.CUBIC, out=t)
        np.add(t, 1, out=t)
        np.multiply(t, x, out=t)
        np.multiply(t, self.INNER, out=t)
        np.tanh(t, out=t)
        if slope is not None:
            # slope = (1 + t) / 2 + x / 2 (1 - t^2) INNER (1 + 3 CUBIC x^2), with u = x^2
            np.multiply(u, 3 * self.CUBIC * self.INNER / 2, out=u)
            np.add(u, self.INNER / 2, out=u)
            np.multiply(u, x, out=u)
            np.multiply(t, t, out=slope)
            np.subtract(1, slope, out=slope)
            np.multiply(slope, u, out=slope)
        np.add(t, 1, out=t)
        np.multiply(t, 0.5, out=t)
        if slope is not None:
            np.add(slope, t, out=slope)
        np.multiply(x, t, out=y)
