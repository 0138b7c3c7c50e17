import math

import numpy as np
import pytest

from dptrain.errors import JobError
from dptrain.job import spec
from dptrain.nn.metrics import R2, Accuracy, MeanAbsoluteError, TopK, make_metrics
from dptrain.random import Purpose, stream


def figure(metric, z, target, rows):
    sums = metric.sums(z, target, rows)
    assert sums.shape == (len(z), metric.width)
    assert sums.dtype == np.float64
    return metric.value(sums.sum(axis=0))


def made(classes=True, outputs=5, k=3, b=40):
    rng = stream(1, Purpose.PROBE)
    z = rng.standard_normal((k, b, outputs)).astype(np.float32)
    target = rng.integers(0, outputs, (k, b)) if classes else (z + 0.3 * rng.standard_normal(z.shape) + 7)
    rows = (rng.random((k, b)) < 0.8).astype(np.float32)
    return z, target, rows


def test_accuracy_and_top_k_count_rows():
    z, target, rows = made()
    order = np.argsort(-z, axis=-1)
    for k in (1, 2, 5):
        right = (order[..., :k] == target[..., None]).any(axis=-1)
        assert figure(TopK(k), z, target, rows) == pytest.approx(right[rows == 1].mean(), abs=0)
    assert figure(Accuracy(), z, target, rows) == figure(TopK(1), z, target, rows)
    assert 0 < figure(Accuracy(), z, target, rows) < 1


def test_equal_and_missing_outputs():
    rows = np.ones((1, 1))
    for target, first in ((0, 1.0), (1, 0.0)):
        for metric in (Accuracy(), TopK(1)):
            assert figure(metric, np.zeros((1, 1, 3)), np.array([[target]]), rows) == first
    assert figure(TopK(3), np.full((1, 1, 3), np.nan), np.array([[0]]), rows) == 0


def test_binary_accuracy_asks_for_the_sign():
    z = np.array([[[2.0], [-1.0], [3.0], [-4.0]]])
    assert figure(Accuracy(), z, np.array([[1, 0, 0, 0]]), np.ones((1, 4))) == 0.75
    assert figure(Accuracy(), z, np.array([[[1.0], [0], [1], [1]]]), np.ones((1, 4))) == 0.75


def test_errors_of_numbers():
    z, target, rows = made(classes=False, outputs=3)
    real = rows == 1
    y, e = target[real], z[real].astype(np.float64) - target[real]
    expected = np.mean(1 - (e**2).sum(axis=0) / ((y - y.mean(axis=0)) ** 2).sum(axis=0))
    assert figure(MeanAbsoluteError(), z, target, rows) == pytest.approx(np.abs(e).mean(), rel=1e-12)
    assert figure(R2(3), z, target, rows) == pytest.approx(expected, rel=1e-10)
    assert figure(R2(3), target, target, rows) == 1
    mean = np.broadcast_to(y.mean(axis=0), target.shape)
    assert figure(R2(3), mean, target, rows) == pytest.approx(0, abs=1e-12)


def test_a_target_that_never_changes():
    y = np.full((1, 3, 1), 0.1)
    assert figure(R2(1), y, y, np.ones((1, 3))) == 1
    assert figure(R2(1), y + 1, y, np.ones((1, 3))) == 0


@pytest.mark.parametrize("metric", [Accuracy(), TopK(2), MeanAbsoluteError(), R2(5)], ids=lambda m: m.name)
def test_padding_counts_for_nothing_and_shards_do_not_meet(metric):
    z, target, rows = made(classes=metric.name in ("accuracy", "top_k"))
    clean = metric.sums(z, target, rows)
    z[rows == 0] = np.nan
    target[rows == 0] = 99
    assert metric.sums(z, target, rows).tobytes() == clean.tobytes()
    for j in range(len(z)):
        part = slice(j, j + 1)
        assert metric.sums(z[part], target[part], rows[part]).tobytes() == clean[part].tobytes()
    assert math.isnan(metric.value(np.zeros(metric.width)))


def test_each_loss_has_its_usual_metrics():
    assert [m.name for m in make_metrics(spec.Loss(), "classes", 1)] == ["accuracy"]
    assert [m.name for m in make_metrics(spec.Loss(), "numbers", 2)] == ["mae", "r2"]
    binary = spec.Loss(type="binary_cross_entropy")
    assert [m.name for m in make_metrics(binary, "numbers", 1)] == ["accuracy"]
    chosen = spec.Loss(metrics=("top_k", "accuracy"), top_k=3)
    assert [m.name for m in make_metrics(chosen, "classes", 1)] == ["top_k", "accuracy"]
    with pytest.raises(JobError, match='expected "mae" or "r2" for labels that are numbers, found "accuracy"'):
        make_metrics(spec.Loss(metrics=("accuracy",)), "numbers", 1)
