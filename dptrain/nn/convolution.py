"""2-D convolution over images with the channels last."""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import as_strided

from dptrain.job import spec
from dptrain.nn.bound import BoundLayer, Misfit, blocks, draw
from dptrain.nn.layer import Array, LayerBackward, Pass

FEW_CHANNELS = 4
"""Up to so many channels the window matrix is filled column by column, else row by row: whichever copies long runs."""


class Conv2d(BoundLayer):
    """Cross-correlation with a (kernel, kernel, input channels, channels) weight, as products of window matrices.

    A few images at a time become a matrix of windows (im2col) that stays in the cache, and is made again in the
    backward rather than kept: that costs a few per cent and saves kernel * kernel times the input's memory. How many
    images go together depends on the shapes of one shard only, so the products, and their bits, never depend on how
    many shards are computed together.
    """

    def __init__(self, settings: spec.Conv2d, name: str, shape: tuple[int, ...], dtype: npt.DTypeLike) -> None:
        if len(shape) != 3:
            raise Misfit("an image (height, width, channels)", "give the data that shape, as in data.shape")
        self.kernel, self.stride = settings.kernel, settings.stride
        height, width, self.inputs = shape
        self.top, bottom = self._padding(settings.padding, height)
        self.left, right = self._padding(settings.padding, width)
        self.padded = (height + self.top + bottom, width + self.left + right)
        if min(self.padded) < self.kernel:
            raise Misfit(
                f"an image of at least {self.kernel} x {self.kernel} with its padding",
                "use a smaller kernel, more padding or fewer poolings before it",
            )
        oh, ow = ((side - self.kernel) // self.stride + 1 for side in self.padded)
        self.channels = settings.channels
        super().__init__(name, shape, (oh, ow, self.channels), dtype)
        self.bias, self.init = settings.bias, settings.init
        self.windows = oh * ow
        self.fan_in = self.kernel**2 * self.inputs
        self.parameters = [("W", (self.kernel, self.kernel, self.inputs, self.channels))]
        if self.bias:
            self.parameters.append(("b", (self.channels,)))
        self.image_bytes = self.windows * (self.fan_in + self.channels) * self.dtype.itemsize

    def _padding(self, padding: int | str, side: int) -> tuple[int, int]:
        if isinstance(padding, int):
            return padding, padding
        out = -(-side // self.stride)
        total = max(0, (out - 1) * self.stride + self.kernel - side)
        return total // 2, total - total // 2

    def initialise(self, tensors: Mapping[str, Array], rng: np.random.Generator) -> None:
        """W as ``init`` says, b zero."""
        shape = self.parameters[0][1]
        tensors["W"][...] = draw(shape, self.init, self.fan_in, self.kernel**2 * self.channels, rng)
        if self.bias:
            tensors["b"][...] = 0

    def forward(self, tensors: Mapping[str, Array], x: Array, run: Pass) -> tuple[Array, LayerBackward]:
        """(k, b, height, width, channels) -> (k, b, output height, output width, channels)."""
        k, b = x.shape[:2]
        W = tensors["W"].reshape(self.fan_in, self.channels)
        padded = self._pad(x, run)
        y = self.output(run, x)
        _, ow, _ = self.output_shape
        wide = (b, -1, ow * self.channels)
        if self.bias:
            row = self.scratch(run, "bias", (ow, self.channels))
            row[...] = tensors["b"]
        for j in range(k):
            for images in blocks(b, self.image_bytes, 1):
                rows = slice(images.start * self.windows, images.stop * self.windows)
                np.matmul(self._window_matrix(padded[j, images], run), W, out=y[j].reshape(-1, self.channels)[rows])
                if self.bias:
                    part = y[j].reshape(wide)[images]
                    np.add(part, row.reshape(-1), out=part)

        def backward(dy: Array, grads: Mapping[str, Array], need_dx: bool) -> Array | None:
            dx = self.input_gradient(run, dy) if need_dx else None
            for j in range(k):
                self._weight_gradients(padded[j], dy[j], {name: grad[j] for name, grad in grads.items()}, run)
                if dx is not None:
                    self._image_gradients(dy[j], W, dx[j], run)
            return dx

        return y, backward

    def _pad(self, x: Array, run: Pass) -> Array:
        height, width, _ = self.input_shape
        if self.padded == (height, width):
            return x
        padded = self.kept(run, "padded", (*x.shape[:2], *self.padded, self.inputs))
        top, left = self.top, self.left
        for border in (np.s_[:top], np.s_[top + height :]):
            padded[:, :, border] = 0
        for border in (np.s_[:left], np.s_[left + width :]):
            padded[:, :, :, border] = 0
        padded[:, :, top : top + height, left : left + width] = x
        return padded

    def _window_matrix(self, x: Array, run: Pass) -> Array:
        """(images * windows, fan_in): every window of some padded images as a row."""
        n, (oh, ow, _), c = len(x), self.output_shape, self.inputs
        if self.kernel == 1 and self.stride == 1:
            return x.reshape(-1, c)
        if c <= FEW_CHANNELS:
            columns = self.scratch(run, "windows", (self.kernel, self.kernel, c, n, oh, ow))
            for i in range(self.kernel):
                for j in range(self.kernel):
                    columns[i, j] = self._shifted(x, i, j).transpose(3, 0, 1, 2)
            return columns.reshape(self.fan_in, -1).T
        image, row, pixel, item = x.strides
        steps = (image, self.stride * row, self.stride * pixel, row, item)
        run_length = self.kernel * c
        rows = self.scratch(run, "windows", (n, oh, ow, self.kernel, run_length))
        np.copyto(rows, as_strided(x, rows.shape, steps, writeable=False))
        return rows.reshape(-1, self.fan_in)

    def _shifted(self, x: Array, i: int, j: int) -> Array:
        """The pixels that meet the kernel's element (i, j), one for every window: (images, oh, ow, channels)."""
        oh, ow, _ = self.output_shape
        return x[:, i : i + self.stride * oh : self.stride, j : j + self.stride * ow : self.stride]

    def _weight_gradients(self, x: Array, dy: Array, grads: Mapping[str, Array], run: Pass) -> None:
        dW = grads["W"].reshape(self.fan_in, self.channels)
        part = self.scratch(run, "dW", dW.shape)
        part_b = self.scratch(run, "db", (1, self.channels))
        for images in blocks(len(x), self.image_bytes, 1):
            dy_flat = dy[images].reshape(-1, self.channels)
            windows = self._window_matrix(x[images], run)
            first = images.start == 0
            np.matmul(windows.T, dy_flat, out=dW if first else part)
            if not first:
                np.add(dW, part, out=dW)
            if self.bias:
                np.matmul(self.ones(run, len(dy_flat)), dy_flat, out=part_b)
                np.add(0 if first else grads["b"], part_b[0], out=grads["b"])

    def _image_gradients(self, dy: Array, W: Array, dx: Array, run: Pass) -> None:
        """One product for every element of the kernel, added where its pixels lie: long runs, and no big matrix."""
        height, width, c = self.input_shape
        oh, ow, _ = self.output_shape
        cropped = self.padded != (height, width)
        taps = W.reshape(self.kernel, self.kernel, c, self.channels)
        for images in blocks(len(dx), self.image_bytes, 1):
            n = images.stop - images.start
            dy_flat = dy[images].reshape(-1, self.channels)
            whole = self.scratch(run, "dx", (n, *self.padded, c)) if cropped else dx[images]
            whole.fill(0)
            part = self.scratch(run, "tap", (n, oh, ow, c))
            for i in range(self.kernel):
                for j in range(self.kernel):
                    np.matmul(dy_flat, taps[i, j].T, out=part.reshape(-1, c))
                    target = self._shifted(whole, i, j)
                    np.add(target, part, out=target)
            if cropped:
                dx[images] = whole[:, self.top : self.top + height, self.left : self.left + width]
