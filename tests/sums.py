"""Sums in the canonical tree, made the plain way: what the faster ways are held to."""

from collections.abc import Callable, Mapping
from typing import TypeVar

from dptrain.tree import Node, additions

T = TypeVar("T")


def finish(values: Mapping[Node, T], goal: Node, add: Callable[[T, T], T]) -> T:
    """The value of ``goal`` from the values of nodes that cover it, added in the canonical order."""
    have = dict(values)
    for parent, left, right in additions(values, goal):
        have[parent] = add(have[left], have[right])
    return have[goal]
