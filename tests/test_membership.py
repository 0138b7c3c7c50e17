import pytest

from dptrain.membership import Membership
from dptrain.tree import Node
from tests.sums import finish


@pytest.mark.parametrize("shards", range(1, 14))
@pytest.mark.parametrize("size", range(1, 17))
def test_shards_are_shared_evenly_in_contiguous_ranges(size: int, shards: int) -> None:
    ranges = [Membership(rank, size, shards).mine for rank in range(size)]
    assert [s for lo, hi in ranges for s in range(lo, hi)] == list(range(shards))
    lengths = [hi - lo for lo, hi in ranges]
    owners = [length for length in lengths if length]
    assert max(owners) - min(owners) <= 1
    assert len(owners) == min(size, shards)
    assert lengths[len(owners) :] == [0] * Membership(0, size, shards).spares
    assert [Membership(rank, size, shards).chief for rank in range(size)] == [True] + [False] * (size - 1)


@pytest.mark.parametrize("shards", [1, 6, 8, 12])
@pytest.mark.parametrize("size", [1, 2, 3, 5, 8, 13])
def test_the_nodes_of_all_workers_make_the_whole_tree(size: int, shards: int) -> None:
    nodes = Membership(0, size, shards).nodes
    values = {node: node.hi - node.lo for worker in nodes for node in worker}
    assert finish(values, Node(0, shards), lambda a, b: a + b) == shards
    assert len(nodes) == size


@pytest.mark.parametrize("total", [0, 1, 5, 64])
@pytest.mark.parametrize("size", [1, 3, 8])
def test_other_work_is_shared_by_all(size: int, total: int) -> None:
    member = Membership(0, size, 2)
    parts = [member.share(rank, total) for rank in range(size)]
    assert [i for lo, hi in parts for i in range(lo, hi)] == list(range(total))
    assert max(hi - lo for lo, hi in parts) <= -(-total // size)
