"""2-D convolution over images with the channels last, and the max pooling and relu that follow it."""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from dptrain.job import spec
from dptrain.nn.activation import Relu
from dptrain.nn.bound import BoundLayer, Misfit, blocks, draw
from dptrain.nn.layer import Array, LayerBackward, Pass
from dptrain.nn.pooling import MaxPool2d, maxima, winners
from dptrain.nn.windows import window_columns, window_rows

FEW_CHANNELS = 4
"""Up to so many channels the window matrix is filled column by column, else row by row: whichever copies long runs."""

TOGETHER = 2 << 20
"""Bytes of windows and their product that some images may have: few calls, and still near the core.

The products are cut by it, so it is part of the bits.
"""

WIDER = 3
"""How many times the multiplications a window that serves a whole pool may cost."""

NONE = 255
"""The number of the winner where a relu lets nothing through."""


class Conv2d(BoundLayer):
    """Cross-correlation with a (kernel, kernel, input channels, channels) weight, as products of window matrices.

    A few images at a time become a matrix of windows (im2col) that stays in a cache, and is made again in the
    backward rather than kept: that costs a few per cent and saves kernel * kernel times the input's memory. How many
    images go together depends on the shapes of one shard only, so the products, and their bits, never depend on how
    many shards are computed together.

    A max pooling and a relu that follow can be taken in: they are done while the product is in the cache, and what
    the pooling drops is never written to memory. The product is then ordered by the outputs' places in their pools,
    (place, image, pool, channel), so that a maximum over places is one over long runs. The bias comes after it, which
    changes nothing, as rounding is monotonic.
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
        self.sides = tuple((side - self.kernel) // self.stride + 1 for side in self.padded)
        self.channels = settings.channels
        super().__init__(name, shape, (*self.sides, self.channels), dtype)
        self.bias, self.init = settings.bias, settings.init
        self.parameters = [("W", (self.kernel, self.kernel, self.inputs, self.channels))]
        if self.bias:
            self.parameters.append(("b", (self.channels,)))
        # Where windows leave out no pixel, the input's gradient is a convolution with the weights turned round.
        self.turns = self.stride == 1 and max(self.top, bottom, self.left, right) < self.kernel
        self.shared = self.inputs <= FEW_CHANNELS
        self._plan(1, relu=False)

    def _padding(self, padding: int | str, side: int) -> tuple[int, int]:
        if isinstance(padding, int):
            return padding, padding
        out = -(-side // self.stride)
        total = max(0, (out - 1) * self.stride + self.kernel - side)
        return total // 2, total - total // 2

    def take_in(self, layer: BoundLayer) -> bool:
        """Do the work of the next layer, too, where it is a relu, or a pooling without overlaps and gaps."""
        if self.relu:
            return False
        if isinstance(layer, Relu):
            self._plan(self.pool, relu=True)
            return True
        if not isinstance(layer, MaxPool2d) or self.pool > 1 or layer.stride != layer.kernel:
            return False
        widened = self.kernel + self.stride * (layer.kernel - 1)
        if not 1 < layer.elements <= NONE or (self.shared and widened**2 > WIDER * self.kernel**2):
            return False
        self._plan(layer.kernel, relu=False)
        return True

    def _plan(self, pool: int, *, relu: bool) -> None:
        self.pool, self.relu = pool, relu
        self.keeps_output = relu and pool == 1
        rows, columns = (side // pool for side in self.sides)
        self.output_shape = (rows, columns, self.channels)
        self.places = pool**2
        # Of few channels one window serves a whole pool: it is so much larger, and the weights stand in it shifted.
        self.shifts = self.shared and pool > 1
        self.extent = self.kernel + (self.stride * (pool - 1) if self.shared else 0)
        window = self.extent**2 * self.inputs * (1 if self.shared else self.places)
        self.image_bytes = rows * columns * (window + self.places * self.channels) * self.dtype.itemsize

    def initialise(self, tensors: Mapping[str, Array], rng: np.random.Generator) -> None:
        """W as ``init`` says, b zero."""
        shape, fan = self.parameters[0][1], self.kernel**2
        tensors["W"][...] = draw(shape, self.init, fan * self.inputs, fan * self.channels, rng)
        if self.bias:
            tensors["b"][...] = 0

    def forward(self, tensors: Mapping[str, Array], x: Array, run: Pass) -> tuple[Array, LayerBackward]:
        """(k, b, height, width, channels) -> (k, b, output height, output width, channels)."""
        W = tensors["W"]
        shifted = self._shifted(W, run)
        bias = self._bias_row(tensors["b"], run) if self.bias else None
        y = self.output(run, x)
        winner = self.kept(run, "winner", y.shape, np.uint8) if run.training and self.pool > 1 else None
        parts = blocks(x.shape[1], self.image_bytes, TOGETHER)
        for j in range(len(x)):
            for part in parts:
                won = None if winner is None else winner[j, part]
                self._outputs(self._windows(x[j, part], run), shifted, bias, y[j, part], won, run)

        def backward(dy: Array, grads: Mapping[str, Array], need_dx: bool) -> Array | None:
            dx = self.input_gradient(run, dy) if need_dx else None
            turned = self._turned(W, run) if need_dx and self.turns else None
            for j in range(len(x)):
                own = {name: grad[j] for name, grad in grads.items()}
                dW = self.scratch(run, "dW", shifted.shape) if self.shifts else own["W"].reshape(shifted.shape)
                for part in parts:
                    kept = y[j, part] if winner is None else winner[j, part]
                    passed = self._passed(dy[j, part], kept, run)
                    d = passed if winner is None else self._spread(passed, kept, run)
                    self._weight_sums(self._windows(x[j, part], run), d, dW, part.start == 0, run)
                    if self.bias:
                        self._bias_sums(passed, own["b"], part.start == 0, run)
                    if dx is None:
                        continue
                    if turned is not None:
                        self._turned_gradient(d, turned, dx[j, part], run)
                    else:
                        self._gathered_gradient(d, W, dx[j, part], run)
                if self.shifts:
                    self._sum_shifted(dW, own["W"])
            return dx

        return y, backward

    def _shifted(self, W: Array, run: Pass) -> Array:
        """W as a matrix, or for each place of a pool one with W where the place's own window lies in the shared one."""
        if not self.shifts:
            return W.reshape(-1, self.channels)
        shape = (self.places, self.extent, self.extent, self.inputs, self.channels)
        shifted = run.workspace.made((id(self), "shifted"), lambda: np.zeros(shape, self.dtype))
        for own in self._own_parts(shifted):
            np.copyto(own, W)
        return shifted.reshape(self.places, -1, self.channels)

    def _own_parts(self, shifted: Array) -> list[Array]:
        """Of each place's weights for the shared window, those that are its own."""
        found = []
        for place in range(self.places):
            i, j = (self.stride * at for at in divmod(place, self.pool))
            found.append(shifted[place, i : i + self.kernel, j : j + self.kernel])
        return found

    def _sum_shifted(self, sums: Array, dW: Array) -> None:
        shape = (self.places, self.extent, self.extent, self.inputs, self.channels)
        first, *others = self._own_parts(sums.reshape(shape))
        np.copyto(dW, first)
        for own in others:
            np.add(dW, own, out=dW)

    def _bias_row(self, b: Array, run: Pass) -> Array:
        """The bias once for every pixel of a row: numpy is fast on long runs only."""
        row = self.kept(run, "bias", self.output_shape[1:])
        np.copyto(row, b)
        return row.reshape(-1)

    def _windows(self, x: Array, run: Pass) -> Array:
        """The windows of some images: (windows, elements of one)."""
        n, (rows, columns, _) = len(x), self.output_shape
        height, width, c = self.input_shape
        if self.padded != (height, width):
            padded = self._zeroed(run, "padded", (n, *self.padded, c))
            np.copyto(padded[:, self.top : self.top + height, self.left : self.left + width], x)
            x = padded
        if self.shared:
            shape: tuple[int, ...] = (self.extent, self.extent, c, n, rows, columns)
            return window_columns(x, self.stride * self.pool, self.scratch(run, "windows", shape))
        if self.kernel == self.stride == self.pool == 1:
            return x.reshape(-1, c)
        shape = (self.pool, self.pool, n, rows, columns, self.kernel, self.kernel * c)
        return window_rows(x, self.stride, self.scratch(run, "windows", shape))

    def _zeroed(self, run: Pass, what: str, shape: tuple[int, ...]) -> Array:
        """Memory of this layer that is zero wherever nobody writes."""
        return run.workspace.made((id(self), what, shape), lambda: np.zeros(shape, self.dtype))

    def _per_place(self, product: Array) -> Array:
        """(places, pools, channels) where every place has its own weights, else (places * pools, channels)."""
        return product.reshape(self.places, -1, self.channels) if self.shifts else product.reshape(-1, self.channels)

    def _outputs(
        self, windows: Array, shifted: Array, bias: Array | None, y: Array, winner: Array | None, run: Pass
    ) -> None:
        """The outputs of some images from their windows."""
        product = y if self.pool == 1 else self.scratch(run, "product", (self.places, *y.shape))
        self.matmul(windows, shifted, out=self._per_place(product))
        if winner is not None:
            number, mask = self.scratch(run, "number", y.shape, np.uint8), self.scratch(run, "mask", y.shape, np.bool_)
            winners(product, y, winner, mask, number)
        elif self.pool > 1:
            maxima(product, y)
        rows = y.reshape(-1, self.output_shape[1] * self.channels)
        if bias is not None:
            np.add(rows, bias, out=rows)
        if self.relu:
            np.maximum(rows, run.workspace.constant(0, rows.shape[1:], self.dtype), out=rows)
            if winner is not None:
                np.equal(y, 0, out=mask)
                np.multiply(mask.view(np.uint8), NONE, out=number)
                np.maximum(winner, number, out=winner)

    def _passed(self, dy: Array, kept: Array, run: Pass) -> Array:
        """The gradient that the relu lets through; ``kept`` are the winners, or y without a pooling."""
        if not self.relu:
            return dy
        mask, passed = self.scratch(run, "mask", dy.shape, np.bool_), self.scratch(run, "passed", dy.shape)
        if self.pool > 1:
            np.not_equal(kept, NONE, out=mask)
        else:
            np.greater(kept, 0, out=mask)
        return np.multiply(dy, mask, out=passed)

    def _spread(self, passed: Array, winner: Array, run: Pass) -> Array:
        """The product's gradient, (places, ...): each output's at its winner."""
        d = self.scratch(run, "product", (self.places, *passed.shape))
        mask = self.scratch(run, "mask", passed.shape, np.bool_)
        for place in range(self.places):
            np.equal(winner, place, out=mask)
            np.multiply(passed, mask, out=d[place])
        return d

    def _weight_sums(self, windows: Array, d: Array, dW: Array, first: bool, run: Pass) -> None:
        part = dW if first else self.scratch(run, "dW of some", dW.shape)
        self.matmul(windows.T, self._per_place(d), out=part)
        if not first:
            np.add(dW, part, out=dW)

    def _bias_sums(self, passed: Array, db: Array, first: bool, run: Pass) -> None:
        flat = passed.reshape(-1, self.channels)
        part = self.scratch(run, "db", (1, self.channels))
        self.matmul(self.ones(run, len(flat)), flat, out=part)
        if first:
            np.copyto(db, part[0])
        else:
            np.add(db, part[0], out=db)

    def _turned(self, W: Array, run: Pass) -> Array:
        """(kernel * kernel * channels, input channels): the weights turned by half a circle."""
        turned = self.kept(run, "turned", (self.kernel, self.kernel, self.channels, self.inputs))
        np.copyto(turned, W[::-1, ::-1].swapaxes(2, 3))
        return turned.reshape(-1, self.inputs)

    def _turned_gradient(self, d: Array, turned: Array, dx: Array, run: Pass) -> None:
        """The input's gradient as a convolution of the output's with the weights turned round."""
        height, width, c = self.input_shape
        if self.kernel == self.pool == 1:
            self.matmul(d.reshape(-1, self.channels), turned, out=dx.reshape(-1, c))
            return
        edge = self.kernel - 1
        image = (height + edge, width + edge, self.channels)
        canvas = self._canvas(d, (edge - self.top, edge - self.left), (len(dx), *image), run)
        run_length = self.kernel * self.channels
        image_bytes = height * width * (self.kernel * run_length + c) * self.dtype.itemsize
        for part in blocks(len(dx), image_bytes, TOGETHER):
            n = part.stop - part.start
            shape = (1, 1, n, height, width, self.kernel, run_length)
            windows = window_rows(canvas[part], 1, self.scratch(run, "windows", shape))
            self.matmul(windows, turned, out=dx[part].reshape(-1, c))

    def _gathered_gradient(self, d: Array, W: Array, dx: Array, run: Pass) -> None:
        """One product for every element of the kernel, added where its pixels lie."""
        n, (height, width, c), (oh, ow) = len(dx), self.input_shape, self.sides
        canvas = self._canvas(d, (0, 0), (n, oh, ow, self.channels), run).reshape(-1, self.channels)
        whole = self.scratch(run, "dx", (n, *self.padded, c))
        whole.fill(0)
        part = self.scratch(run, "tap", (n, oh, ow, c))
        for i in range(self.kernel):
            for j in range(self.kernel):
                self.matmul(canvas, W[i, j].T, out=part.reshape(-1, c))
                target = whole[:, i : i + self.stride * oh : self.stride, j : j + self.stride * ow : self.stride]
                np.add(target, part, out=target)
        np.copyto(dx, whole[:, self.top : self.top + height, self.left : self.left + width])

    def _canvas(self, d: Array, corner: tuple[int, int], shape: tuple[int, ...], run: Pass) -> Array:
        """The product's gradient as images, with zeros around it and where pools end before the images."""
        rows, columns, _ = self.output_shape
        canvas = self._zeroed(run, "canvas", shape)
        for place in range(self.places):
            i, j = (start + at for start, at in zip(corner, divmod(place, self.pool), strict=True))
            pixels = canvas[:, i : i + self.pool * rows : self.pool, j : j + self.pool * columns : self.pool]
            np.copyto(pixels, d[place] if self.pool > 1 else d)
        return canvas
