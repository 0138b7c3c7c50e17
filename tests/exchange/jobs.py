"""The jobs that every exchange must train to solo's bits, and the groups of workers that do it."""

from dataclasses import replace
from typing import Any

from dptrain.job.load import check, complete
from dptrain.job.spec import Job

SHARDS = (1, 6, 8, 12)

ROUNDS = ((8,), (7, 1), (5, 3), (4, 2, 2))
"""How eight ranks split into groups, so that one launch sees every number of workers."""

MACHINES = (((2, 2), 0), ((3, 1), 0), ((2, 2, 1), 1), ((4, 4), 0), ((4, 3, 1), 5))
"""Workers of each machine, and coordinators (0: all): as many lanes here as there, more, fewer, a lone worker."""

# 1,259 training rows are no multiple of 100, and 100 none of 6, 8 or 12 shards. Its 166,000 parameters are cut into
# eleven blocks, so that each of eight coordinators has a segment of its own.
MLP: dict[str, Any] = {
    "name": "mlp",
    "seed": 3,
    "data": {"source": "digits", "validation": 0.1, "test": 0.2},
    "model": {
        "layers": [
            {"type": "linear", "units": 512},
            {"type": "relu"},
            {"type": "dropout", "rate": 0.3},
            {"type": "linear", "units": 256},
            {"type": "tanh"},
            {"type": "linear", "units": 10},
        ]
    },
    "optimizer": {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-3, "schedule": {"type": "cosine"}},
    "train": {"batch_size": 100, "steps": 15, "evaluate_steps": 5, "result": "best"},
}

# A batch of 13 leaves one of 6 shards, one of 8 and five of 12 nothing but padding.
CNN: dict[str, Any] = {
    "name": "cnn",
    "seed": 4,
    "data": {
        "source": "synthetic",
        "synthetic": {"rows": 131, "shape": [8, 8, 1], "classes": 3},
        "validation": 0.2,
        "test": 0.1,
    },
    "model": {
        "layers": [
            {"type": "conv2d", "channels": 6, "padding": "same", "bias": False},
            {"type": "batch_norm"},
            {"type": "relu"},
            {"type": "max_pool2d"},
            {"type": "conv2d", "channels": 8, "kernel": 3},
            {"type": "gelu"},
            {"type": "flatten"},
            {"type": "linear", "units": 3},
        ]
    },
    "optimizer": {"type": "adam", "lr": 0.01, "clip_norm": 0.3},
    "train": {"batch_size": 13, "epochs": 2},
}

JOBS = {"mlp": MLP, "cnn": CNN}

DECLARED = (
    ("mlp", 8, "bfloat16"),
    ("cnn", 6, "bfloat16"),
    ("mlp", 12, "float16"),
    ("mlp", 6, "top_k"),
    ("cnn", 8, "top_k"),
)
"""Jobs, numbers of shards, and arithmetics of gradients other than the job's dtype."""


def job(name: str, shards: int, **changes: dict[str, Any]) -> Job:
    """One of the jobs with so many shards; ``changes`` are merged into its sections."""
    content = {key: dict(value) if isinstance(value, dict) else value for key, value in JOBS[name].items()}
    for section, values in changes.items():
        content[section] = {**content.get(section, {}), **values} if isinstance(values, dict) else values
    content["train"] = {**content["train"], "shards": shards}
    loaded = complete(check(content, name))
    return replace(loaded, output=replace(loaded.output, checkpoint_seconds=0.0))


def coordinators(size: int, shards: int) -> int:
    """Not always all: groups of one round also try one coordinator, and one less than all."""
    return {1: 0, 2: 1, 3: 2, 4: 3, 5: 1, 7: 6, 8: 0 if shards != 8 else 1}[size]
