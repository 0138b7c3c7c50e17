"""The memory that the processes of one worker share: the weights once, and an outbox for each process."""

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from dptrain import board
from dptrain.board import Cell
from dptrain.layout import Array
from dptrain.nn.accumulate import TALLIES

_ALIGNED = 64


class Counts(NamedTuple):
    """Messages of a line to a process and from it. Each has a cache line of its own."""

    to: Cell
    back: Cell


class Placed(NamedTuple):
    """What lies in the memory.

    ``signs`` (a board's cells) and ``counts``, one for each process; ``weights`` (size,); ``boxes`` (slots, size) and
    ``tallies`` (slots, 3) of each; ``rows`` (blocks, width) of an evaluation; ``residuals`` (2, shards, parameters).
    """

    signs: list[Cell]
    counts: list[Counts]
    weights: Array
    boxes: list[Array]
    tallies: list[npt.NDArray[np.float64]]
    rows: npt.NDArray[np.float64]
    residuals: Array


class HostMemory:
    """How the memory of ``processes`` is laid out: outboxes of ``slots`` rows, evaluations of up to ``blocks``.

    ``kept`` shards have each a residual of so many ``parameters``.
    """

    def __init__(
        self,
        *,
        processes: int,
        size: int,
        dtype: npt.DTypeLike,
        slots: int,
        blocks: int,
        width: int,
        kept: int = 0,
        parameters: int = 0,
    ) -> None:
        self._dtype = np.dtype(dtype)
        self._processes, self._size, self._slots = processes, size, slots
        self._blocks, self._width = blocks, width
        self._residuals = 2, kept, parameters
        unit = _ALIGNED // self._dtype.itemsize
        self._row = -(-size // unit) * unit

    def _bytes(self) -> list[int]:
        n = self._processes
        parts = [
            n * 3 * board.CELL_BYTES,
            self._row * self._dtype.itemsize,
            n * self._slots * self._row * self._dtype.itemsize,
            n * self._slots * TALLIES * 8,
            self._blocks * self._width * 8,
            math.prod(self._residuals) * self._dtype.itemsize,
        ]
        return [-(-part // _ALIGNED) * _ALIGNED for part in parts]

    @property
    def nbytes(self) -> int:
        """Bytes needed."""
        return sum(self._bytes())

    def place(self, memory: Array) -> Placed:
        """Everything in ``memory``, ``nbytes`` of uint8 that are zero at first; to be called once."""
        n, slots = self._processes, self._slots
        cells, weights, boxes, tallies, rows, kept = np.split(memory, np.cumsum(self._bytes())[:-1])
        numbers = memoryview(cells).cast("B").cast("q")  # type: ignore[arg-type]
        of = board.CELL_BYTES // 8
        lines = [numbers[at : at + of] for at in range(0, len(numbers), of)]
        outboxes = boxes.view(self._dtype)[: n * slots * self._row].reshape(n, slots, self._row)[:, :, : self._size]
        sums = tallies.view(np.float64)[: n * slots * TALLIES].reshape(n, slots, TALLIES)
        return Placed(
            lines[:n],
            [Counts(*lines[at : at + 2]) for at in range(n, 3 * n, 2)],
            weights.view(self._dtype)[: self._size],
            list(outboxes),
            list(sums),
            rows.view(np.float64)[: self._blocks * self._width].reshape(self._blocks, self._width),
            kept.view(self._dtype)[: math.prod(self._residuals)].reshape(self._residuals),
        )


def most_slots(shards: int) -> int:
    """Rows of an outbox that are enough for any range of so many shards, however many are taken at once."""
    return 2 * (shards - 1).bit_length() + 1
