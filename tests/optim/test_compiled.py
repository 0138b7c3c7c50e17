"""The compiled updates give the bits of numpy's; only where numba is installed, as in CI's environment for it."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dptrain.job import spec
from dptrain.optim import make_optimizer, worth_compiling
from dptrain.optim.optimizer import COMPILED_FROM, Optimizer
from dptrain.random import Purpose, stream
from dptrain.training import run
from tests.exchange.jobs import job

pytest.importorskip("numba", reason="the extra `compiled` is not installed")

SETTINGS = [
    {"type": "sgd", "momentum": momentum, "nesterov": nesterov and momentum > 0, "weight_decay": decay}
    for momentum, nesterov, decay in itertools.product((0.0, 0.9), (False, True), (0.0, 0.01))
] + [{"type": kind, "weight_decay": decay} for kind in ("adam", "adamw") for decay in (0.0, 0.01)]


def updated(optimizer: Optimizer, numbers: Any, steps: int) -> bytes:
    w, g, *old = (vector.copy() for vector in numbers[: 2 + len(optimizer.slots)])
    t, u = np.empty((2, len(w)), w.dtype)
    for count in range(1, steps + 1):
        new_w, new = np.empty_like(w), [np.empty_like(slot) for slot in old]
        optimizer.stretch(w, g, old, new_w, new, optimizer.rates(1 / 48, 0.1 / count, count), t, u)
        w, old = new_w, new
    return b"".join(vector.tobytes() for vector in (w, *old))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_the_bits_are_those_of_numpy(settings: dict[str, Any], dtype: type) -> None:
    config = spec.Optimizer(**settings)
    compiled = make_optimizer(config, compiled=True)
    plain = make_optimizer(config)
    assert type(compiled) is not type(plain)
    rng = stream(7, Purpose.PROBE)
    for size in (1, 7, 64, 10_001):
        numbers = rng.standard_normal((4, size)).astype(dtype) * 10.0 ** rng.integers(-30, 8, (4, size)).astype(dtype)
        numbers[3] = np.abs(numbers[3])
        numbers[:, ::13] = 0
        numbers[1, ::17] *= -1
        with np.errstate(all="ignore"):
            assert updated(compiled, numbers, 3) == updated(plain, numbers, 3)


def test_a_small_model_is_not_worth_loading_numba() -> None:
    assert worth_compiling("auto", COMPILED_FROM)
    assert not worth_compiling("auto", COMPILED_FROM - 1)
    assert not worth_compiling("never", COMPILED_FROM)


def test_a_whole_run_has_the_same_weights(tmp_path: Path) -> None:
    results = {
        compiled: run(job("mlp", 4, arithmetic={"compiled": compiled}), run_dir=tmp_path / compiled)
        for compiled in ("auto", "never")
    }
    assert results["auto"].weights_sha256 == results["never"].weights_sha256
    assert results["auto"].job_sha256 == results["never"].job_sha256
