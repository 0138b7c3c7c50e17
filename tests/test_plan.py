import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from dptrain.errors import ModelError
from dptrain.job.load import check, complete, to_toml
from dptrain.launch import command
from dptrain.plan import plan
from tests import mpirun
from tests.softmax import LAYERS, job

ROOT = Path(__file__).resolve().parent.parent

JOBS: dict[str, dict[str, Any]] = {
    "digits": job(LAYERS, train={"steps": 10}),
    # 10 million parameters, of which one tensor has 8 million.
    "mlp": {
        "data": {"source": "synthetic", "synthetic": {"rows": 1200, "shape": [784]}},
        "model": {
            "layers": [
                {"type": "linear", "units": 2048},
                {"type": "relu"},
                {"type": "linear", "units": 4096},
                {"type": "relu"},
                {"type": "linear", "units": 10},
            ]
        },
        "optimizer": {"type": "adam", "lr": 0.001},
        "train": {"batch_size": 64, "steps": 2},
    },
    "cnn": {
        "data": {"source": "synthetic", "synthetic": {"rows": 800, "shape": [28, 28, 1]}},
        "model": {
            "layers": [
                {"type": "conv2d", "channels": 32, "padding": "same"},
                {"type": "batch_norm"},
                {"type": "relu"},
                {"type": "max_pool2d"},
                {"type": "conv2d", "channels": 32, "padding": "same"},
                {"type": "relu"},
                {"type": "max_pool2d"},
                {"type": "flatten"},
                {"type": "linear", "units": 128},
                {"type": "relu"},
                {"type": "linear", "units": 10},
            ]
        },
        "optimizer": {"lr": 0.01, "momentum": 0.9},
        "train": {"batch_size": 64, "steps": 2, "evaluate_rows": 64},
    },
}

PLANNED = """
import sys, json
from dptrain import arithmetic
arithmetic.choose("native", 1)
from dptrain.job.load import load_job
from dptrain.plan import plan
print(json.dumps(plan(load_job(__import__("pathlib").Path(sys.argv[1])), workers=int(sys.argv[2])).memory))
"""

TRAINED = """
import sys
from dptrain import arithmetic
arithmetic.choose("native", 1)
import dptrain
dptrain.train(sys.argv[1], run_dir=sys.argv[2])
"""


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("name", JOBS)
def test_memory_is_predicted_within_a_fifth(name: str, workers: int, tmp_path: Path) -> None:
    path = tmp_path / f"{name}.toml"
    path.write_text(to_toml(complete(check(JOBS[name], name))))
    line, environ = command(workers, [], os.environ)
    environ |= {"OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    prefix = line[: line.index(sys.executable)] if workers > 1 else []
    code = [sys.executable, "-c"]
    trained = mpirun.run([*prefix, *code, TRAINED, str(path), str(tmp_path / "run")], environ, 120, tmp_path)
    assert trained.returncode == 0, trained.stderr
    planned = mpirun.run([*code, PLANNED, str(path), str(workers)], environ, 120, tmp_path)
    assert planned.returncode == 0, planned.stderr
    memory = json.loads(planned.stdout)
    result = json.loads((tmp_path / "run/result.json").read_text())
    measured = max(worker["peak_memory_bytes"] for worker in result["per_worker"])
    assert sum(memory.values()) == pytest.approx(measured, rel=0.2), memory


def test_a_plan_counts_what_the_layers_have() -> None:
    it = complete(check(job(LAYERS), "x"))
    found = plan(it)
    assert found.parameters == 64 * 24 + 24 + 24 * 10 + 10
    assert sum(layer.parameters for layer in found.layers) == found.parameters
    assert [layer.output_shape for layer in found.layers] == [(24,), (24,), (24,), (10,)]
    assert found.train_rows + found.validation_rows + found.test_rows == 1797
    assert (found.shards, found.rows_per_shard, found.total_steps) == (5, 12, 20)
    assert found.memory["state"] == 2 * 2 * 4 * found.parameters
    assert found.memory["snapshot"] == 2 * 4 * found.parameters
    assert found.memory_total == sum(found.memory.values())
    assert found.rows_per_second > 0
    assert found.rows_per_second_one_shard > 0


def test_more_workers_need_less_for_passes_and_more_for_the_exchange() -> None:
    it = complete(check(job(LAYERS, train={"shards": 8}), "x"))
    one, eight = plan(it), plan(it, workers=8)
    assert one.memory["activations"] > eight.memory["activations"]
    assert eight.memory["partials"] == 4 * one.parameters
    assert "exchange" not in one.memory
    assert eight.memory["exchange"] > 4 * one.parameters


def test_a_plan_fails_as_training_would() -> None:
    with pytest.raises(ModelError, match="end the model with a linear layer of 10 units"):
        plan(complete(check(job({"model": {"layers": [{"type": "linear", "units": 9}]}}), "x")))
