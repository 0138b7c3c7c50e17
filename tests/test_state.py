import math
import tracemalloc

import numpy as np
import pytest

from dptrain.job import spec
from dptrain.layout import BLOCK, Array, Layout, segments
from dptrain.optim import make_optimizer, make_schedule
from dptrain.state import Segment, State, Store, Update

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
            made.segment(store, lo, hi, gradient[lo:hi]).advance(state, scale=1 / 30, rows=29.0, add=False)
        results.append(b"".join(v.tobytes() for v in (store.weights(1), *store.slots(1))))
    assert results[0] == results[1]


def segment(made: Update, store: Store, vector: Array, lo: int = 0, hi: int = LAYOUT.size) -> Segment:
    return made.segment(store, lo, hi, vector[lo:hi])


@pytest.mark.parametrize("parts", [1, 2, 4, 7])
def test_squares_are_the_same_whoever_computes_which(parts: int) -> None:
    made = update(0.5)
    _, store, gradient = start(made)
    whole = segment(made, store, gradient).squares()
    assert len(whole) == made.blocks
    found = np.concatenate([segment(made, store, gradient, *cut).squares() for cut in segments(LAYOUT.size, parts)])
    assert found.tobytes() == whole.tobytes()
    exact = np.linalg.norm(gradient[: LAYOUT.parameters].astype(np.float64))
    assert math.sqrt(sum(whole.tolist())) == pytest.approx(exact, rel=1e-12)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("at", [0, BLOCK - 1, BLOCK, LAYOUT.parameters - 1, LAYOUT.parameters, LAYOUT.size - 1])
def test_one_number_that_is_not_finite_is_seen(at: int, value: float) -> None:
    made = update()
    state, store, gradient = start(made)
    with np.errstate(all="ignore"):
        assert advance(segment(made, store, gradient), state)
        gradient[at] = value
        assert not advance(segment(made, store, gradient), state)
        lo = at // BLOCK * BLOCK
        assert not advance(segment(made, store, gradient, lo, min(lo + BLOCK, LAYOUT.size)), state)
        squares = segment(made, store, gradient).squares()
    assert sum(~np.isfinite(squares)) == 1


def test_huge_numbers_are_finite() -> None:
    made = update()
    state, store, gradient = start(made)
    gradient[:] = 3e38
    with np.errstate(over="ignore"):
        assert not np.isfinite(np.dot(gradient, gradient))
        assert advance(segment(made, store, gradient), state)
        assert np.isfinite(segment(made, store, gradient).squares()).all()


def advance(it: Segment, state: State, **changes: float) -> bool:
    return it.advance(state, **{"scale": 0.25, "rows": 4.0, "add": False, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize("at_once", [False, True])
def test_the_sum_is_finished_in_the_order_of_the_pairs(at_once: bool) -> None:
    """(a + b) + (c + d): the same whether it is added before the update or with it."""
    made = update()
    state, store, _ = start(made)
    rng = np.random.default_rng(5)
    a, b, c, d = rng.standard_normal((4, LAYOUT.size)).astype(np.float32)
    total = (a + b) + (c + d)
    advance(segment(made, store, total), state)
    expected = store.weights(1).copy()
    it = made.segment(store, 0, LAYOUT.size, a, [(a, b), (c, d), (a, c)])
    if not at_once:
        it.add()
    store.weights(1).fill(0)
    assert advance(it, state, add=at_once)
    assert store.weights(1).tobytes() == expected.tobytes()


def test_an_update_is_the_formula_and_leaves_the_front_alone() -> None:
    made = update(weight_decay=0.0)
    state, store, gradient = start(made, np.float64)
    before = [v.copy() for v in (state.weights, *state.slots)]
    made.segment(store, 0, LAYOUT.size, gradient).advance(state, scale=0.25, rows=4.0, add=False)
    n = LAYOUT.parameters
    velocity = 0.9 * before[1] + gradient[:n] / 4
    np.testing.assert_allclose(store.slots(1)[0], velocity, rtol=1e-14)
    np.testing.assert_allclose(store.weights(1)[:n], before[0][:n] - 0.1 * velocity, rtol=1e-12)
    assert [v.tobytes() for v in before] == [v.tobytes() for v in (state.weights, *state.slots)]


def test_buffers_move_by_their_momentum_towards_the_mean() -> None:
    made = update()
    state, store, gradient = start(made, np.float64)
    made.segment(store, 0, LAYOUT.size, gradient).advance(state, scale=123.0, rows=4.0, add=False)
    old, new = LAYOUT.views(state.weights), LAYOUT.views(store.weights(1))
    sums = LAYOUT.views(gradient)
    for name, momentum in (("mean", 0.1), ("variance", 0.5)):
        np.testing.assert_allclose(new[name], (1 - momentum) * old[name] + momentum * sums[name] / 4, rtol=1e-12)


@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_a_step_allocates_no_arrays(kind: str) -> None:
    made = update(type=kind, weight_decay=0.01)
    state, store, gradient = start(made)
    other = gradient.copy()
    it = made.segment(store, 0, LAYOUT.size, gradient, [(gradient, other)])
    advance(it, state, add=True)
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        advance(it, state, add=True)
        peak = tracemalloc.get_traced_memory()[1] - before
        tracemalloc.reset_peak()
        gradient.copy()
        control = tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
    assert peak < 8192 < control
