"""What is decided for all, once a step: one row of float64 from every worker, and what follows from all rows.

Every worker sees the same rows and decides the same, by the same arithmetic: sums of losses and weights in the
canonical tree, squared norms over blocks in their order.
"""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from dptrain.arrivals import Arrival
from dptrain.membership import Membership
from dptrain.nn.accumulate import TALLIES
from dptrain.phases import Phase
from dptrain.tree import Add, Node, additions

FAILURE, SIGNAL, COMPUTE, WAIT = range(4)
_PHASES = slice(4, 4 + len(Phase))
_HEAD = _PHASES.stop


class Report(NamedTuple):
    """What a worker says of its part of a step. ``failure`` is 0 or its exit code, ``signal`` 0 or the one it got.

    ``phases`` are the seconds of each phase since the run began.
    """

    compute: float = 0.0
    wait: float = 0.0
    phases: Sequence[float] = (0.0,) * len(Phase)
    failure: int = 0
    signal: int = 0


class Verdict(NamedTuple):
    """The decision on a step. ``scale`` makes the gradient sum the clipped mean; ``norm`` is None if not wanted.

    ``failures`` are (rank, exit code) of workers that failed; ``compute`` and ``wait`` are seconds, per worker;
    ``phases`` those of each phase since the run began, (workers, phases). ``arrival`` tells of which batch the step is,
    where that is not the next one in any case. ``workers``: how many compute, where they come and go; else 0.
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
    phases: npt.NDArray[np.float64]
    arrival: Arrival | None = None
    workers: int = 0

    @property
    def share(self) -> float:
        """What the update gets of the learning rate."""
        return 1.0 if self.arrival is None else self.arrival.share


def summed(tallies: dict[Node, list[float]], plan: Iterable[Add], goal: Node) -> list[float]:
    """The tallies of ``goal``, by a plan of additions that make it; those of all its parents are put down too."""
    for parent, left, right in plan:
        a, b = tallies[left], tallies[right]
        tallies[parent] = [a[0] + b[0], a[1] + b[1], a[2] + b[2]]
    return tallies[goal]


class Ballot:
    """Packs reports into rows, reads the verdict off all rows, and the norm off all rows of squares."""

    def __init__(self, membership: Membership, squares: Sequence[int], clip_norm: float) -> None:
        """``squares``: the number of block norms of each worker's segment."""
        self.membership = membership
        self.clip_norm = clip_norm
        self.squares = list(squares)
        self._nodes = max(len(nodes) for nodes in membership.nodes)
        # Where a row begins, which of its tallies are whose, and how they are added.
        places = [(node, rank, i) for rank, nodes in enumerate(membership.nodes) for i, node in enumerate(nodes)]
        self._places = [(node, rank, _HEAD + i * TALLIES) for node, rank, i in places]
        self._goal = Node(0, membership.shards)
        self._additions = additions([node for node, *_ in places], self._goal)
        self._row = np.zeros(_HEAD + self._nodes * TALLIES)
        self._squares = np.zeros(max(1, *self.squares))

    def row(self, report: Report, tallies: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """This worker's row; valid until the next call."""
        row = self._row
        row[: _PHASES.start] = report.failure, report.signal, report.compute, report.wait
        row[_PHASES] = report.phases
        row[_HEAD : _HEAD + tallies.size] = tallies.ravel()
        return row

    def row_of_squares(self, squares: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """This worker's squared block norms as a row; valid until the next call."""
        self._squares[: len(squares)] = squares
        return self._squares

    def read(self, rows: npt.NDArray[np.float64]) -> Verdict:
        """The verdict of all rows, in order of rank, as far as it doesn't depend on the gradient."""
        # Python's numbers: there are few of them, and numpy takes its time for each call.
        every = rows.tolist()
        values = {node: every[rank][at : at + TALLIES] for node, rank, at in self._places}
        weight, loss, count = summed(values, self._additions, self._goal)
        scale = 1 / weight if weight > 0 else math.nan
        return Verdict(
            weight=weight,
            loss=loss,
            rows=count,
            norm=None,
            scale=scale,
            finite=math.isfinite(loss) and math.isfinite(scale),
            signal=int(max(row[SIGNAL] for row in every)),
            failures=tuple((rank, int(row[FAILURE])) for rank, row in enumerate(every) if row[FAILURE]),
            compute=tuple([row[COMPUTE] for row in every]),
            wait=tuple([row[WAIT] for row in every]),
            phases=rows[:, _PHASES].copy(),
        )

    def clipped(self, verdict: Verdict, rows: npt.NDArray[np.float64]) -> Verdict:
        """The verdict with the norm of the mean gradient, from all rows of squares in order of rank."""
        square = 0.0
        for rank, blocks in enumerate(self.squares):
            for value in rows[rank, :blocks].tolist():
                square += value
        norm = math.sqrt(square) / verdict.weight if square >= 0 else math.nan
        scale = verdict.scale * (self.clip_norm / norm) if norm > self.clip_norm else verdict.scale
        return verdict._replace(norm=norm, scale=scale, finite=verdict.finite and math.isfinite(square))
