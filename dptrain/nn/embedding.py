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

    An integer outside the table is a ModelError. Integers have no gradient, so dx is None. Gradients of one row are
    added in the order of the tokens.
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
            columns = run.workspace.made(("columns", self.units), lambda: np.arange(self.units))
            starts = self.scratch(run, "starts", (tokens, 1), np.int64)
            places = self.scratch(run, "places", (tokens, self.units), np.int64)
            for j, dW in enumerate(grads["W"]):
                # numpy adds at single elements of a flat array much faster than at rows of a table.
                np.multiply(x[j].reshape(-1, 1), self.units, out=starts)
                np.add(starts, columns, out=places)
                dW.fill(0)
                np.add.at(dW.reshape(-1), places.reshape(-1), dy[j].reshape(-1))
            return None

        return y, backward
