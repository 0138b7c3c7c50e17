import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dptrain.assemble import Assembly, assemble
from dptrain.data.prepare import prepare
from dptrain.fingerprint import NOT_REPEATABLE, Probe, probe
from dptrain.job.load import check, complete
from tests.softmax import LAYERS, Batched, Merging, MergingMany, Noisy, Softmax, job

ROOT = Path(__file__).resolve().parent.parent


def assembled(model: Any = None, **sections: Any) -> Assembly:
    content = job(*([] if model else [LAYERS]), **sections)
    it = complete(check(content, "x"), own_model=model is not None)
    return assemble(it, prepare(it.data, directory=Path(), seed=it.seed, cache=None), model)


def probed(a: Assembly, *, at_once: int = 2, shards: int = 2) -> Probe:
    weights = np.zeros(a.model.layout.size, a.dtype)
    a.model.initialise(weights, a.job.seed)
    accumulator = a.accumulator(at_once)
    found = probe(accumulator, a.evaluator(), a.update(10), weights, a.sample, a.rows_per_shard, shards)
    assert accumulator.shards_computed == 0
    return found


def test_equal_jobs_have_equal_fingerprints() -> None:
    first = probed(assembled())
    assert first == probed(assembled()) == probed(assembled(), at_once=1)
    assert first.together
    assert first.repeatable
    assert first.fingerprint.startswith("sha256:")


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 4},
        {"optimizer": {"lr": 0.25}},
        {"optimizer": {"type": "adam"}},
        {"train": {"batch_size": 65}},
        {"train": {"dtype": "float64"}},
        {"loss": {"label_smoothing": 0.1}},
    ],
    ids=str,
)
def test_what_is_computed_decides_the_fingerprint(change: dict[str, Any]) -> None:
    assert probed(assembled(**change)).fingerprint != probed(assembled()).fingerprint


def test_how_the_work_is_spread_does_not() -> None:
    a = assembled()
    other = replace(a, job=replace(a.job, exchange=replace(a.job.exchange, coordinators=1), name="x"))
    assert probed(other) == probed(a)


@pytest.mark.parametrize(
    ("model", "together", "repeatable"),
    [(Softmax(), True, True), (Batched(), True, True), (Merging(), False, True), (Noisy(), False, False)],
    ids=lambda value: type(value).__name__,
)
def test_models_of_ones_own_are_found_out(model: Any, together: bool, repeatable: bool) -> None:
    found = probed(assembled(model))
    assert (found.together, found.repeatable) == (together, repeatable)
    assert (found.fingerprint == NOT_REPEATABLE) == (not repeatable)


def test_more_shards_at_once_are_probed_as_they_will_run() -> None:
    a = assembled(MergingMany())
    assert a.unproved
    assert probed(a).together
    assert not probed(a, shards=5).together
    assert not assembled().unproved
    assert not assembled(Softmax()).unproved


KERNEL = """
from tests.test_fingerprint import assembled, probed
print(probed(assembled()).fingerprint)
"""


def test_another_kernel_has_another_fingerprint() -> None:
    def fingerprint(**environ: str) -> str:
        full = {**os.environ, "PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1", **environ}
        return subprocess.run(
            [sys.executable, "-c", KERNEL], capture_output=True, text=True, check=True, env=full, cwd=ROOT, timeout=60
        ).stdout

    kernels = [fingerprint(OPENBLAS_CORETYPE=name) for name in ("Haswell", "Prescott")]
    assert all(found.startswith("sha256:") for found in kernels)
    assert kernels[0] != kernels[1]
    assert fingerprint(OPENBLAS_CORETYPE="Haswell") == kernels[0]
