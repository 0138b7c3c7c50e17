import math

import numpy as np
import pytest

from dptrain.job import spec
from dptrain.layout import BLOCK, Array, Layout, segments
from dptrain.optim import make_optimizer, make_schedule
from dptrain.state import State, Store, Update

LAYOUT = Layout([("W", (3 * BLOCK + 7,)), ("b", (5,))], [("mean", (BLOCK,), 0.1), ("variance", (9,), 0.5)])


def update(clip_norm: float = 0.0, **optimizer: object) -> Update:
    settings = spec.Optimizer(**{"lr": 0.1, "momentum": 0.9, **optimizer})  # type: ignore[arg-type]
    return Update(LAYOUT, make_optimizer(settings), make_schedule(settings.schedule, settings.lr, 10), clip_norm)


def start(made: Update, dtype: type = np.float32) -> tuple[State, Store, Array]:
    rng = np.random.default_rng(1)
    store = Store(LAYOUT, len(made.optimizer.slots), dtype)
    store.weights(0)[:] = rng.standard_normal(LAYOUT.size)
    for slot in store.slots(0):
        slot[:] = rng.random(LAYOUT.parameters)
    gradient = rng.standard_normal(LAYOUT.size).astype(dtype)
    return State(4, 3, store.weights(0), store.slots(0), 0), store, gradient


@pytest.mark.parametrize("kind", ["sgd", "adam", "adamw"])
@pytest.mark.parametrize("parts", [1, 2, 3, 5, 9])
def test_where_the_vector_is_cut_does_not_matter(kind: str, parts: int) -> None:
    made = update(type=kind, weight_decay=0.01)
    results = []
    for cuts in ([(0, LAYOUT.size)], segments(LAYOUT.size, parts)):
        state, store, gradient = start(made)
        for lo, hi in reversed(cuts):
            made.apply(state, store, gradient, lo, hi, scale=1 / 30, rows=29.0)
        results.append(b"".join(v.tobytes() for v in (store.weights(1), *store.slots(1))))
    assert results[0] == results[1]


@pytest.mark.parametrize("clip_norm", [0.0, 0.5])
@pytest.mark.parametrize("parts", [1, 2, 4, 7])
def test_squares_are_the_same_whoever_computes_which(clip_norm: float, parts: int) -> None:
    made = update(clip_norm)
    _, _, gradient = start(made)
    whole = made.squares(gradient, 0, LAYOUT.size)
    assert len(whole) == made.blocks
    found = np.concatenate([made.squares(gradient, lo, hi) for lo, hi in segments(LAYOUT.size, parts)])
    assert found.tobytes() == whole.tobytes()
    norm = math.sqrt(sum(whole.tolist()))
    exact = np.linalg.norm(gradient[: LAYOUT.parameters].astype(np.float64)) if clip_norm else 0.0
    assert norm == pytest.approx(exact, rel=1e-12)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("clip_norm", [0.0, 1.0])
@pytest.mark.parametrize("at", [0, BLOCK - 1, BLOCK, LAYOUT.parameters - 1, LAYOUT.parameters, LAYOUT.size - 1])
def test_one_number_that_is_not_finite_is_seen(at: int, clip_norm: float, value: float) -> None:
    made = update(clip_norm)
    _, _, gradient = start(made)
    gradient[at] = value
    lo = at // BLOCK * BLOCK
    assert not np.isfinite(made.squares(gradient, 0, LAYOUT.size).sum())
    assert not np.isfinite(made.squares(gradient, lo, min(lo + BLOCK, LAYOUT.size)).sum())
    others = np.delete(np.arange(made.blocks), at // BLOCK)
    assert all(np.isfinite(made.squares(gradient, i * BLOCK, min((i + 1) * BLOCK, LAYOUT.size))).all() for i in others)


@pytest.mark.parametrize("clip_norm", [0.0, 1.0])
def test_huge_numbers_are_finite(clip_norm: float) -> None:
    made = update(clip_norm)
    _, _, gradient = start(made)
    gradient[:] = 3e38
    with np.errstate(over="ignore"):
        assert not np.isfinite(np.dot(gradient, gradient))
        assert np.isfinite(made.squares(gradient, 0, LAYOUT.size)).all()


def test_an_update_is_the_formula_and_leaves_the_front_alone() -> None:
    made = update(weight_decay=0.0)
    state, store, gradient = start(made, np.float64)
    before = [v.copy() for v in (state.weights, *state.slots)]
    made.apply(state, store, gradient, 0, LAYOUT.size, scale=0.25, rows=4.0)
    n = LAYOUT.parameters
    velocity = 0.9 * before[1] + gradient[:n] / 4
    np.testing.assert_allclose(store.slots(1)[0], velocity, rtol=1e-14)
    np.testing.assert_allclose(store.weights(1)[:n], before[0][:n] - 0.1 * velocity, rtol=1e-12)
    assert [v.tobytes() for v in before] == [v.tobytes() for v in (state.weights, *state.slots)]


def test_buffers_move_by_their_momentum_towards_the_mean() -> None:
    made = update()
    state, store, gradient = start(made, np.float64)
    made.apply(state, store, gradient, 0, LAYOUT.size, scale=123.0, rows=4.0)
    old, new = LAYOUT.views(state.weights), LAYOUT.views(store.weights(1))
    sums = LAYOUT.views(gradient)
    for name, momentum in (("mean", 0.1), ("variance", 0.5)):
        np.testing.assert_allclose(new[name], (1 - momentum) * old[name] + momentum * sums[name] / 4, rtol=1e-12)
