"""When training ends, when it is evaluated, and what an evaluation decides. Pure functions of the state."""

import math
from dataclasses import dataclass, replace

from dptrain.job.spec import Train
from dptrain.state import Judgement, State

LOWER_IS_BETTER = frozenset({"loss", "mae"})


@dataclass(frozen=True)
class Rule:
    """The stopping rule of a job whose epochs have ``steps_per_epoch`` steps."""

    train: Train
    steps_per_epoch: int
    validated: bool

    @property
    def total_steps(self) -> int:
        """Where training ends at the latest."""
        return self.train.steps or self.train.epochs * self.steps_per_epoch

    @property
    def evaluate_every(self) -> int:
        """Steps between evaluations."""
        return self.train.evaluate_steps or self.steps_per_epoch

    def done(self, state: State) -> bool:
        """Whether training is over."""
        return state.step >= self.total_steps or self.reached(state.judgement) != ""

    def evaluates(self, state: State) -> bool:
        """Whether this state is to be evaluated, once.

        The end of training is no reason: a training that is extended later must have made the same evaluations.
        """
        due = state.step % self.evaluate_every == 0
        return self.validated and due and state.step > 0 and state.judgement.evaluated < state.step

    def reached(self, judgement: Judgement) -> str:
        """Why the convergence criterion ends training, or "" while it doesn't."""
        stop = self.train.stop
        if stop.target is not None and judgement.best is not None and not self._better(stop.target, judgement.best):
            return f"{stop.metric} reached {judgement.best:.6g}, target {stop.target:g}"
        if stop.patience and judgement.without_gain >= stop.patience:
            return f"{stop.metric} did not gain {stop.min_delta:g} in {stop.patience} evaluations"
        return ""

    def judge(self, judgement: Judgement, step: int, value: float) -> tuple[Judgement, bool]:
        """The judgement after an evaluation, and whether this state is the best so far."""
        if math.isnan(value):
            return replace(judgement, without_gain=judgement.without_gain + 1, evaluated=step), False
        if judgement.reference is None or self._gain(value, judgement.reference) > self.train.stop.min_delta:
            judgement = replace(judgement, reference=value, without_gain=0)
        else:
            judgement = replace(judgement, without_gain=judgement.without_gain + 1)
        if judgement.best is None or self._better(value, judgement.best):
            return replace(judgement, best=value, best_step=step, evaluated=step), True
        return replace(judgement, evaluated=step), False

    def _better(self, value: float, than: float) -> bool:
        return self._gain(value, than) > 0

    def _gain(self, value: float, than: float) -> float:
        return than - value if self.train.stop.metric in LOWER_IS_BETTER else value - than
