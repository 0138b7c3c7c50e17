"""Batch norm over the real rows of a shard, layer norm over the last axis of a sample."""

import math
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from dptrain.job import spec
from dptrain.nn.bound import BoundLayer, Misfit
from dptrain.nn.layer import Array, LayerBackward, Pass


class BatchNorm(BoundLayer):
    """y = gamma (x - mean) / sqrt(var + eps) + beta for each channel, the last axis (Ioffe and Szegedy, 2015).

    Training takes the mean and the biased variance over the real rows and all positions of one shard; padded rows
    neither count nor get a gradient, and a shard without real rows has none at all. Evaluation takes
    ``running_mean`` and ``running_var``. What is handed out as their gradient is, per shard, its real rows times the
    mean and the unbiased variance (the biased one where there is a single value).
    """

    can_overwrite = True

    def __init__(self, settings: spec.BatchNorm, name: str, shape: tuple[int, ...], dtype: npt.DTypeLike) -> None:
        if not shape:
            raise Misfit("a sample with at least one axis", "give each row at least one feature")
        super().__init__(name, shape, shape, dtype)
        self.eps = settings.eps
        self.channels = shape[-1]
        self.positions = math.prod(shape[:-1])
        vector = (self.channels,)
        self.parameters = [("gamma", vector), ("beta", vector)]
        self.buffers = [
            ("running_mean", vector, settings.momentum),
            ("running_var", vector, settings.momentum),
        ]

    def initialise(self, tensors: Mapping[str, Array], rng: np.random.Generator) -> None:
        """The identity: gamma and the variance 1, beta and the mean 0."""
        for name, value in (("gamma", 1), ("beta", 0), ("running_mean", 0), ("running_var", 1)):
            tensors[name][...] = value

    def forward(self, tensors: Mapping[str, Array], x: Array, run: Pass) -> tuple[Array, LayerBackward]:
        """Any shape -> the same shape."""
        if not run.training:
            return self._evaluate(tensors, x, run)
        k = len(x)
        gamma = tensors["gamma"]
        normal = x if self.overwrites_input else self.kept(run, "normal", x.shape)
        y = self.kept(run, "y", x.shape)
        statistics = self.kept(run, "statistics", (3, k, self.channels), np.float64)
        means, variances, inverses = statistics
        for j, n in enumerate(run.counts):
            if n:
                self._normalise(x[j, :n], normal[j, :n], means[j], variances[j], inverses[j], run)
                self._affine(normal[j, :n], gamma, tensors["beta"], y[j, :n], run)
            y[j, n:] = 0

        def backward(dy: Array, grads: Mapping[str, Array], need_dx: bool) -> Array | None:
            dx = self.input_gradient(run, dy) if need_dx else None
            for j, n in enumerate(run.counts):
                own = {name: grad[j] for name, grad in grads.items()}
                if n == 0:
                    for grad in own.values():
                        grad.fill(0)
                else:
                    count = n * self.positions
                    np.multiply(means[j], n, out=own["running_mean"], casting="same_kind")
                    np.multiply(
                        variances[j], n * count / max(1, count - 1), out=own["running_var"], casting="same_kind"
                    )
                    self._gradients(dy[j, :n], normal[j, :n], own, run)
                    if dx is not None:
                        factor = np.multiply(gamma, inverses[j], out=inverses[j])
                        self._input_gradient(dy[j, :n], normal[j, :n], own, factor, dx[j, :n], run)
                if dx is not None:
                    dx[j, n:] = 0
            return dx

        return y, backward

    def _evaluate(self, tensors: Mapping[str, Array], x: Array, run: Pass) -> tuple[Array, LayerBackward]:
        factor = tensors["gamma"] / np.sqrt(tensors["running_var"] + self.eps)
        y = self.output(run, x)
        np.subtract(x, tensors["running_mean"], out=y)
        np.multiply(y, factor, out=y)
        np.add(y, tensors["beta"], out=y)

        def backward(dy: Array, grads: Mapping[str, Array], need_dx: bool) -> Array | None:
            raise NotImplementedError("the backward of an evaluation")

        return y, backward

    def _column_sums(self, x: Array, run: Pass) -> Array:
        """Sums over rows and positions, for each channel: within a row in x's own dtype, over rows in float64."""
        rows = len(x)
        if self.positions > 1:
            sums = self.scratch(run, "sums", (rows, 1, self.channels))
            self.matmul(self.ones(run, self.positions), x.reshape(rows, self.positions, self.channels), out=sums)
            x = sums
        total = self.scratch(run, "total", (self.channels,), np.float64)
        return np.add.reduce(x.reshape(rows, self.channels), axis=0, dtype=np.float64, out=total)

    def _spread(self, vector: Array, what: str, run: Pass) -> Array:
        """A value per channel as one for every element of a row: numpy is fast on long runs only."""
        wide = self.scratch(run, what, (self.positions, self.channels))
        np.copyto(wide, vector, casting="same_kind")
        return wide.reshape(-1)

    def _normalise(self, x: Array, normal: Array, mean: Array, variance: Array, inverse: Array, run: Pass) -> None:
        rows, count = len(x), len(x) * self.positions
        np.divide(self._column_sums(x, run), count, out=mean)
        x, normal = x.reshape(rows, -1), normal.reshape(rows, -1)
        np.subtract(x, self._spread(mean, "a", run), out=normal)
        squares = self.scratch(run, "squares", normal.shape)
        np.multiply(normal, normal, out=squares)
        np.divide(self._column_sums(squares.reshape(rows, *self.input_shape), run), count, out=variance)
        np.add(variance, self.eps, out=inverse)
        np.sqrt(inverse, out=inverse)
        np.reciprocal(inverse, out=inverse)
        np.multiply(normal, self._spread(inverse, "a", run), out=normal)

    def _affine(self, normal: Array, gamma: Array, beta: Array, y: Array, run: Pass) -> None:
        rows = len(y)
        y = y.reshape(rows, -1)
        np.multiply(normal.reshape(rows, -1), self._spread(gamma, "a", run), out=y)
        np.add(y, self._spread(beta, "a", run), out=y)

    def _gradients(self, dy: Array, normal: Array, own: Mapping[str, Array], run: Pass) -> None:
        products = self.scratch(run, "squares", dy.shape)
        np.multiply(dy, normal, out=products)
        own["gamma"][...] = self._column_sums(products, run)
        own["beta"][...] = self._column_sums(dy, run)

    def _input_gradient(
        self, dy: Array, normal: Array, own: Mapping[str, Array], factor: Array, dx: Array, run: Pass
    ) -> None:
        """dx = factor (dy - beta' / n - normal gamma' / n), with beta' and gamma' the sums over the n values."""
        rows, count = len(dy), len(dy) * self.positions
        dy, dx, part = dy.reshape(rows, -1), dx.reshape(rows, -1), normal.reshape(rows, -1)
        # ``normal`` has served; its memory takes the product.
        share = self.scratch(run, "share", (self.channels,))
        np.multiply(part, self._spread(np.divide(own["gamma"], count, out=share), "a", run), out=part)
        np.subtract(dy, part, out=dx)
        np.subtract(dx, self._spread(np.divide(own["beta"], count, out=share), "a", run), out=dx)
        np.multiply(dx, self._spread(factor, "a", run), out=dx)


class LayerNorm(BoundLayer):
    """y = gamma (x - mean) / sqrt(var + eps) + beta over the last axis of each sample (Ba et al., 2016)."""

    can_overwrite = True

    def __init__(self, settings: spec.LayerNorm, name: str, shape: tuple[int, ...], dtype: npt.DTypeLike) -> None:
        if not shape:
            raise Misfit("a sample with at least one axis", "give each row at least one feature")
        super().__init__(name, shape, shape, dtype)
        self.eps = settings.eps
        self.width = shape[-1]
        self.positions = math.prod(shape[:-1])
        self.parameters = [("gamma", (self.width,)), ("beta", (self.width,))]

    def initialise(self, tensors: Mapping[str, Array], rng: np.random.Generator) -> None:
        """gamma 1, beta 0."""
        tensors["gamma"][...] = 1
        tensors["beta"][...] = 0

    def forward(self, tensors: Mapping[str, Array], x: Array, run: Pass) -> tuple[Array, LayerBackward]:
        """Any shape -> the same shape."""
        k, rows = x.shape[0], x.shape[1] * self.positions
        shape = (k, rows, self.width)
        gamma = tensors["gamma"]
        normal = (x if self.overwrites_input else self.kept(run, "normal", x.shape)).reshape(shape)
        y = self.kept(run, "y", x.shape)
        part = self.scratch(run, "squares", shape)
        inverse = self.kept(run, "inverse", (k, rows, 1))
        np.subtract(x.reshape(shape), self._row_means(x.reshape(shape), "mean", run), out=normal)
        np.multiply(normal, normal, out=part)
        np.add(self._row_means(part, "mean", run), self.eps, out=inverse)
        np.sqrt(inverse, out=inverse)
        np.reciprocal(inverse, out=inverse)
        np.multiply(normal, inverse, out=normal)
        np.multiply(normal, gamma, out=y.reshape(shape))
        np.add(y, tensors["beta"], out=y)

        def backward(dy: Array, grads: Mapping[str, Array], need_dx: bool) -> Array | None:
            flat = dy.reshape(shape)
            part = self.scratch(run, "squares", shape)
            np.multiply(flat, normal, out=part)
            ones = self.ones(run, rows)
            self.matmul(ones, part, out=grads["gamma"][:, None, :])
            self.matmul(ones, flat, out=grads["beta"][:, None, :])
            if not need_dx:
                return None
            dx = self.input_gradient(run, dy)
            out = dx.reshape(shape)
            np.multiply(flat, gamma, out=out)
            np.multiply(out, normal, out=part)
            shared = self._row_means(part, "mean", run)
            # ``normal`` has served; its memory takes the product.
            np.multiply(normal, shared, out=normal)
            np.subtract(out, self._row_means(out, "mean", run), out=out)
            np.subtract(out, normal, out=out)
            np.multiply(out, inverse, out=out)
            return dx

        return y, backward

    def _row_means(self, x: Array, what: str, run: Pass) -> Array:
        """(k, rows, 1), by a product with ones per shard, which is faster than a reduction."""
        means = self.scratch(run, what, (*x.shape[:2], 1))
        self.matmul(x, self.ones(run, self.width).reshape(-1, 1), out=means)
        np.divide(means, self.width, out=means)
        return means
