"""Rounding that is compiled gives numpy's bits; only where numba is installed, as in CI's environment for it."""

from pathlib import Path

import numpy as np
import pytest

from dptrain.gradients import Rounded, declared
from dptrain.training import run
from tests.exchange.jobs import job

pytest.importorskip("numba", reason="the extra `compiled` is not installed")


@pytest.mark.parametrize("n", [0, 1, 7, 10_001, 70_000])
def test_every_pattern_becomes_what_numpy_makes_of_it(n: int) -> None:
    plain, compiled = declared("bfloat16", 0.0), declared("bfloat16", 0.0, compiled=True)
    for seed in range(20):
        some = np.random.default_rng(seed).integers(0, 1 << 32, n, np.uint32)
        some[::3] |= 0x7F800000  # infinite, or not a number
        some[1::3] = some[1::3] & 0xFFFF0000 | 0x8000  # between two neighbours
        ours, theirs = some.copy().view(np.float32), some.copy().view(np.float32)
        with np.errstate(all="ignore"):
            plain.round(theirs)
        compiled.apart().round(ours)
        assert ours.tobytes() == theirs.tobytes()


def test_float16_stays_numpy_s() -> None:
    some = np.random.default_rng(1).standard_normal(1_000).astype(np.float32)
    ours = some.copy()
    Rounded("float16", compiled=True).round(ours)
    assert ours.tobytes() == some.astype(np.float16).astype(np.float32).tobytes()


def test_a_whole_run_has_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dptrain import rounding

    monkeypatch.setattr("dptrain.optim.optimizer.COMPILED_FROM", 1)
    rounded: list[int] = []
    to_bfloat16 = rounding.to_bfloat16
    monkeypatch.setattr(rounding, "to_bfloat16", lambda some: rounded.append(len(some)) or to_bfloat16(some))
    hashes = []
    for compiled in ("never", "auto"):
        assert not rounded
        arithmetic = {"compiled": compiled, "gradients": "bfloat16"}
        hashes.append(run(job("mlp", 4, arithmetic=arithmetic), run_dir=tmp_path / compiled).weights_sha256)
    assert rounded
    assert hashes[0] == hashes[1]
