"""How the learning rate moves."""

import math
from dataclasses import dataclass
from typing import Literal

from dptrain.job import spec
from dptrain.optim.optimizer import power


@dataclass(frozen=True, slots=True)
class Schedule:
    """The rate of update number ``count``, from 1.

    During the first ``warmup_steps`` it rises linearly to ``lr``, which the last of them has. From there, with u
    updates since: constant; lr gamma^(u // step_size); or minimum + (lr - minimum) (1 + cos(pi u / decay_steps)) / 2
    (Loshchilov and Hutter, "SGDR", 2017), ``minimum`` from u = decay_steps on.
    """

    type: Literal["constant", "step", "cosine"]
    lr: float
    warmup_steps: int
    step_size: int
    gamma: float
    decay_steps: int
    minimum: float

    def at(self, count: int) -> float:
        """A function of ``count`` alone, and the same float on every machine."""
        if count <= self.warmup_steps:
            return self.lr * count / self.warmup_steps
        since = count - 1 - self.warmup_steps
        if self.type == "step":
            return self.lr * power(self.gamma, since // self.step_size)
        if self.type == "cosine":
            share = min(1.0, since / self.decay_steps)
            rate = self.minimum + (self.lr - self.minimum) * (1 + math.cos(math.pi * share)) / 2
            # C libraries differ in the last bit of a cosine, and a job must not.
            return float(f"{rate:.12g}")
        return self.lr


def make_schedule(settings: spec.Schedule, lr: float, total_steps: int) -> Schedule:
    """The job's schedule over a training of ``total_steps`` updates."""
    decay = settings.decay_steps or max(1, total_steps - settings.warmup_steps)
    return Schedule(
        settings.type,
        lr,
        settings.warmup_steps,
        settings.step_size,
        settings.gamma,
        decay,
        settings.minimum,
    )
