import itertools

import numpy as np
import pytest

from dptrain.job import spec
from dptrain.layout import BLOCK
from dptrain.optim import make_optimizer
from dptrain.optim.optimizer import power
from dptrain.random import Purpose, stream

CASES = {
    "sgd": spec.Optimizer(),
    "decay": spec.Optimizer(weight_decay=0.1),
    "momentum": spec.Optimizer(momentum=0.9),
    "momentum decay": spec.Optimizer(momentum=0.9, weight_decay=0.1),
    "nesterov": spec.Optimizer(momentum=0.9, nesterov=True, weight_decay=0.1),
    "adam": spec.Optimizer(type="adam"),
    "adam decay": spec.Optimizer(type="adam", weight_decay=0.1),
    "adamw": spec.Optimizer(type="adamw", weight_decay=0.1, beta1=0.8, beta2=0.95, eps=1e-4),
}


def formula(config, w, g, state, lr, count):
    """One update of one element in Python floats; ``state`` is changed in place."""
    if config.type == "sgd":
        g += config.weight_decay * w
        if config.momentum:
            state[0] = config.momentum * state[0] + g
            g = g + config.momentum * state[0] if config.nesterov else state[0]
        return w - lr * g
    if config.type == "adamw":
        w *= 1 - lr * config.weight_decay
    else:
        g += config.weight_decay * w
    state[0] = config.beta1 * state[0] + (1 - config.beta1) * g
    state[1] = config.beta2 * state[1] + (1 - config.beta2) * g * g
    m = state[0] / (1 - config.beta1**count)
    v = state[1] / (1 - config.beta2**count)
    return w - lr * m / (v**0.5 + config.eps)


def update(optimizer, w, g, slots, new_w, new_slots, *, scale, lr, count):
    t, u = np.full((2, len(w)), np.nan, w.dtype)
    optimizer.stretch(w, g, slots, new_w, new_slots, optimizer.rates(scale, lr, count), t, u)


def run(config, w, gradients, *, cuts=None, scale=0.25):
    optimizer = make_optimizer(config)
    sides = [(np.full_like(w, np.nan), [np.full_like(w, np.nan) for _ in optimizer.slots]) for _ in range(2)]
    sides[0][0][:] = w
    for slot in sides[0][1]:
        slot[:] = 0
    for count, g in enumerate(gradients, 1):
        (old, slots), (new, new_slots) = sides
        for lo, hi in cuts or [(0, len(w))]:
            part = slice(lo, hi)
            update(
                optimizer,
                old[part],
                g[part],
                [s[part] for s in slots],
                new[part],
                [s[part] for s in new_slots],
                scale=scale,
                lr=0.1 / count,
                count=count,
            )
        sides.reverse()
    return sides[0]


@pytest.mark.parametrize("name", CASES)
def test_updates_follow_the_formula(name):
    config = CASES[name]
    rng = stream(1, Purpose.PROBE)
    w = rng.standard_normal(7)
    gradients = rng.standard_normal((5, 7))
    found, slots = run(config, w, gradients)
    for i in range(7):
        value, state = float(w[i]), [0.0, 0.0]
        for count, g in enumerate(gradients, 1):
            value = formula(config, value, float(g[i]) * 0.25, state, 0.1 / count, count)
        assert found[i] == pytest.approx(value, rel=1e-12)
        for slot, expected in zip(slots, state, strict=False):
            assert slot[i] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_the_cut_of_the_vector_is_not_part_of_the_bits(name):
    size = 3 * BLOCK + 1_237
    rng = stream(2, Purpose.PROBE)
    w = rng.standard_normal(size).astype(np.float32)
    gradients = rng.standard_normal((3, size)).astype(np.float32)
    whole, slots = run(CASES[name], w, gradients)
    for edges in ([0, BLOCK, size], [0, 2 * BLOCK, 3 * BLOCK, size], [0, 0, 3 * BLOCK, size]):
        cuts = list(itertools.pairwise(edges))
        cut, cut_slots = run(CASES[name], w, gradients, cuts=cuts)
        assert cut.tobytes() == whole.tobytes()
        assert [s.tobytes() for s in cut_slots] == [s.tobytes() for s in slots]
    other, _ = run(CASES[name], w, gradients, scale=0.26)
    assert other.tobytes() != whole.tobytes()


@pytest.mark.parametrize("name", CASES)
def test_the_old_state_is_only_read(name):
    optimizer = make_optimizer(CASES[name])
    old = [np.ones(5, np.float32) for _ in range(2 + len(optimizer.slots))]
    for array in old:
        array.flags.writeable = False
    new = [np.zeros(5, np.float32) for _ in range(1 + len(optimizer.slots))]
    update(optimizer, old[0], old[1], old[2:], new[0], new[1:], scale=0.5, lr=0.1, count=1)
    assert all(array.all() for array in new)


def test_an_optimizer_serves_both_precisions():
    optimizer = make_optimizer(CASES["adam"])
    for dtype in (np.float32, np.float64, np.float32):
        w, m, v = np.ones((3, 4), dtype)
        new = np.zeros((3, 4), dtype)
        update(optimizer, w, w, [m, v], new[0], new[1:], scale=1.0, lr=0.1, count=1)
        assert new.all()


def test_powers_are_products():
    assert power(0.5, 10) == 0.5**10
    assert power(0.9, 0) == 1
    assert power(0.999, 12_345) == pytest.approx(0.999**12_345, rel=1e-11)
