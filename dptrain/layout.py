"""Names and shapes <-> slices of one flat vector.

Parameters and gradients are views into one vector all the way from a layer to the wire; nothing is concatenated,
split or copied between. Parameters (what the optimizer updates) come first, then buffers (running statistics).
"""

import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

BLOCK = 16_384
"""Elements of a block. Segments are cut at its multiples and norms are summed by it, so it is part of the bits."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One named tensor of the vector. ``momentum`` is a buffer's share of the new value; parameters have None."""

    name: str
    shape: tuple[int, ...]
    start: int
    momentum: float | None = None

    @property
    def stop(self) -> int:
        """The end of the entry's slice."""
        return self.start + math.prod(self.shape)


class Layout:
    """Where every tensor of a model lies in its flat vector. Immutable.

    ``parameters`` elements belong to the optimizer, the remaining up to ``size`` are buffers.
    """

    def __init__(
        self,
        parameters: Iterable[tuple[str, tuple[int, ...]]],
        buffers: Iterable[tuple[str, tuple[int, ...], float]] = (),
    ) -> None:
        self.entries: dict[str, Entry] = {}
        at = 0
        for name, shape in parameters:
            at = self._append(Entry(name, tuple(shape), at))
        self.parameters = at
        for name, shape, momentum in buffers:
            at = self._append(Entry(name, tuple(shape), at, momentum))
        self.size = at

    def _append(self, entry: Entry) -> int:
        if entry.name in self.entries:
            raise ValueError(f"two tensors are called {entry.name!r}")
        self.entries[entry.name] = entry
        return entry.stop

    def views(self, vector: Array) -> dict[str, Array]:
        """Every tensor as a view into ``vector``, whose last axis has ``size`` elements; leading axes stay."""
        lead = vector.shape[:-1]
        return {
            name: vector[..., entry.start : entry.stop].reshape((*lead, *entry.shape))
            for name, entry in self.entries.items()
        }

    def buffer_momentum(self) -> npt.NDArray[np.float64]:
        """For every element of the buffers, its share of the new value."""
        parts = [
            np.full(entry.stop - entry.start, entry.momentum)
            for entry in self.entries.values()
            if entry.momentum is not None
        ]
        return np.concatenate(parts) if parts else np.zeros(0)

    def describe(self) -> list[list[Any]]:
        """Names, shapes and kinds as plain data, for manifests and digests."""
        return [[e.name, list(e.shape), e.momentum] for e in self.entries.values()]


def segments(size: int, parts: int) -> list[tuple[int, int]]:
    """``parts`` contiguous ranges that cover range(size), cut at multiples of BLOCK, as equal as that allows.

    Later ranges may be empty where there are more parts than blocks.
    """
    blocks = -(-size // BLOCK)
    cuts = [min(size, BLOCK * (blocks * i // parts)) for i in range(parts + 1)]
    return list(pairwise(cuts))


def digest(vector: Array) -> str:
    """``sha256:`` and the SHA-256 of the vector's elements as little-endian bytes, in order."""
    little = np.ascontiguousarray(vector, dtype=vector.dtype.newbyteorder("<"))
    return "sha256:" + hashlib.sha256(little.data).hexdigest()
