"""Rows of a table by integer."""

import math
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from dptrain.errors import ModelError
from dptrain.job import spec
from dptrain.nn.bound import BoundLayer
from dptrain.nn.layer import Array, LayerBackward, Pass


class Embedding(BoundLayer):
    """y[..., :] = W[x]: row x of a (vocabulary, units) table for each integer x of the sample.

    An integer outside the table is a ModelError. Integers have no gradient, so dx is None.
    """

    def __init__(self, settings: spec.Embedding, name: str, shape: tuple[int, ...], dtype: npt.DTypeLike) -> None:
        super().__init__(name, shape, (*shape, settings.units), dtype)
        self.vocabulary, self.units = settings.vocabulary, settings.units
        self.parameters = [("W", (self.vocabulary, self.units))]

    def initialise(self, tensors: Mapping[str, Array], rng: np.random.Generator) -> None:
        """W normal with variance 1."""
        tensors["W"][...] = rng.standard_normal((self.vocabulary, self.units))

    def forward(self, tensors: Mapping[str, Array], x: Array, run: Pass) -> tuple[Array, LayerBackward]:
        """(k, b, ...) int64 -> (k, b, ..., units)."""
        if x.size and not 0 <= int(x.min()) <= int(x.max()) < self.vocabulary:
            wrong = int(x.max()) if int(x.max()) >= self.vocabulary else int(x.min())
            raise ModelError(
                self.name,
                expected=f"integers from 0 to {self.vocabulary - 1}",
                found=str(wrong),
                cure="raise its vocabulary or check the data",
            )
        y = self.output(run, x)
        # The indices are in range; "clip" lets take write to y directly, "raise" would go through a copy.
        np.take(tensors["W"], x, axis=0, out=y, mode="clip")
        tokens = math.prod(x.shape[1:])

        def backward(dy: Array, grads: Mapping[str, Array], need_dx: bool) -> Array | None:
            ordered = self.scratch(run, "rows", (tokens, self.units))
            for j, dW in enumerate(grads["W"]):
                self._add_rows(x[j].reshape(-1), dy[j].reshape(tokens, self.units), dW, ordered)
            return None

        return y, backward

    def _add_rows(self, rows: Array, dy: Array, dW: Array, ordered: Array) -> None:
        """dW[i] = the sum of dy over the places where i stands, in their order."""
        dW.fill(0)
        order = np.argsort(rows, kind="stable")
        np.take(dy, order, axis=0, out=ordered, mode="clip")
        present, starts = np.unique(rows[order], return_index=True)
        dW[present] = np.add.reduceat(ordered, starts, axis=0)
