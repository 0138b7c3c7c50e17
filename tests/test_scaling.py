import itertools
import json
import math
import os
import sys
from dataclasses import replace
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
from dptrain.moving import Cores, seconds_a_byte
from dptrain.optim import make_optimizer, make_schedule
from dptrain.plan import Measured
from dptrain.scaling import GOODPUT, Link, Size, Step, Vector, best_of, byte_of, predict, simulate, sizes
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


def test_cores_that_are_shared_bound_a_step_by_all_they_have_to_do() -> None:
    """Each machine moves each byte that it sends and each that comes, and updates all."""
    over, size, cores = Link(1e12, 0.0), alike(2), Cores(1.0, 5e-9)
    own = Measured(0.01, (), 0.0, 1e-9)
    found = simulate(size, VECTOR, over, own, 2, cores)
    wanted = 0.01 + 5e-9 * 2 * NBYTES + 1e-9 * VECTOR.elements
    assert found.seconds == pytest.approx(wanted, rel=0.05)
    half = simulate(size, VECTOR, over, own, 2, Cores(0.5, 5e-9))
    assert half.seconds == pytest.approx(2 * wanted, rel=0.05)


def test_a_core_of_its_own_moves_bytes_while_workers_compute() -> None:
    over, size, moved = Link(1e12, 0.0), alike(2), 5e-9 * 2 * NBYTES
    own = Measured(moved, ((0, 0.0),), 0.0, 0.0)
    alone, shared = (simulate(size, VECTOR, over, own, 2, Cores(count, 5e-9)).seconds for count in (2, 1))
    assert alone == pytest.approx(moved, rel=0.05)
    assert shared == pytest.approx(2 * moved, rel=0.05)


def test_a_link_that_is_slower_than_the_cores_is_the_bound() -> None:
    over, size = Link(1e8, 0.0), alike(4)
    free, found = (simulate(size, VECTOR, over, FREE, 4, Cores(0.5, byte)).seconds for byte in (0.0, 5e-9))
    assert found == pytest.approx(free, rel=0.02)


def test_workers_that_share_a_core_take_turns() -> None:
    own = Measured(0.1, (), 0.0, 0.0)
    assert simulate(Size(1, 3, 4, 8), VECTOR, Link(1e9, 0.0), own, 1, Cores(1.0)).seconds == pytest.approx(
        0.3, rel=1e-3
    )


def test_packing_is_counted_where_bytes_are_narrower() -> None:
    own, over, cores = Measured(0.0, (), 0.0, 0.0, pack=1e-8), Link(1e12, 0.0), Cores(1.0)
    wide, narrow = (simulate(alike(2), replace(VECTOR, narrow=size), over, own, 2, cores).seconds for size in (4, 2))
    # Each machine packs what it has of the other's half, and its own sum, and unpacks as much.
    assert narrow - wide == pytest.approx(1e-8 * VECTOR.elements, rel=0.1)


def test_what_a_byte_costs_is_found_again() -> None:
    over, own = Link(1e12, 0.0), Measured(0.01, (), 1e-10, 1e-9)
    seconds = simulate(alike(2), VECTOR, over, own, 2, Cores(1.0, 3e-9)).seconds
    assert byte_of(seconds, alike(2), VECTOR, over, own, 1.0) == pytest.approx(3e-9, rel=0.01)
    # A step that is bound by other things tells no more than that bytes don't cost more.
    assert byte_of(0.001, alike(2), VECTOR, over, own, 1.0) == 0


def test_what_a_byte_costs_here_is_measured() -> None:
    assert 1e-12 < seconds_a_byte(0.05) < 1e-6


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


def test_of_numbers_that_take_as_long_that_which_sends_least_is_best() -> None:
    steps = {1: Step(1.0, 300.0), 4: Step(1.005, 100.0), 16: Step(1.02, 50.0)}
    assert best_of(steps) == 4
    assert best_of({1: steps[1], 16: steps[16]}) == 1
