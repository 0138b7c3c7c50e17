import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dptrain.tree import Node, additions, subtrees
from tests.sums import finish


def counter(values):
    """The independent truth: a binary counter that merges equal neighbours, then the rest from the right."""
    stack = []
    for value in values:
        stack.append((1, value))
        while len(stack) > 1 and stack[-2][0] == stack[-1][0]:
            (size, right), (_, left) = stack.pop(), stack.pop()
            stack.append((2 * size, f"({left}+{right})"))
    while len(stack) > 1:
        (a, right), (b, left) = stack.pop(), stack.pop()
        stack.append((a + b, f"({left}+{right})"))
    return stack[0][1]


def leaves(lo, hi):
    return {Node(s, s + 1): str(s) for s in range(lo, hi)}


def join(left, right):
    return f"({left}+{right})"


@pytest.mark.parametrize("shards", range(1, 70))
def test_the_tree_is_the_binary_counters(shards):
    assert finish(leaves(0, shards), Node(0, shards), join) == counter(map(str, range(shards)))


def test_a_tree_by_hand():
    assert finish(leaves(0, 6), Node(0, 6), join) == "(((0+1)+(2+3))+(4+5))"
    assert Node(0, 6).children == (Node(0, 4), Node(4, 6))
    with pytest.raises(ValueError, match="leaf"):
        _ = Node(3, 4).children


@given(st.data())
def test_any_division_among_workers_gives_the_same_sum(data):
    shards = data.draw(st.integers(1, 40))
    cuts = sorted(data.draw(st.lists(st.integers(0, shards), max_size=6)))
    ranges = itertools.pairwise([0, *cuts, shards])
    offered = {}
    for lo, hi in ranges:
        for node in subtrees(lo, hi, shards):
            offered[node] = finish(leaves(node.lo, node.hi), node, join)
    assert finish(offered, Node(0, shards), join) == counter(map(str, range(shards)))


def test_floating_point_bits_do_not_depend_on_the_division():
    values = np.random.default_rng(1).standard_normal((12, 1000)).astype(np.float32)
    one = {Node(s, s + 1): values[s] for s in range(12)}
    whole = finish(one, Node(0, 12), np.add)
    for cut in range(1, 12):
        offered = {}
        for lo, hi in ((0, cut), (cut, 12)):
            for node in subtrees(lo, hi, 12):
                offered[node] = finish({k: v for k, v in one.items() if node.lo <= k.lo < node.hi}, node, np.add)
        assert finish(offered, Node(0, 12), np.add).tobytes() == whole.tobytes()
    # The control: adding from left to right is another sum.
    assert np.add.reduce(list(values)).tobytes() != whole.tobytes()


@pytest.mark.parametrize("shards", [1, 2, 3, 6, 7, 8, 12, 31, 32, 33])
def test_subtrees_are_maximal_cover_the_range_and_are_few(shards):
    nodes = set()

    def collect(node):
        nodes.add(node)
        if node.hi - node.lo > 1:
            for child in node.children:
                collect(child)

    collect(Node(0, shards))
    for lo, hi in itertools.combinations(range(shards + 1), 2):
        found = subtrees(lo, hi, shards)
        assert [s for node in found for s in range(*node)] == list(range(lo, hi))
        assert set(found) <= nodes
        inside = [node for node in nodes if lo <= node.lo and node.hi <= hi]
        assert all(any(f.lo <= n.lo and n.hi <= f.hi for f in found) for n in inside)
        assert len(found) <= max(1, 2 * (shards - 1).bit_length())


def test_a_range_without_shards_offers_nothing():
    assert subtrees(3, 3, 8) == []


@pytest.mark.parametrize(("lo", "hi"), [(-1, 2), (2, 1), (0, 9)])
def test_ranges_outside_are_refused(lo, hi):
    with pytest.raises(ValueError, match="do not lie"):
        subtrees(lo, hi, 8)


def test_a_plan_adds_children_first_and_misses_nothing():
    plan = additions(leaves(0, 11), Node(0, 11))
    known = set(leaves(0, 11))
    for parent, left, right in plan:
        assert {left, right} <= known
        known.add(parent)
    assert len(plan) == 10
    assert plan[-1].parent == Node(0, 11)
    with pytest.raises(ValueError, match="do not cover"):
        additions([node for node in leaves(0, 8) if node.lo != 4], Node(0, 8))
