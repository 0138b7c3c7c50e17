import math
import tracemalloc
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from dptrain import gradients
from dptrain.errors import JobError
from dptrain.gradients import Gradients, Rounded, TopK, declared, elements_kept
from dptrain.job.digest import digest_job
from dptrain.job.load import check, complete
from dptrain.job.spec import BatchNorm, Linear, Tanh
from dptrain.job.spec import Loss as LossSpec
from dptrain.layout import BLOCK, Array, Layout
from dptrain.nn import accumulate
from dptrain.nn.accumulate import Accumulator, Residuals
from dptrain.nn.chain import build_chain
from dptrain.nn.loss import make_loss
from dptrain.state import STRETCH, State, Store, Update
from dptrain.tree import Node
from tests.nn.test_accumulate import rows_of
from tests.sums import finish
from tests.test_state import update


@pytest.fixture(autouse=True)
def as_in_training() -> Iterator[None]:
    with np.errstate(all="ignore"):
        yield


def bits(vector: Array) -> bytes:
    return np.ascontiguousarray(vector).tobytes()


def numbers(seed: int, n: int = 5_000) -> Array:
    """Of all magnitudes that float32 has, drawn as bits; no NaN and no infinity."""
    drawn = np.random.default_rng(seed).integers(0, 1 << 32, 2 * n, np.uint32).view(np.float32)
    return drawn[np.isfinite(drawn)][:n].copy()


def rounded(name: str, vector: Array) -> Array:
    out = vector.copy()
    Rounded(name).round(out)
    return out


def nearest(value: float, digits: int, smallest: int) -> Fraction:
    """A number to so many binary digits, the last not below 2**smallest, ties to even: by exact fractions."""
    exact = Fraction(value)
    if not exact:
        return exact
    exponent = math.frexp(value)[1] - 1
    unit = Fraction(2) ** max(exponent - digits + 1, smallest)
    return round(exact / unit) * unit


@pytest.mark.parametrize(("name", "digits", "smallest"), [("bfloat16", 8, -133), ("float16", 11, -24)])
def test_rounding_is_to_nearest_ties_to_even(name: str, digits: int, smallest: int) -> None:
    largest = 65504.0 if name == "float16" else float(np.array([0x7F7F0000], np.uint32).view(np.float32)[0])
    some = np.concatenate([numbers(1, 1_500), np.random.default_rng(2).standard_normal(500).astype(np.float32)])
    # Just between two neighbours.
    ties = np.random.default_rng(3).integers(0, 1 << 15, 500).astype(np.uint32) << 16 | 0x8000
    some = np.concatenate([some, ties.view(np.float32)])
    some = some[np.isfinite(some) & (np.abs(some) < largest)]
    for value, found in zip(some.tolist(), rounded(name, some).tolist(), strict=True):
        assert Fraction(found) == nearest(value, digits, smallest)


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_what_is_not_finite_stays_so(name: str) -> None:
    patterns = [0x7FC00000, 0xFFC00000, 0x7F800001, 0x7FFFFFFF, 0xFFFFFFFF, 0x7F800000, 0xFF800000, 0x7F7FFFFF]
    some = np.array(patterns, np.uint32).view(np.float32)
    found = rounded(name, some)
    assert np.isnan(found[:5]).all()
    assert found[5:].tolist() == [np.inf, -np.inf, np.inf]


def test_float16_overflows_where_bfloat16_does_not() -> None:
    large = np.array([70_000.0], np.float32)
    assert np.isinf(rounded("float16", large)).all()
    assert np.isfinite(rounded("bfloat16", large)).all()


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_rounding_twice_is_rounding_once_however_it_is_cut(name: str) -> None:
    some = np.random.default_rng(4).standard_normal(3 * BLOCK * 5 + 11).astype(np.float32)
    once = rounded(name, some)
    assert bits(once) != bits(some)
    assert bits(rounded(name, once)) == bits(once)
    assert bits(np.concatenate([rounded(name, part) for part in np.array_split(some, 7)])) == bits(once)


@pytest.mark.parametrize("kind", ["bfloat16", "float16", "top_k"])
def test_no_memory_is_taken_in_the_steady_state(kind: str) -> None:
    made, n = declared(kind, 0.01), 100_000
    source = np.random.default_rng(5).standard_normal(n).astype(np.float32)
    vector, old, new = source.copy(), np.zeros_like(source), np.zeros_like(source)

    def once() -> None:
        np.copyto(vector, source)
        made.leaf(vector, old, new)
        made.round(vector)

    once()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        once()
        assert tracemalloc.get_traced_memory()[1] - before < 16 << 10
    finally:
        tracemalloc.stop()


def plainly_kept(v: Array, share: float) -> list[int]:
    """The indices of the largest magnitudes, by sorting Python's numbers."""
    order = sorted(range(len(v)), key=lambda i: (-abs(float(v[i])), i))
    return sorted(i for i in order[: elements_kept(share, len(v))] if v[i] != 0)


@pytest.mark.parametrize("share", [0.001, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("n", [1, 7, 500])
def test_the_largest_elements_are_kept_and_of_equal_ones_the_first(n: int, share: float) -> None:
    rng = np.random.default_rng(n)
    # Few different magnitudes, zeros of both signs among them.
    v = (rng.integers(-3, 4, n) * rng.choice([1.0, -1.0], n)).astype(np.float32)
    sent, residual = v.copy(), np.full(n, np.nan, np.float32)
    TopK(share).leaf(sent, None, residual)
    kept = plainly_kept(v, share)
    assert np.flatnonzero(sent).tolist() == kept
    assert bits(sent[kept]) == bits(v[kept])
    assert not np.signbit(sent[sent == 0]).any()
    assert np.array_equal(sent + residual, v)
    assert not (sent != 0)[residual != 0].any()


def test_what_is_sent_and_what_waits_are_all_gradients_together() -> None:
    """Error feedback telescopes; the numbers are such that every sum is exact."""
    rng, n, made = np.random.default_rng(6), 300, TopK(0.05)
    old, total, sum_sent = np.zeros(n, np.float32), np.zeros(n), np.zeros(n)
    for _ in range(50):
        gradient = rng.integers(-1_000, 1_000, n).astype(np.float32)
        sent, new = gradient.copy(), np.empty(n, np.float32)
        made.leaf(sent, old, new)
        total += gradient
        sum_sent += sent
        old = new
        assert np.count_nonzero(sent) <= elements_kept(0.05, n)
    assert np.array_equal(sum_sent + old, total)
    assert np.count_nonzero(old) > n // 2


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_never_kept_back(bad: float) -> None:
    v = np.arange(100, dtype=np.float32)
    v[3] = bad
    TopK(0.01).leaf(v, None, np.zeros_like(v))
    assert not np.isfinite(v[3])


def accumulator(made: Gradients, shards: int, at_once: int) -> tuple[Accumulator, Array]:
    model = build_chain((Linear(units=7), BatchNorm(), Tanh(), Linear(units=3)), (5,))
    weights = np.zeros(model.layout.size, np.float32)
    model.initialise(weights, 1)
    loss = make_loss(LossSpec(), "classes", 3, 1)
    return Accumulator(model, loss, seed=9, shards=shards, at_once=at_once, gradients=made), weights


@pytest.mark.parametrize("whole", [True, False], ids=["in one pass", "tensor by tensor"])
@pytest.mark.parametrize("kind", ["auto", "bfloat16", "float16", "top_k"])
@pytest.mark.parametrize("shards", [1, 2, 5, 8])
def test_nodes_are_what_the_arithmetic_declares(
    shards: int, kind: str, whole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the plain gradients of single shards, each step written out; buffers and tallies are exact."""
    if not whole:
        monkeypatch.setattr(accumulate, "_WHOLE", 0)
    share, load = 0.2, rows_of(shards, 4, shards)
    plain, weights = accumulator(Gradients(), shards, 1)
    layout = plain.model.layout
    parameters = layout.parameters
    old = np.random.default_rng(7).standard_normal((shards, parameters)).astype(np.float32)
    after = old.copy()
    leaves: dict[Node, Array] = {}
    for s in range(shards):
        outbox = np.zeros((1, layout.size), np.float32)
        vector = plain.accumulate(weights, plain.schedule(s, s + 1), outbox, 3, load).vectors[0].copy()
        if kind == "top_k":
            for entry in layout.entries.values():
                if entry.momentum is None:
                    part = slice(entry.start, entry.stop)
                    v = vector[part] + old[s, part]
                    kept = plainly_kept(v, share)
                    vector[part] = 0
                    vector[part][kept] = v[kept]
                    after[s, part] = v
                    after[s, part][kept] = 0
        elif kind != "auto":
            vector[:parameters] = rounded(kind, vector[:parameters])
        leaves[Node(s, s + 1)] = vector

    def add(a: Array, b: Array) -> Array:
        total = a + b
        if kind in ("bfloat16", "float16"):
            total[:parameters] = rounded(kind, total[:parameters])
        return np.asarray(total)

    for at_once in (1, 2, shards):
        for lo in range(shards):
            own, _ = accumulator(declared(kind, share), shards, at_once)
            plan = own.schedule(lo, shards)
            new = np.full_like(old, np.nan)
            residuals = Residuals(old, list(new)) if kind == "top_k" else None
            outbox = np.zeros((plan.slots, layout.size), np.float32)
            found = own.accumulate(weights, plan, outbox, 3, load, residuals)
            for node, vector in zip(found.nodes, found.vectors, strict=True):
                inside = {leaf: value for leaf, value in leaves.items() if node.lo <= leaf.lo < node.hi}
                assert bits(vector) == bits(finish(inside, node, add))
            if kind == "top_k":
                assert bits(new[lo:]) == bits(after[lo:])


@pytest.mark.parametrize("kind", ["bfloat16", "float16"])
@pytest.mark.parametrize("clipped", [False, True])
def test_a_segment_finishes_the_sum_in_the_arithmetic(kind: str, clipped: bool) -> None:
    exact = update()
    made = Update(exact.layout, exact.optimizer, exact.schedule, 0.0, declared(kind, 0.0))
    layout = made.layout
    rng = np.random.default_rng(8)
    vectors = [rng.standard_normal(layout.size).astype(np.float32) for _ in range(3)]
    for vector in vectors:
        vector[: layout.parameters] = rounded(kind, vector[: layout.parameters])
    total = vectors[0].copy()
    for vector in vectors[1:]:
        total += vector
        total[: layout.parameters] = rounded(kind, total[: layout.parameters])
    results = []
    for pairs in (True, False):
        store = Store(layout, 1, np.float32)
        own = [vector.copy() for vector in vectors]
        first = own[0] if pairs else total
        segment = made.segment(store, 0, layout.size, first, [(first, v) for v in own[1:]] if pairs else [])
        if clipped:
            segment.add()
            assert bits(first) == bits(total)
        state = State(0, 0, store.weights(0), store.slots(0), 0)
        assert segment.advance(state, scale=0.1, rows=3.0, add=pairs and not clipped)
        results.append(bits(store.weights(1)))
    assert results[0] == results[1]
    assert layout.size > STRETCH


def job(**arithmetic: Any) -> Any:
    layers = [{"type": "linear", "units": 10}]
    train = {"steps": 3, **arithmetic.pop("train", {})}
    return complete(check({"model": {"layers": layers}, "train": train, "arithmetic": arithmetic}, "a job"))


def digests(**arithmetic: Any) -> tuple[str, str]:
    found = digest_job(job(**arithmetic), data="d", model="", start="", decay_steps=0)
    return found.job, found.trajectory


def test_the_digests_tell_arithmetics_apart_and_nothing_else() -> None:
    plain = digests()
    assert digests(gradients="float32") == digests(top_k=0.5) == plain
    assert digests(gradients="bfloat16", top_k=0.5) == digests(gradients="bfloat16")
    others = [digests(gradients="bfloat16"), digests(gradients="float16")]
    others += [digests(gradients="top_k", top_k=share) for share in (0.01, 0.02)]
    for which in (0, 1):
        assert len({found[which] for found in [plain, *others]}) == 5


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "float16", "top_k"])
def test_other_arithmetics_than_the_dtypes_own_need_float32(kind: str) -> None:
    with pytest.raises(JobError, match=r"arithmetic\.gradients"):
        job(gradients=kind, train={"dtype": "float64"})


def test_a_fingerprint_sees_the_arithmetic() -> None:
    vectors = np.random.default_rng(9).standard_normal((2, 400)).astype(np.float32)
    made: list[Gradients] = [declared(kind, 0.01) for kind in ("auto", "bfloat16", "float16", "top_k")]
    made.append(TopK(0.02))
    seen = [gradients.sample(one, vectors) for one in made]
    assert len(set(seen)) == 5


def test_layouts_without_parameters_have_nothing_to_round() -> None:
    layout = Layout([], [("mean", (3,), 0.1)])
    assert layout.parameters == 0
    Rounded("bfloat16").round(np.zeros(0, np.float32))
