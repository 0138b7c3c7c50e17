"""Dropout with keyed masks."""

import math
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from dptrain.job import spec
from dptrain.nn.bound import BoundLayer
from dptrain.nn.layer import Array, LayerBackward, Pass
from dptrain.random import Purpose, bits


class Dropout(BoundLayer):
    """Zeroes elements with probability ``rate`` and multiplies the others by 1 / (1 - rate); x itself when evaluating.

    The mask of a shard is a function of (seed, step, shard, layer) alone. Padded rows draw too, so it never depends
    on how many rows are real.
    """

    can_overwrite = True
    hands_through = True

    def __init__(
        self, settings: spec.Dropout, name: str, shape: tuple[int, ...], dtype: npt.DTypeLike, index: int
    ) -> None:
        super().__init__(name, shape, shape, dtype)
        self.index = index
        self.hands_back = settings.rate == 0
        keep = 1.0 - settings.rate
        self.threshold = np.uint32(min(round(keep * 2**32), 2**32 - 1))
        self.scale = np.array(1.0 / keep, self.dtype)[()]

    def forward(self, tensors: Mapping[str, Array], x: Array, run: Pass) -> tuple[Array, LayerBackward]:
        """Any shape -> the same shape."""
        if self.hands_back or not run.training:
            return x, _same
        mask = self.kept(run, "mask", x.shape)
        size = math.prod(x.shape[1:])
        kept = self.scratch(run, "mask", (size,), np.bool_)
        for j, shard in enumerate(run.shards):
            raw = bits(run.seed, Purpose.DROPOUT, run.step, shard, self.index).random_raw(-(-size // 2))
            np.less(raw.view(np.uint32)[:size], self.threshold, out=kept)
            np.multiply(kept, self.scale, out=mask[j].reshape(-1))
        y = self.output(run, x)
        np.multiply(x, mask, out=y)

        def backward(dy: Array, grads: Mapping[str, Array], need_dx: bool) -> Array | None:
            dx = self.input_gradient(run, dy)
            np.multiply(dy, mask, out=dx)
            return dx

        return y, backward


def _same(dy: Array, grads: Mapping[str, Array], need_dx: bool) -> Array | None:
    return dy
