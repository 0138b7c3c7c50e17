"""Loss and metrics over a part, exact and unpadded, with the same bits whoever computes which block.

The part is cut into blocks of a fixed number of rows (the last may be shorter). A block's sums depend on the block
alone; whoever has the sums of all blocks adds them in their order.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from dptrain.nn.accumulate import Loss
from dptrain.nn.layer import Array, Model, Pass, Workspace
from dptrain.phases import Phase, Phases


class Metric(Protocol):
    """A figure that is made of sums."""

    name: str
    width: int

    def sums(self, z: Array, target: Array, rows: Array) -> npt.NDArray[np.float64]:
        """(k, width) sums over the rows of each block."""

    def value(self, sums: npt.NDArray[np.float64]) -> float:
        """The figure of added-up sums, (width,)."""


class Rows(Protocol):
    """A part of the data that can be read row by row."""

    @property
    def rows(self) -> int:
        """How many there are."""

    def read(self, positions: npt.NDArray[np.int64], x: Array, y: Array) -> None:
        """Fill the first rows of x and y."""


class Evaluator:
    """Computes blocks of ``rows`` rows, ``at_once`` of them at a time.

    ``sample`` and ``target`` are the shape and dtype of a row; ``decode`` turns scaled targets back into their unit
    before the metrics look at them.
    """

    def __init__(
        self,
        model: Model,
        loss: Loss,
        metrics: Sequence[Metric],
        *,
        sample: tuple[tuple[int, ...], npt.DTypeLike],
        target: tuple[tuple[int, ...], npt.DTypeLike],
        dtype: npt.DTypeLike,
        rows: int,
        at_once: int = 4,
        decode: Callable[[Array], Array] | None = None,
    ) -> None:
        self.model, self.loss, self.metrics = model, loss, metrics
        self.sample, self.target, self.dtype = sample, target, dtype
        self.rows = rows
        self.at_once = at_once
        self.decode = decode
        self.workspace = Workspace()
        self.phases = Phases()
        self.width = 3 + sum(metric.width for metric in metrics)

    def blocks(self, part: Rows) -> int:
        """The number of blocks of a part."""
        return -(-part.rows // self.rows)

    def sums(self, weights: Array, part: Rows, lo: int, hi: int) -> npt.NDArray[np.float64]:
        """The sums of blocks lo to hi: (hi - lo, width) with loss weight, loss, rows, and the metrics' sums."""
        found = np.empty((hi - lo, self.width))
        tensors = self.model.layout.views(weights)
        full = part.rows // self.rows
        at = lo
        while at < hi:
            k = min(self.at_once, full - at, hi - at) if at < full else 1
            rows = self.rows if at < full else part.rows - full * self.rows
            found[at - lo : at - lo + k] = self._some(tensors, part, at, k, rows)
            at += k
        return found

    def _some(self, tensors: Mapping[str, Array], part: Rows, at: int, k: int, rows: int) -> Any:
        space = self.workspace
        x = space.array("x", (k * rows, *self.sample[0]), self.sample[1])
        y = space.array("y", (k * rows, *self.target[0]), self.target[1])
        start = at * self.rows
        self.phases.begin(Phase.EVALUATION, "data")
        part.read(np.arange(start, start + k * rows), x, y)
        ones = space.array("rows", (k, rows), self.dtype)
        ones.fill(1)
        run = Pass(
            training=False,
            seed=0,
            step=0,
            shards=range(at, at + k),
            rows=ones,
            counts=[rows] * k,
            workspace=space,
            phases=self.phases,
        )
        self.phases.begin(Phase.EVALUATION)
        z, _ = self.model.forward(tensors, x.reshape(k, rows, *self.sample[0]), run)
        self.phases.begin(Phase.EVALUATION, "loss and metrics")
        target = y.reshape(k, rows, *self.target[0])
        sums = self.loss(z, target, ones, space, "loss", gradient=False)
        if self.decode is not None:
            z, target = self.decode(z), self.decode(target)
        figures = [metric.sums(z, target, ones) for metric in self.metrics]
        counted = np.full(k, float(rows))
        return np.column_stack([sums.weight, sums.loss, counted, *figures])

    def report(self, sums: npt.NDArray[np.float64]) -> dict[str, float]:
        """``loss`` and the metrics from the sums of all blocks, added in their order."""
        total = np.zeros(self.width)
        for row in sums:
            total += row
        figures = {"loss": float(total[1] / total[0]) if total[0] else float("nan")}
        at = 3
        for metric in self.metrics:
            figures[metric.name] = metric.value(total[at : at + metric.width])
            at += metric.width
        return figures
