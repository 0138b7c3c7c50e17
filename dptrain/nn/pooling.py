"""Maximum and mean over the windows of an image."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from dptrain.job import spec
from dptrain.nn.bound import CACHED, BoundLayer, Misfit, blocks
from dptrain.nn.layer import Array, LayerBackward, Pass


class _Pool(BoundLayer):
    """Windows of ``kernel`` x ``kernel`` pixels every ``stride``; what doesn't fill a window is left out.

    The work goes window element by window element over some images at a time, all channels at once.
    """

    def __init__(
        self,
        settings: spec.MaxPool2d | spec.AvgPool2d,
        name: str,
        shape: tuple[int, ...],
        dtype: npt.DTypeLike,
    ) -> None:
        if len(shape) != 3:
            raise Misfit("an image (height, width, channels)", "give the data that shape, as in data.shape")
        self.kernel = settings.kernel
        self.stride = settings.stride or settings.kernel
        self.elements = self.kernel**2
        if min(shape[:2]) < self.kernel:
            raise Misfit(
                f"an image of at least {self.kernel} x {self.kernel}",
                "use a smaller kernel or fewer poolings",
            )
        oh, ow = ((side - self.kernel) // self.stride + 1 for side in shape[:2])
        super().__init__(name, shape, (oh, ow, shape[2]), dtype)
        self.overlaps = self.stride < self.kernel
        self.covers = self.stride == self.kernel and all(side % self.kernel == 0 for side in shape[:2])

    def images(self, x: Array) -> Array:
        """All images of all shards behind one another; elementwise work needs no shard of its own."""
        return x.reshape(-1, *x.shape[2:])

    def parts(self, total: int) -> tuple[slice, ...]:
        """Which images go together."""
        return blocks(total, math.prod(self.input_shape) * self.dtype.itemsize, CACHED // 2)

    def element(self, x: Array, t: int) -> Array:
        """The t-th pixel (in row-major order) of every window of some images: (images, oh, ow, channels)."""
        i, j = divmod(t, self.kernel)
        oh, ow, _ = self.output_shape
        return x[:, i : i + self.stride * oh : self.stride, j : j + self.stride * ow : self.stride]

    def all_elements(self, x: Array) -> list[Array]:
        """Every pixel of the windows of some images."""
        return [self.element(x, t) for t in range(self.elements)]


def maxima(elements: Sequence[Array] | Array, y: Array) -> None:
    """The maximum of some arrays, element by element."""
    np.copyto(y, elements[0])
    for candidate in elements[1:]:
        np.maximum(y, candidate, out=y)


def winners(elements: Sequence[Array] | Array, y: Array, winner: Array, mask: Array, number: Array) -> None:
    """The maximum of some arrays, and the number of the first that has it. ``mask`` and ``number`` are scratch."""
    if len(elements) == 1:
        np.copyto(y, elements[0])
        winner.fill(0)
        return
    np.greater(elements[1], elements[0], out=mask)
    np.copyto(winner, mask)
    np.maximum(elements[0], elements[1], out=y)
    # A comparison's bytes are 0 and 1, numbers that need no cast.
    flags = mask.view(np.uint8) if winner.itemsize == 1 else mask
    for t in range(2, len(elements)):
        np.greater(elements[t], y, out=mask)
        np.maximum(y, elements[t], out=y)
        # Numbers only grow, so the maximum of the numbers is the last strict improvement: the first maximum.
        np.multiply(flags, winner.dtype.type(t), out=number)
        np.maximum(winner, number, out=winner)


class MaxPool2d(_Pool):
    """The maximum of each window; the first one in row-major order gets the gradient.

    The forward keeps which element won, one byte per output, rather than its input.
    """

    def forward(self, tensors: Mapping[str, Array], x: Array, run: Pass) -> tuple[Array, LayerBackward]:
        """(k, b, height, width, channels) -> (k, b, output height, output width, channels)."""
        y = self.output(run, x)
        index = np.uint8 if self.elements <= 256 else np.uint32
        winner = self.kept(run, "winner", y.shape, index)
        x_all, y_all, winner_all = self.images(x), self.images(y), self.images(winner)
        for part in self.parts(len(x_all)):
            elements, some = self.all_elements(x_all[part]), y_all[part]
            if run.training:
                mask = self.scratch(run, "mask", some.shape, np.bool_)
                winners(elements, some, winner_all[part], mask, self.scratch(run, "number", some.shape, index))
            else:
                maxima(elements, some)

        def backward(dy: Array, grads: Mapping[str, Array], need_dx: bool) -> Array | None:
            dx = self.input_gradient(run, dy)
            dx_all, dy_all = self.images(dx), self.images(dy)
            for part in self.parts(len(dx_all)):
                self._scatter(dy_all[part], winner_all[part], dx_all[part], run)
            return dx

        return y, backward

    def _scatter(self, dy: Array, winner: Array, dx: Array, run: Pass) -> None:
        if not self.covers:
            dx.fill(0)
        won = self.scratch(run, "mask", dy.shape, np.bool_)
        part = self.scratch(run, "part", dy.shape) if self.overlaps else None
        for t in range(self.elements):
            target = self.element(dx, t)
            np.equal(winner, winner.dtype.type(t), out=won)
            if part is None:
                np.multiply(dy, won, out=target)
            else:
                np.multiply(dy, won, out=part)
                np.add(target, part, out=target)


class AvgPool2d(_Pool):
    """The mean of each window."""

    def forward(self, tensors: Mapping[str, Array], x: Array, run: Pass) -> tuple[Array, LayerBackward]:
        """(k, b, height, width, channels) -> (k, b, output height, output width, channels)."""
        y = self.output(run, x)
        share = 1.0 / self.elements
        x_all, y_all = self.images(x), self.images(y)
        for part in self.parts(len(x_all)):
            mean = y_all[part]
            np.copyto(mean, self.element(x_all[part], 0))
            for t in range(1, self.elements):
                np.add(mean, self.element(x_all[part], t), out=mean)
            np.multiply(mean, share, out=mean)

        def backward(dy: Array, grads: Mapping[str, Array], need_dx: bool) -> Array | None:
            dx = self.input_gradient(run, dy)
            dx_all, dy_all = self.images(dx), self.images(dy)
            for part in self.parts(len(dx_all)):
                self._spread(dy_all[part], share, dx_all[part], run)
            return dx

        return y, backward

    def _spread(self, dy: Array, share: float, dx: Array, run: Pass) -> None:
        if not self.covers:
            dx.fill(0)
        part = self.scratch(run, "part", dy.shape)
        np.multiply(dy, share, out=part)
        for t in range(self.elements):
            target = self.element(dx, t)
            if self.overlaps:
                np.add(target, part, out=target)
            else:
                np.copyto(target, part)
