import itertools
import json
import math
import os
import sys
from typing import Any

import numpy as np
import pytest

from dptrain.arithmetic import PORTABLE
from dptrain.cli.plan import link, machines
from dptrain.errors import UsageError
from dptrain.exchange.communicator import Alone, Posted
from dptrain.exchange.segments import Machines, Memory, Segments
from dptrain.job import spec
from dptrain.job.load import check, complete
from dptrain.layout import Layout
from dptrain.membership import Membership
from dptrain.optim import make_optimizer, make_schedule
from dptrain.plan import Measured
from dptrain.scaling import GOODPUT, Link, Size, Vector, predict, simulate, sizes
from dptrain.state import STRETCH, Update
from tests.mpirun import dptrain, run

FREE = Measured(compute=0.0, final=(), add=0.0, update=0.0)
VECTOR = Vector(elements=40 * STRETCH, parameters=40 * STRETCH, item=4, narrow=4)
NBYTES = 4 * VECTOR.elements


def alike(machines: int) -> Size:
    return Size(machines, 1, 2 ** math.ceil(math.log2(machines)), 8)


@pytest.mark.parametrize("count", [2, 4, 8])
def test_where_nothing_is_computed_all_send_all_the_time(count: int) -> None:
    """Each machine sends what it has of all segments but its own, and its own sum to all others."""
    over = Link(1e9, 0.0)
    found = simulate(alike(count), VECTOR, over, FREE, count)
    wanted = 2 * (count - 1) / count * NBYTES
    assert found.sent == wanted
    assert 1 <= found.seconds / (8 * wanted / GOODPUT / over.rate) < 1.1


def test_one_coordinator_is_the_bottleneck() -> None:
    over, count = Link(1e9, 0.0), 8
    one, all_ = (simulate(alike(count), VECTOR, over, FREE, some) for some in (1, count))
    assert one.sent == (count - 1) * NBYTES
    assert 3 < one.seconds / all_.seconds < 5


def test_what_is_final_early_hides_behind_what_is_still_computed() -> None:
    over, size = Link(1e9, 0.0), alike(2)
    transfer = simulate(size, VECTOR, over, FREE, 2).seconds
    late = Measured(transfer, (), 0.0, 0.0)
    early = Measured(transfer, ((0, 0.0),), 0.0, 0.0)
    assert simulate(size, VECTOR, over, late, 2).seconds == pytest.approx(2 * transfer, rel=0.05)
    assert simulate(size, VECTOR, over, early, 2).seconds == pytest.approx(transfer, rel=0.05)


def test_one_machine_takes_what_it_computes_and_updates() -> None:
    own = Measured(0.1, (), 1e-9, 2e-9)
    found = simulate(Size(1, 1, 1, 8), VECTOR, Link(1e9, 0.0), own, 1)
    assert found.seconds == pytest.approx(0.1 + 2e-9 * VECTOR.elements)
    assert found.sent == 0


class Counting(Alone):
    """One of several workers, each on a machine of its own: counts what it would send."""

    def __init__(self, rank: int, size: int) -> None:
        super().__init__()
        self.rank, self.size, self.sent = rank, size, 0

    def post(self, sends: Any, receives: Any, phase: str) -> Posted:
        self.sent += sum(message.array.nbytes for message in sends)
        return super().post((), (), phase)

    def until(self, done: Any, phase: str) -> None:
        while not done():
            pass


@pytest.mark.parametrize(("count", "shards", "coordinators"), [(2, 2, 2), (3, 12, 3), (3, 3, 1), (5, 8, 4)])
def test_the_exchange_sends_what_is_said(count: int, shards: int, coordinators: int) -> None:
    layout = Layout([("W", (3 * STRETCH + 17,))])
    settings = spec.Optimizer()
    update = Update(layout, make_optimizer(settings), make_schedule(settings.schedule, settings.lr, 10), 0.0)
    sent = []
    for rank in range(count):
        membership = Membership(rank, count, shards)
        nodes = max(1, *(len(nodes) for nodes in membership.nodes))
        store, outboxes, marks = Memory(layout, 0, np.float32, [nodes]).place(None)
        communicator = Counting(rank, count)
        exchange = Segments(
            communicator,
            membership,
            update,
            name="segments",
            coordinators=coordinators,
            machines=Machines(tuple((one,) for one in range(count)), rank),
            store=store,
            outboxes=outboxes,
            marks=marks,
        )
        traffic = exchange._traffic
        assert traffic is not None
        traffic.open()
        traffic.finalize()
        communicator.until(traffic.closed, "")
        sent.append(communicator.sent)
    vector = Vector(layout.size, layout.parameters, 4, 4)
    assert max(sent) == simulate(Size(count, 1, shards, 1), vector, Link(1e9, 0.0), FREE, coordinators).sent


def small(**train: Any) -> Any:
    content = {
        "data": {"source": "digits"},
        "model": {"layers": [{"type": "linear", "units": 32}, {"type": "relu"}, {"type": "linear", "units": 10}]},
        "train": {"batch_size": 64, "steps": 5, **train},
    }
    return complete(check(content, ""))


def test_sizes_have_a_shard_for_every_worker() -> None:
    it = small(shards=8)
    assert [(s.shards, s.rows) for s in sizes(it, 8, [1, 2, 3, 16], 1, 0)] == [(8, 8), (8, 8), (3, 22), (16, 4)]
    assert [(s.shards, s.rows) for s in sizes(it, 8, [1, 16], 2, 10)] == [(8, 3), (32, 10)]
    with pytest.raises(UsageError, match="a row for each shard"):
        sizes(it, 8, [128], 1, 0)


def test_a_slower_link_takes_longer_and_efficiency_is_of_one_machine() -> None:
    it = small(shards=8)
    points = {
        rate: list(predict(it, [1, 2, 8], workers=1, link=Link(rate, 1e-5), rows=16, hours=1e4)) for rate in (1e8, 1e12)
    }
    for some in points.values():
        assert some[0].efficiency == pytest.approx(1)
        assert some[0].sent == 0 < some[1].sent < some[2].sent
        assert [point.batch for point in some] == [16, 32, 128]
        assert some[1].lost == pytest.approx(2 * some[0].lost)
    for slow, quick in zip(points[1e8][1:], points[1e12][1:], strict=True):
        assert slow.step - slow.compute > quick.step - quick.compute


def test_links_and_numbers_of_nodes_are_read() -> None:
    assert link("100Gbit,2us") == Link(1e11, 2e-6)
    assert link("10mbit/s, 1.5ms") == Link(1e7, 1.5e-3)
    assert link("1Gbit") == Link(1e9, 5e-5)
    assert machines("2..9") == [2, 4, 8]
    assert machines("3,1,3") == [1, 3]


@pytest.mark.parametrize("text", ["", "fast", "0Gbit", "1Gbit,2", "-1Gbit", "1.2.3Gbit"])
def test_what_is_no_link_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--link"):
        link(text)


@pytest.mark.parametrize("text", ["", "0", "-2", "9..2", "a..b", "1..", "5000", "0..8"])
def test_what_is_no_number_of_nodes_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--nodes"):
        machines(text)


def test_the_command_tells_of_each_number_of_nodes() -> None:
    done = dptrain("plan", "--nodes", "1..4", "--link", "1Gbit,50us", "--json")
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [one["size"]["machines"] for one in found] == [1, 2, 4]
    assert all(a["samples_per_second"] > 0 for a, b in itertools.pairwise(found))
    table = dptrain("plan", "--nodes", "1,3")
    assert table.returncode == 0, table.stderr
    assert "effi-" in table.stdout


def test_what_is_measured_is_the_jobs_arithmetic() -> None:
    """Kernels are chosen before numpy is loaded, or not at all."""
    code = """
import os
from dptrain.arithmetic import PORTABLE
from dptrain.cli.app import app
app(["plan", "--nodes", "1", "--json", "--set", "arithmetic.kernels=portable"], standalone_mode=False)
assert PORTABLE.items() <= os.environ.items()
"""
    environ = {name: value for name, value in os.environ.items() if name not in PORTABLE}
    done = run([sys.executable, "-P", "-c", code], environ, 120, ".")
    assert done.returncode == 0, done.stderr
