import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dptrain.errors import JobError
from dptrain.job import spec
from dptrain.nn.layer import Workspace
from dptrain.nn.loss import make_loss
from dptrain.random import Purpose, stream

from .passes import difference

OFTEN = settings(max_examples=60, deadline=None, derandomize=True)
WEIGHTS = (0.5, 2.0, 1.0, 3.0)
CASES = {
    "cross_entropy": (spec.Loss(), "classes"),
    "smoothed": (spec.Loss(label_smoothing=0.2), "classes"),
    "weighted": (spec.Loss(class_weights=WEIGHTS), "classes"),
    "both": (spec.Loss(label_smoothing=0.2, class_weights=WEIGHTS), "classes"),
    "binary": (spec.Loss(type="binary_cross_entropy"), "numbers"),
    "mse": (spec.Loss(), "numbers"),
    "huber": (spec.Loss(type="huber", delta=0.7), "numbers"),
}


def made(case, rng, k, b, width, dtype=np.float64):
    config, kind = CASES[case]
    width = 4 if kind == "classes" else width
    z = (rng.standard_normal((k, b, width)) * 2).astype(dtype)
    if kind == "classes":
        target = rng.integers(0, 4, (k, b))
    else:
        target = rng.standard_normal((k, b, width)).astype(dtype)
        if case == "binary":
            target = (target > 0).astype(dtype)
    return make_loss(config, kind, 4, width), z, target


def row_loss(case, z, target):
    """(loss, weight) of one row, in Python floats, straight from the definition."""
    config, kind = CASES[case]
    if kind == "classes":
        total = math.fsum(math.exp(v) for v in z)
        log_p = [v - math.log(total) for v in z]
        w = config.class_weights or (1.0,) * len(z)
        smooth = config.label_smoothing
        share = [smooth / len(z) + (1 - smooth) * (c == target) for c in range(len(z))]
        return -math.fsum(w[c] * share[c] * log_p[c] for c in range(len(z))), w[target]
    terms = []
    for v, t in zip(z, target, strict=True):
        d = abs(v - t)
        if case == "mse":
            terms.append(d * d)
        elif case == "huber":
            terms.append(d * d / 2 if d <= 0.7 else 0.7 * (d - 0.35))
        else:
            p = 1 / (1 + math.exp(-v))
            terms.append(-t * math.log(p) - (1 - t) * math.log(1 - p))
    return math.fsum(terms) / len(terms), 1.0


@pytest.mark.parametrize("case", CASES)
@OFTEN
@given(seed=st.integers(0, 2**32), k=st.sampled_from([1, 2, 3, 8]), b=st.integers(1, 6), width=st.integers(1, 3))
def test_losses_are_the_sums_of_their_definition(case, seed, k, b, width):
    rng = stream(seed, Purpose.PROBE)
    loss, z, target = made(case, rng, k, b, width)
    rows = (rng.random((k, b)) < 0.7).astype(np.float64)
    sums = loss(z, target, rows, Workspace(), "loss")
    for j in range(k):
        real = [row_loss(case, z[j, i].tolist(), target[j, i].tolist()) for i in range(b) if rows[j, i]]
        assert sums.loss[j] == pytest.approx(math.fsum(value for value, _ in real), rel=1e-10, abs=1e-12)
        assert sums.weight[j] == pytest.approx(math.fsum(weight for _, weight in real), rel=1e-12)
    assert loss(z, target, rows, Workspace(), "loss", gradient=False).dz is None


@pytest.mark.parametrize("case", CASES)
@OFTEN
@given(seed=st.integers(0, 2**32), b=st.integers(1, 5), width=st.integers(1, 3))
def test_gradients_are_those_of_finite_differences(case, seed, b, width):
    rng = stream(seed, Purpose.PROBE)
    loss, z, target = made(case, rng, 2, b, width)
    rows = np.ones((2, b))
    rows[1, -1] = 0
    dz = loss(z, target, rows, Workspace(), "loss").dz.copy()
    assert not dz[1, -1].any()
    u, expected = difference(lambda v: loss(v, target, rows, Workspace(), "loss").loss.sum(), z, rng)
    assert (dz * u).sum() == pytest.approx(expected, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("case", CASES)
@OFTEN
@given(
    seed=st.integers(0, 2**32),
    k=st.sampled_from([2, 3, 8]),
    b=st.sampled_from([1, 2, 7, 127, 1100]),
    width=st.integers(1, 3),
)
def test_together_and_one_by_one_give_the_same_bytes(case, seed, k, b, width):
    rng = stream(seed, Purpose.PROBE)
    loss, z, target = made(case, rng, k, b, width, np.float32)
    rows = np.ones((k, b), np.float32)
    rows[0, b // 2 :] = 0
    workspace = Workspace()
    together = loss(z, target, rows, workspace, "together")
    for j in range(k):
        part = slice(j, j + 1)
        one = loss(z[part], target[part], rows[part], workspace, "one")
        assert one.loss.tobytes() == together.loss[part].tobytes()
        assert one.weight.tobytes() == together.weight[part].tobytes()
        assert one.dz.tobytes() == together.dz[part].tobytes()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("filler", [np.nan, np.inf, 1e38])
def test_whatever_a_padded_row_holds_counts_for_nothing(case, filler):
    rng = stream(5, Purpose.PROBE)
    loss, z, target = made(case, rng, 2, 3, 2, np.float32)
    rows = np.array([[1, 1, 0], [0, 0, 0]], np.float32)
    clean = loss(z, target, rows, Workspace(), "loss")
    z[rows == 0] = filler
    target[rows == 0] = filler if target.dtype.kind == "f" else 99
    dirty = loss(z, target, rows, Workspace(), "loss")
    assert dirty.dz.tobytes() == clean.dz.tobytes()
    assert dirty.loss.tobytes() == clean.loss.tobytes()
    assert dirty.weight.tobytes() == clean.weight.tobytes()
    assert not dirty.dz[rows == 0].any()
    assert dirty.loss[1] == 0
    assert dirty.weight[1] == 0


@pytest.mark.parametrize("case", ["cross_entropy", "both", "binary"])
def test_large_outputs_stay_finite(case):
    loss, z, target = made(case, stream(6, Purpose.PROBE), 1, 4, 2, np.float32)
    z[0] *= 1e4
    sums = loss(z, target, np.ones((1, 4), np.float32), Workspace(), "loss")
    assert np.isfinite(sums.loss).all()
    assert np.isfinite(sums.dz).all()


def test_a_tiny_loss_is_not_rounded_away():
    loss = make_loss(spec.Loss(type="binary_cross_entropy"), "classes", 2, 1)
    z = np.full((1, 1, 1), 40.0)
    sums = loss(z, np.ones((1, 1), np.int64), np.ones((1, 1)), Workspace(), "loss")
    assert sums.loss[0] == pytest.approx(math.exp(-40), rel=1e-12)


def test_the_output_is_left_alone():
    for case in CASES:
        loss, z, target = made(case, stream(7, Purpose.PROBE), 2, 3, 2)
        z.flags.writeable = target.flags.writeable = False
        loss(z, target, np.ones((2, 3)), Workspace(), "loss")


@pytest.mark.parametrize(
    ("config", "kind", "message"),
    [
        (spec.Loss(type="cross_entropy"), "numbers", "expected labels that are classes"),
        (spec.Loss(type="mse"), "classes", "expected labels that are numbers, found 4 classes"),
        (spec.Loss(type="huber"), "classes", "expected labels that are numbers"),
        (spec.Loss(type="binary_cross_entropy"), "classes", "expected 2 classes, found 4"),
        (spec.Loss(class_weights=(1.0, 2.0)), "classes", "expected 4 weights, one for each class, found 2"),
        (spec.Loss(class_weights=(1.0, 2.0)), "numbers", "loss.class_weights"),
        (spec.Loss(type="huber", label_smoothing=0.1), "numbers", "loss.label_smoothing"),
    ],
)
def test_a_loss_that_does_not_go_with_the_labels_is_refused(config, kind, message):
    with pytest.raises(JobError, match=message):
        make_loss(config, kind, 4, 1)
