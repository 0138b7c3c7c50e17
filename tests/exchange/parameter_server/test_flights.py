"""What may be under way, decided from what is: simulated with workers of any speed, who die and come back."""

import random

import pytest

from dptrain.exchange.parameter_server.flights import Flights, Piece

TOTAL = 60


def simulated(
    flights: Flights, speeds: list[float], chance: random.Random, deaths: float = 0.0, version: int = 0
) -> list[tuple[int, int]]:
    """Batches in order of their steps, each with its staleness; workers take ``speeds`` seconds for a piece."""
    landed: list[tuple[int, int]] = []
    busy: dict[int, tuple[float, Piece]] = {}
    now = 0.0
    while version < TOTAL:
        while (flight := flights.ripe(version)) is not None:
            assert flight.version is not None
            landed.append((flight.batch, version - flight.version))
            version += 1
        for worker, speed in enumerate(speeds, 1):
            if worker not in busy and (piece := flights.wanted(len(speeds))) is not None:
                piece.version, piece.member = version, worker
                busy[worker] = now + speed * chance.uniform(0.5, 1.5), piece
        if not busy:
            assert version == TOTAL, "nobody has anything to do"
            break
        worker = min(busy, key=lambda worker: busy[worker][0])
        now, piece = busy.pop(worker)
        if chance.random() < deaths:
            assert flights.lost(worker) == [piece]
        else:
            flights.arrived(piece)
    return landed


@pytest.mark.parametrize("bound", [0, 1, 2, 5, 40, None])
@pytest.mark.parametrize("workers", [1, 2, 3, 8])
@pytest.mark.parametrize("deaths", [0.0, 0.2])
def test_every_batch_makes_one_step_and_none_is_late(bound: int | None, workers: int, deaths: float) -> None:
    chance = random.Random(f"{bound} {workers} {deaths}")
    for seed in range(5):
        speeds = [1.0] * (workers - 1) + [chance.choice([1.0, 10.0, 500.0])]
        landed = simulated(Flights(8, TOTAL, bound, 0), speeds, random.Random(seed), deaths)
        assert sorted(batch for batch, _ in landed) == list(range(TOTAL))
        assert bound is None or max(age for _, age in landed) <= bound
        if bound == 0:
            assert [batch for batch, _ in landed] == list(range(TOTAL))


def test_without_a_bound_the_slow_are_late() -> None:
    landed = simulated(Flights(8, TOTAL, None, 0), [1.0, 1.0, 30.0], random.Random(1))
    assert max(age for _, age in landed) > 20


def test_who_would_run_ahead_waits_for_the_slowest() -> None:
    flights = Flights(4, TOTAL, 2, 0)
    slow = flights.wanted(2)
    assert slow is not None
    slow.version, slow.member = 0, 1
    for version in range(2):
        fast = flights.wanted(2)
        assert fast is not None
        fast.version, fast.member = version, 2
        flights.arrived(fast)
        assert flights.ripe(version) is not None
    fast = flights.wanted(2)
    assert fast is not None
    fast.version = 2
    flights.arrived(fast)
    assert flights.ripe(2) is None
    flights.arrived(slow)
    first = flights.ripe(2)
    assert first is not None
    assert (first.batch, first.version) == (0, 0)
    second = flights.ripe(3)
    assert second is not None
    assert second.version == 2


def test_workers_share_a_batch_where_few_may_be_under_way() -> None:
    flights = Flights(8, TOTAL, 1, 0)
    pieces = []
    for _ in range(4):
        piece = flights.wanted(4)
        assert piece is not None
        piece.version = 0
        pieces.append((piece.batch, piece.lo, piece.hi))
    assert pieces == [(0, 0, 4), (0, 4, 8), (1, 0, 4), (1, 4, 8)]
    assert flights.wanted(4) is None


def test_what_was_left_out_comes_first() -> None:
    flights = Flights(8, TOTAL, None, 12, (7, 9))
    landed = simulated(flights, [1.0], random.Random(2), version=10)
    assert [batch for batch, _ in landed] == [7, 9, *range(12, TOTAL)]


def test_batches_under_way_are_pending() -> None:
    flights = Flights(8, TOTAL, None, 3, (1,))
    for _ in range(3):
        piece = flights.wanted(3)
        assert piece is not None
        piece.version = 2
    assert flights.pending == (1, 3, 4)
    flights.arrived(piece)
    assert flights.ripe(2) is not None
    assert flights.pending == (1, 3)
