"""What is decided for all, once a step: one row of float64 from every worker, and what follows from all rows.

Every worker sees the same rows and decides the same, by the same arithmetic: sums of losses and weights in the
canonical tree, squared norms over blocks in their order.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from dptrain.membership import Membership
from dptrain.tree import Node, finish

FAILURE, SIGNAL, COMPUTE, WAIT = range(4)
_HEAD = 4
_TALLIES = 3


@dataclass(frozen=True)
class Report:
    """What a worker says of its part of a step. ``failure`` is 0 or its exit code, ``signal`` 0 or the one it got."""

    compute: float = 0.0
    wait: float = 0.0
    failure: int = 0
    signal: int = 0


@dataclass(frozen=True)
class Verdict:
    """The decision on a step. ``scale`` makes the gradient sum the clipped mean; ``norm`` is None if not wanted.

    ``failures`` are (rank, exit code) of workers that failed; ``compute`` and ``wait`` are seconds, per worker.
    """

    weight: float
    loss: float
    rows: float
    norm: float | None
    scale: float
    finite: bool
    signal: int
    failures: tuple[tuple[int, int], ...]
    compute: tuple[float, ...]
    wait: tuple[float, ...]


class Ballot:
    """Packs reports into rows, reads the verdict off all rows, and the norm off all rows of squares."""

    def __init__(self, membership: Membership, squares: Sequence[int], clip_norm: float) -> None:
        """``squares``: the number of block norms of each worker's segment."""
        self.membership = membership
        self.clip_norm = clip_norm
        self.squares = list(squares)
        self._nodes = max(len(nodes) for nodes in membership.nodes)
        self._row = np.zeros(_HEAD + self._nodes * _TALLIES)
        self._squares = np.zeros(max(1, *self.squares))

    def row(self, report: Report, tallies: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """This worker's row; valid until the next call."""
        row = self._row
        row[_HEAD:] = 0
        row[:_HEAD] = report.failure, report.signal, report.compute, report.wait
        row[_HEAD : _HEAD + tallies.size] = tallies.ravel()
        return row

    def row_of_squares(self, squares: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """This worker's squared block norms as a row; valid until the next call."""
        self._squares[: len(squares)] = squares
        return self._squares

    def read(self, rows: npt.NDArray[np.float64]) -> Verdict:
        """The verdict of all rows, in order of rank, as far as it doesn't depend on the gradient."""
        values: dict[Node, npt.NDArray[np.float64]] = {}
        for rank, nodes in enumerate(self.membership.nodes):
            tallies = rows[rank, _HEAD : _HEAD + len(nodes) * _TALLIES].reshape(-1, _TALLIES)
            values.update(zip(nodes, tallies, strict=True))
        weight, loss, count = finish(values, Node(0, self.membership.shards), np.add).tolist()
        scale = 1 / weight if weight > 0 else math.nan
        return Verdict(
            weight=weight,
            loss=loss,
            rows=count,
            norm=None,
            scale=scale,
            finite=math.isfinite(loss) and math.isfinite(scale),
            signal=int(rows[:, SIGNAL].max()),
            failures=tuple((rank, int(code)) for rank, code in enumerate(rows[:, FAILURE].tolist()) if code),
            compute=tuple(rows[:, COMPUTE].tolist()),
            wait=tuple(rows[:, WAIT].tolist()),
        )

    def clipped(self, verdict: Verdict, rows: npt.NDArray[np.float64]) -> Verdict:
        """The verdict with the norm of the mean gradient, from all rows of squares in order of rank."""
        square = 0.0
        for rank, blocks in enumerate(self.squares):
            for value in rows[rank, :blocks].tolist():
                square += value
        norm = math.sqrt(square) / verdict.weight if square >= 0 else math.nan
        scale = verdict.scale * (self.clip_norm / norm) if norm > self.clip_norm else verdict.scale
        return replace(verdict, norm=norm, scale=scale, finite=verdict.finite and math.isfinite(square))
