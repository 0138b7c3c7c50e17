"""The jobs that faults happen to: small, with every phase in them, and long enough to be hit."""

import random
from dataclasses import dataclass

STEPS = 1200


@dataclass(frozen=True)
class FaultJob:
    """A job's name and its file."""

    name: str
    text: str
    steps: int = STEPS

    def of(self, steps: int) -> "FaultJob":
        """The same job, so many steps long."""
        return FaultJob(self.name, self.text.replace(f"\nsteps = {self.steps}\n", f"\nsteps = {steps}\n"), steps)


def _text(name: str, layers: str, shards: int, more: str = "") -> str:
    return f"""
name = "{name}"
seed = 11

[data]
source = "synthetic"
synthetic = {{ rows = 2000, shape = [64], classes = 5 }}
validation = 0.1
test = 0.1

[model]
layers = {layers}

[optimizer]
type = "sgd"
lr = 0.05
momentum = 0.9
{more}

[train]
batch_size = 120
shards = {shards}
steps = {STEPS}
evaluate_steps = 8
result = "best"

[output]
journal_steps = 1
checkpoint_steps = 10
checkpoint_seconds = 0
"""


_MLP = '[{ type = "linear", units = 200 }, { type = "relu" }, { type = "linear", units = 5 }]'
_DROPOUT = (
    '[{ type = "linear", units = 150 }, { type = "batch_norm" }, { type = "relu" }, { type = "dropout", rate = 0.2 }, '
    '{ type = "linear", units = 5 }]'
)

JOBS = (
    FaultJob("mlp", _text("mlp", _MLP, 8)),
    FaultJob("dropout", _text("dropout", _DROPOUT, 6)),
    FaultJob("clipped", _text("clipped", _MLP, 5, "clip_norm = 0.5")),
)


def choose(rng: random.Random) -> FaultJob:
    """One of them."""
    return rng.choice(JOBS)
