"""The canonical tree: in which order the gradients of G shards are added, whoever adds them.

A node is a range of shards (lo, hi). It splits at the largest power of two below its length, so the tree over
range(G) is what a binary counter builds when the shards come in order: equal neighbours merge at once, the rest is
merged from the right at the end. Floating-point addition depends on the order; this order depends on G alone.
"""

from collections.abc import Iterable
from typing import NamedTuple


class Node(NamedTuple):
    """The shards lo <= s < hi, as one node of a canonical tree."""

    lo: int
    hi: int

    @property
    def children(self) -> "tuple[Node, Node]":
        """The two nodes this one is the sum of; a leaf has none and raises ValueError."""
        length = self.hi - self.lo
        if length < 2:
            raise ValueError(f"shard {self.lo} is a leaf")
        cut = self.lo + (1 << (length - 1).bit_length() - 1)
        return Node(self.lo, cut), Node(cut, self.hi)


class Add(NamedTuple):
    """One addition of a plan: value(parent) = value(left) + value(right)."""

    parent: Node
    left: Node
    right: Node


def subtrees(lo: int, hi: int, shards: int) -> list[Node]:
    """The maximal nodes of the tree over range(shards) that lie within lo <= s < hi, from left to right.

    They cover the range exactly, and there are at most 2 * log2(shards) of them. Empty for an empty range.
    """
    if not 0 <= lo <= hi <= shards:
        raise ValueError(f"shards {lo} to {hi} do not lie in range({shards})")
    found: list[Node] = []

    def visit(node: Node) -> None:
        if hi <= node.lo or node.hi <= lo:
            return
        if lo <= node.lo and node.hi <= hi:
            found.append(node)
            return
        for child in node.children:
            visit(child)

    if lo < hi:
        visit(Node(0, shards))
    return found


def merged(have: Iterable[Node], goal: Node) -> tuple[list[Node], list[Add]]:
    """What becomes of the nodes at hand when all neighbours that can be added are: the nodes left, and the additions.

    The nodes at hand must be disjoint nodes of goal's tree, else ValueError; they need not cover it. Nodes left come
    from left to right, each parent of the additions after its children.
    """
    known = set(have)
    plan: list[Add] = []

    def visit(node: Node) -> list[Node]:
        if node in known:
            known.discard(node)
            return [node]
        if node.hi - node.lo < 2:
            return []
        left, right = node.children
        found = [*visit(left), *visit(right)]
        if found != [left, right]:
            return found
        plan.append(Add(node, left, right))
        return [node]

    found = visit(goal)
    if known:
        raise ValueError(f"{sorted(map(tuple, known))} are no nodes of the tree over {tuple(goal)}, or overlap others")
    return found, plan


def additions(have: Iterable[Node], goal: Node) -> list[Add]:
    """The additions that make ``goal`` from the nodes at hand, each parent after its children.

    The nodes at hand must be disjoint nodes of goal's tree that cover it, else ValueError.
    """
    found, plan = merged(have, goal)
    if found != [goal]:
        raise ValueError(f"{[tuple(node) for node in found]} do not cover {tuple(goal)}")
    return plan
