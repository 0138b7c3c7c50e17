from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from dptrain.job.spec import BatchNorm, Dropout, Linear, Relu
from dptrain.job.spec import Loss as LossSpec
from dptrain.layout import Array
from dptrain.nn.chain import build_chain
from dptrain.nn.evaluate import Evaluator
from dptrain.nn.loss import make_loss
from dptrain.nn.metrics import make_metrics


class Part:
    """Rows in memory; counts what is read."""

    def __init__(self, rows: int) -> None:
        rng = np.random.default_rng(rows)
        self.rows = rows
        self.x = rng.standard_normal((rows, 6)).astype(np.float32)
        self.y = rng.integers(0, 4, rows)
        self.seen = np.zeros(rows, np.int64)

    def read(self, positions: npt.NDArray[np.int64], x: Array, y: Array) -> None:
        x[: len(positions)] = self.x[positions]
        y[: len(positions)] = self.y[positions]
        self.seen[positions] += 1


def evaluator(at_once: int, rows: int = 8) -> tuple[Evaluator, Array]:
    model = build_chain((Linear(units=9), BatchNorm(), Relu(), Dropout(rate=0.5), Linear(units=4)), (6,))
    weights = np.zeros(model.layout.size, np.float32)
    model.initialise(weights, 2)
    weights += np.float32(0.01) * np.arange(len(weights), dtype=np.float32) % 1
    settings = LossSpec(metrics=("accuracy", "top_k"), top_k=2)
    made: Any = Evaluator(
        model,
        make_loss(settings, "classes", 4, 1),
        make_metrics(settings, "classes", 1),
        sample=((6,), np.float32),
        target=((), np.int64),
        dtype=np.float32,
        rows=rows,
        at_once=at_once,
    )
    return made, weights


@pytest.mark.parametrize("rows", [1, 7, 8, 61, 64])
def test_figures_are_those_of_a_naive_computation(rows: int) -> None:
    made, weights = evaluator(3)
    part = Part(rows)
    figures = made.report(made.sums(weights, part, 0, made.blocks(part)))
    assert part.seen.tolist() == [1] * rows

    t = {name: view.astype(np.float64) for name, view in made.model.layout.views(weights).items()}
    h = part.x.astype(np.float64) @ t["layers.0.linear.W"] + t["layers.0.linear.b"]
    (gain, shift, mean, variance) = (
        next(v for k, v in t.items() if k.startswith("layers.1") and k.endswith(name))
        for name in ("gamma", "beta", "running_mean", "running_var")
    )
    h = np.maximum((h - mean) / np.sqrt(variance + 1e-5) * gain + shift, 0)
    z = h @ t["layers.4.linear.W"] + t["layers.4.linear.b"]
    losses = np.log(np.exp(z).sum(axis=1)) - z[np.arange(rows), part.y]
    order = np.argsort(-z, axis=1)
    assert figures["loss"] == pytest.approx(losses.mean(), rel=1e-5)
    assert figures["accuracy"] == pytest.approx((order[:, 0] == part.y).mean(), abs=1e-12)
    assert figures["top_k"] == pytest.approx((order[:, :2] == part.y[:, None]).any(axis=1).mean(), abs=1e-12)


@pytest.mark.parametrize("rows", [1, 23, 64])
def test_any_split_of_the_blocks_gives_the_same_bytes(rows: int) -> None:
    part = Part(rows)
    truth, weights = evaluator(1)
    total = truth.blocks(part)
    expected = truth.sums(weights, part, 0, total).tobytes()
    for at_once in (1, 2, 4, 8):
        made, _ = evaluator(at_once)
        for cut in range(total + 1):
            parts = [made.sums(weights, part, 0, cut), made.sums(weights, part, cut, total)]
            assert np.concatenate(parts).tobytes() == expected


def test_other_blocks_are_other_sums() -> None:
    """Negative control: the blocks' length is part of the bits, and of the job."""
    part = Part(64)
    (one, weights), (two, _) = evaluator(1, rows=8), evaluator(1, rows=16)
    assert one.sums(weights, part, 0, 8).shape != two.sums(weights, part, 0, 4).shape
    assert one.report(one.sums(weights, part, 0, 8)) == pytest.approx(two.report(two.sums(weights, part, 0, 4)))


def test_no_rows_give_no_figure() -> None:
    made, _ = evaluator(1)
    assert np.isnan(made.report(np.zeros((0, made.width)))["loss"])
