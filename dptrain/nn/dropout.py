"""Dropout with keyed masks."""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from dptrain.job import spec
from dptrain.nn.bound import BoundLayer
from dptrain.nn.layer import Array, LayerBackward, Pass
from dptrain.random import Purpose, bits

SIDES = 1 << 16
"""An element is kept where its 16 random bits are below a threshold, so rates are rounded to 1 / 65,536."""

_WORDS = 1_024
"""Words of 64 random bits that are drawn at once: numpy hands them out as new memory."""


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
        threshold = min(max(1, round((1.0 - settings.rate) * SIDES)), SIDES - 1)
        self.threshold = np.uint16(threshold)
        self.scale = np.array(SIDES / threshold, self.dtype)[()]

    def forward(self, tensors: Mapping[str, Array], x: Array, run: Pass) -> tuple[Array, LayerBackward]:
        """Any shape -> the same shape."""
        if self.hands_back or not run.training:
            return x, _same
        mask = self.kept(run, "mask", x.shape)
        kept = self.scratch(run, "mask", x.shape, np.bool_)
        for j, shard in enumerate(run.shards):
            self._draw(kept[j].reshape(-1), run, shard)
        np.copyto(mask, kept)
        np.multiply(mask, self.scale, out=mask)
        y = self.output(run, x)
        np.multiply(x, mask, out=y)

        def backward(dy: Array, grads: Mapping[str, Array], need_dx: bool) -> Array | None:
            dx = self.input_gradient(run, dy)
            np.multiply(dy, mask, out=dx)
            return dx

        return y, backward

    def _draw(self, kept: Array, run: Pass, shard: int) -> None:
        source = bits(run.seed, Purpose.DROPOUT, run.step, shard, self.index)
        for start in range(0, len(kept), 4 * _WORDS):
            some = kept[start : start + 4 * _WORDS]
            # Not kept under a name, so that two of them never live together.
            np.less(source.random_raw(-(-len(some) // 4)).view(np.uint16)[: len(some)], self.threshold, out=some)


def _same(dy: Array, grads: Mapping[str, Array], need_dx: bool) -> Array | None:
    return dy
