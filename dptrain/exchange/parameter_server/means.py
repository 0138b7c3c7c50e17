"""What one process computes with: its shards of a step, its blocks of an evaluation."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from dptrain.data.batches import Loaded, Reader
from dptrain.layout import Array
from dptrain.nn.accumulate import Accumulator, Partials, Residuals, Schedule
from dptrain.nn.evaluate import Evaluator, Rows
from dptrain.phases import Phases


@dataclass
class Means:
    """``parts`` are those that can be evaluated, by their names."""

    accumulator: Accumulator
    evaluator: Evaluator
    reader: Reader
    parts: Mapping[str, Rows]
    _schedules: dict[tuple[int, int], Schedule] = field(default_factory=dict)

    def tell(self, phases: Phases) -> None:
        """Let ``phases`` know where time goes from now on."""
        self.accumulator.phases = self.evaluator.phases = phases

    def partials(
        self, weights: Array, outbox: Array, step: int, lo: int, hi: int, kept: Residuals | None = None
    ) -> Partials:
        """The partials of shards lo to hi at this step, in the first rows of the outbox; ``kept`` are all residuals."""
        k = self.accumulator.at_once
        plan = self._schedules.get((lo, hi))
        if plan is None:
            plan = self._schedules[lo, hi] = self.accumulator.schedule(lo, hi)

        def load(start: int, stop: int) -> Loaded:
            # Whoever has these shards now will probably have them at the next step.
            then = (step, stop, min(hi, stop + k)) if stop < hi else (step + 1, lo, min(hi, lo + k))
            return self.reader.load(step, start, stop, then)

        with np.errstate(all="ignore"):
            return self.accumulator.accumulate(weights, plan, outbox, step, load, kept)

    def evaluate(self, weights: Array, part: str, lo: int, hi: int) -> npt.NDArray[np.float64]:
        """The sums of blocks lo to hi of a part, (hi - lo, width)."""
        with np.errstate(all="ignore"):
            return self.evaluator.sums(weights, self.parts[part], lo, hi)
