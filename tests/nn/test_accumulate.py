import math
from collections.abc import Callable
from itertools import combinations
from typing import Any

import numpy as np
import pytest

from dptrain.data.batches import Loaded
from dptrain.job.spec import BatchNorm, Dropout, Linear, Tanh
from dptrain.job.spec import Loss as LossSpec
from dptrain.layout import Array
from dptrain.nn import accumulate
from dptrain.nn.accumulate import Accumulator, Schedule, schedule
from dptrain.nn.chain import build_chain
from dptrain.nn.loss import make_loss
from dptrain.tree import Node, subtrees
from tests.sums import finish

Tree = Any
"""A shard's number, or a pair: the order in which a sum was made."""


def replayed(plan: Schedule) -> dict[int, Tree]:
    """What the slots hold at the end, as trees; reading what was not written fails."""
    slots: dict[int, Tree] = {}
    for batch in plan.batches:
        scratch: dict[int, Tree] = {i: batch.lo + i for i in range(batch.hi - batch.lo)}
        if batch.direct is not None:
            assert batch.hi - batch.lo == 1
            slots[batch.direct] = scratch.pop(0)
        for target, left, right in batch.steps:
            a = scratch[left] if left >= 0 else slots[~left]
            b = None if right is None else scratch[right] if right >= 0 else slots[~right]
            value = a if right is None else (a, b)
            if target >= 0:
                scratch[target] = value
            else:
                assert ~target < plan.slots
                slots[~target] = value
    return slots


def canonical(node: Node) -> Tree:
    """The one order of additions of a node."""
    return finish({Node(s, s + 1): s for s in range(node.lo, node.hi)}, node, lambda a, b: (a, b))  # type: ignore


@pytest.mark.parametrize("shards", range(1, 18))
def test_every_slot_ends_with_the_canonical_tree_of_its_node(shards: int) -> None:
    expected = {
        node: canonical(node) for lo, hi in combinations(range(shards + 1), 2) for node in subtrees(lo, hi, shards)
    }
    for lo, hi in combinations(range(shards + 1), 2):
        for at_once in range(1, hi - lo + 1):
            plan = schedule(lo, hi, shards, at_once)
            slots = replayed(plan)
            assert plan.nodes == subtrees(lo, hi, shards)
            assert [slots[i] for i in range(len(plan.nodes))] == [expected[node] for node in plan.nodes]
            assert plan.slots <= 2 * math.ceil(math.log2(shards)) + 1
            assert sum(batch.hi - batch.lo for batch in plan.batches) == hi - lo
            assert max(batch.hi - batch.lo for batch in plan.batches) <= at_once


def test_a_worker_without_shards_has_nothing_to_do() -> None:
    assert schedule(3, 3, 8, 2) == Schedule([], [], 0)


def rows_of(shards: int, b: int, seed: int) -> Callable[[int, int], Loaded]:
    """Rows of all shards, the last but one shard half padding and the last nothing but padding."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((shards, b, 5)).astype(np.float32)
    y = rng.integers(0, 3, (shards, b))
    rows = np.ones((shards, b), np.float32)
    counts = [b] * shards
    if shards > 2:
        counts[-2:] = [b // 2, 0]
    for s, count in enumerate(counts):
        rows[s, count:] = x[s, count:] = y[s, count:] = 0
    return lambda lo, hi: Loaded(x[lo:hi], y[lo:hi], rows[lo:hi], tuple(counts[lo:hi]))


def accumulator(shards: int, at_once: int) -> tuple[Accumulator, Array]:
    layers = (Linear(units=7), BatchNorm(), Tanh(), Dropout(rate=0.4), Linear(units=3))
    model = build_chain(layers, (5,))
    weights = np.zeros(model.layout.size, np.float32)
    model.initialise(weights, 1)
    loss = make_loss(LossSpec(), "classes", 3, 1)
    return Accumulator(model, loss, seed=9, shards=shards, at_once=at_once), weights


@pytest.mark.parametrize("whole", [True, False], ids=["in one pass", "tensor by tensor"])
@pytest.mark.parametrize("shards", [1, 2, 5, 8])
def test_partials_are_the_shards_gradients_added_in_the_tree(
    shards: int, whole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not whole:
        monkeypatch.setattr(accumulate, "_WHOLE", 0)
    load = rows_of(shards, 4, shards)
    leaves: dict[Node, tuple[Array, Array]] = {}
    alone, weights = accumulator(shards, 1)
    for s in range(shards):
        outbox = np.full((1, len(weights)), np.nan, np.float32)
        found = alone.accumulate(weights, alone.schedule(s, s + 1), outbox, 3, load)
        leaves[Node(s, s + 1)] = found.vectors[0].copy(), found.tallies[0].copy()
    assert alone.shards_computed == shards

    def add(a: tuple[Array, Array], b: tuple[Array, Array]) -> tuple[Array, Array]:
        return a[0] + b[0], a[1] + b[1]

    for lo, hi in combinations(range(shards + 1), 2):
        for at_once in {1, 2, 3, hi - lo}:
            worker, _ = accumulator(shards, at_once)
            plan = worker.schedule(lo, hi)
            found = worker.accumulate(weights, plan, np.full((plan.slots, len(weights)), np.nan, np.float32), 3, load)
            for node, vector, tally in zip(found.nodes, found.vectors, found.tallies, strict=True):
                mine = {leaf: value for leaf, value in leaves.items() if node.lo <= leaf.lo < node.hi}
                expected = finish(mine, node, add)
                assert vector.tobytes() == expected[0].tobytes()
                assert tally.tobytes() == expected[1].tobytes()


@pytest.mark.parametrize(("shards", "at_once"), [(1, 1), (5, 3), (8, 8), (8, 1)])
def test_what_is_said_to_be_final_is_not_written_to_again(
    shards: int, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accumulate, "_WHOLE", 0)
    worker, weights = accumulator(shards, at_once)
    load = rows_of(shards, 4, shards)
    plan = worker.schedule(0, shards)
    outbox = np.full((plan.slots, len(weights)), np.nan, np.float32)
    parameters = worker.model.layout.parameters
    said: list[tuple[int, Array]] = []
    rows = len(plan.nodes)
    worker.accumulate(weights, plan, outbox, 3, load, None, lambda lowest: said.append((lowest, outbox[:rows].copy())))
    starts = [entry.start for entry in worker.model.layout.entries.values() if entry.momentum is None]
    assert [lowest for lowest, _ in said] == sorted((lowest for lowest, _ in said), reverse=True)
    assert {lowest for lowest, _ in said} <= set(starts)
    assert said[-1][0] == 0
    assert len(said) > 2
    for lowest, then in said:
        assert then[:, lowest:parameters].tobytes() == outbox[:rows, lowest:parameters].tobytes()
    # Negative control: what comes before is not final yet.
    assert said[0][1][:, :parameters].tobytes() != outbox[:rows, :parameters].tobytes()


def test_another_order_gives_other_bits() -> None:
    """Negative control: the comparison above can fail."""
    shards = 8
    worker, weights = accumulator(shards, 8)
    load = rows_of(shards, 4, 5)
    outbox = np.zeros((8, len(weights)), np.float32)
    straight: Array = np.zeros(len(weights), np.float32)
    for s in range(shards):
        straight += worker.accumulate(weights, worker.schedule(s, s + 1), outbox, 3, load).vectors[0]
    plan = worker.schedule(0, shards)
    tree = worker.accumulate(weights, plan, outbox, 3, load).vectors[0]
    np.testing.assert_allclose(tree, straight, rtol=1e-4, atol=1e-5)
    assert tree.tobytes() != straight.tobytes()


def test_randomness_is_of_step_and_shard() -> None:
    worker, weights = accumulator(4, 4)
    load = rows_of(4, 4, 5)
    plan = worker.schedule(0, 4)
    found = [
        worker.accumulate(weights, plan, np.zeros((plan.slots, len(weights)), np.float32), step, load).vectors.tobytes()
        for step in (3, 3, 4)
    ]
    assert found[0] == found[1]
    assert found[0] != found[2]
