"""The plan never gives out more than there is, tells of everybody, and lets everybody have their turn."""

import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dptrain.service.model import Reason
from dptrain.service.scheduler import (
    AGING,
    BACK_OFF,
    LONGEST_BACK_OFF,
    PATIENCE,
    SETTLED,
    Kept,
    Running,
    Waiting,
    back_off,
    outlived,
    plan,
)

NOW = 1_000_000.0


def waiting(
    name: str, least: int = 1, most: int = 0, priority: int = 0, age: float = 1.0, later: float = 0.0
) -> Waiting:
    return Waiting(name, least, most or least, priority, NOW - age, NOW - age, NOW + later if later else 0.0)


def running(name: str, workers: int, least: int = 0, most: int = 0, priority: int = 0, age: float = 100.0) -> Running:
    return Running(name, workers, least or workers, most or workers, priority, NOW - age)


@st.composite
def queues(draw: st.DrawFn) -> tuple[list[Waiting], list[Running], int]:
    slots = draw(st.integers(1, 8))
    found = []
    for number in range(draw(st.integers(0, 8))):
        least = draw(st.integers(1, 9))
        most = draw(st.integers(least, 12))
        age, later = draw(st.floats(0, 5000)), draw(st.sampled_from([0.0, 0.0, 5.0]))
        found.append(waiting(f"w{number}", least, most, draw(st.integers(-3, 3)), age, later))
    held, busy = 0, []
    for number in range(draw(st.integers(0, 4))):
        workers = draw(st.integers(1, 8))
        if held + workers > slots:
            break
        held += workers
        least, most = draw(st.integers(1, workers)), draw(st.integers(workers, 10))
        job = running(f"r{number}", workers, least, most, draw(st.integers(-3, 3)), draw(st.floats(0, 100)))
        busy.append(replace(job, leaving=draw(st.booleans())))
    return found, busy, slots


@given(queues())
def test_never_more_than_there_is_and_nobody_is_forgotten(queue: tuple[list[Waiting], list[Running], int]) -> None:
    waits, runs, slots = queue
    found = plan(waits, runs, slots, NOW)
    assert sum(job.workers for job in runs) + sum(found.starts.values()) <= slots
    assert found.starts.keys() | found.reasons.keys() == {job.id for job in waits}
    assert not found.starts.keys() & found.reasons.keys()
    by_id = {job.id: job for job in waits}
    for name, workers in found.starts.items():
        assert by_id[name].least <= workers <= by_id[name].most
        assert by_id[name].not_before <= NOW
    held = {job.id: job for job in runs}
    for name, workers in found.resizes.items():
        assert not held[name].leaving
        assert held[name].least <= workers <= held[name].most
        assert workers != held[name].workers
    grown = sum(workers - held[name].workers for name, workers in found.resizes.items())
    assert sum(job.workers for job in runs) + sum(found.starts.values()) + max(0, grown) <= slots
    assert all(message or reason is Reason.BACK_OFF for reason, message in found.reasons.values())


@given(queues())
def test_the_plan_does_not_depend_on_the_order_in_which_jobs_are_told(
    queue: tuple[list[Waiting], list[Running], int],
) -> None:
    waits, runs, slots = queue
    found = plan(waits, runs, slots, NOW)
    assert plan(waits[::-1], runs[::-1], slots, NOW) == found


@given(queues())
def test_it_asks_to_be_asked_again_whenever_time_alone_would_change_it(
    queue: tuple[list[Waiting], list[Running], int],
) -> None:
    waits, runs, slots = queue
    found = plan(waits, runs, slots, NOW)
    backing = [job for job in waits if found.reasons.get(job.id, (None, ""))[0] is Reason.BACK_OFF]
    assert all(found.wake is not None and found.wake <= job.not_before for job in backing)


@pytest.mark.parametrize("slots", [2, 3, 6])
@pytest.mark.parametrize("seed", range(10))
def test_every_job_that_fits_gets_its_turn(seed: int, slots: int) -> None:
    """Against an endless stream of small jobs of a higher priority: a large one of the lowest runs at last."""
    rng = random.Random(seed)
    victim = Waiting("victim", slots, slots, -5, 0.0, 0.0)
    waits, runs = [victim], dict[str, tuple[float, int]]()
    now, number = 0.0, 0
    while now < 40 * AGING:
        now += PATIENCE / 4
        runs = {name: (end, n) for name, (end, n) in runs.items() if end > now}
        while len(waits) < 4:
            number += 1
            waits.append(Waiting(f"small{number}", 1, 1, 3, now, now))
        busy = [Running(name, n, n, n, 0, 0.0) for name, (_, n) in runs.items()]
        for name, workers in plan(waits, busy, slots, now).starts.items():
            if name == "victim":
                return
            runs[name] = now + rng.uniform(1, 300), workers
            waits = [job for job in waits if job.id != name]
    raise AssertionError("it never had its turn")


def test_priority_comes_first_then_time() -> None:
    found = plan([waiting("new", age=1), waiting("old", age=9), waiting("high", priority=1, age=0)], [], 2, NOW)
    assert list(found.starts) == ["high", "old"]
    assert found.reasons["new"][0] is Reason.WAITING_FOR_SLOTS


def test_waiting_is_worth_priority() -> None:
    found = plan([waiting("high", priority=1), waiting("old", age=2 * AGING)], [], 1, NOW)
    assert list(found.starts) == ["old"]


def test_all_workers_start_together_or_none() -> None:
    found = plan([waiting("gang", least=3)], [running("r", 1)], 3, NOW)
    assert not found.starts
    assert found.reasons["gang"] == (Reason.WAITING_FOR_SLOTS, "it wants 3 workers, 2 of 3 slots are free")


def test_a_range_takes_what_nobody_waits_for() -> None:
    assert plan([waiting("a", 1, 8)], [], 4, NOW).starts == {"a": 4}
    assert plan([waiting("a", 1, 8, age=2), waiting("b", 1)], [], 4, NOW).starts == {"a": 3, "b": 1}
    assert plan([waiting("a", 1, 8, age=2), waiting("b", 4)], [], 4, NOW).starts == {"a": 1}


def test_one_that_does_not_fit_lets_others_pass_for_a_while_only() -> None:
    small = waiting("small", 1, age=0.5)
    assert plan([waiting("big", 2, age=PATIENCE - 1), small], [running("r", 1)], 2, NOW).starts == {"small": 1}
    found = plan([waiting("big", 2, age=PATIENCE), small], [running("r", 1)], 2, NOW)
    assert not found.starts
    assert found.reasons["small"][0] is Reason.BEHIND_OTHERS
    assert "big" in found.reasons["small"][1]


def test_too_large_is_said_and_holds_nobody_up() -> None:
    found = plan([waiting("huge", 9, age=1e6), waiting("a")], [], 2, NOW)
    assert found.starts == {"a": 1}
    assert found.reasons["huge"] == (Reason.TOO_LARGE, "it wants 9 workers, this server has 2 slots")


def test_a_job_with_more_than_its_least_gives_way() -> None:
    found = plan([waiting("a", 2)], [running("r", 4, least=1, most=4)], 4, NOW)
    assert found.resizes == {"r": 2}
    assert not plan([waiting("a", 2)], [running("r", 4, least=3, most=4)], 4, NOW).resizes
    assert not plan([waiting("a", 2)], [running("r", 4, least=1, most=4, age=SETTLED / 2)], 4, NOW).resizes


def test_a_job_grows_into_what_is_free_when_nobody_waits() -> None:
    assert plan([], [running("r", 1, least=1, most=3)], 4, NOW).resizes == {"r": 3}
    young = plan([], [running("r", 1, least=1, most=3, age=SETTLED / 2)], 4, NOW)
    assert not young.resizes
    assert young.wake == NOW + SETTLED / 2


def test_back_off_doubles_up_to_a_limit() -> None:
    waits = [back_off(n) for n in range(1, 20)]
    assert waits[:3] == [BACK_OFF, 2 * BACK_OFF, 4 * BACK_OFF]
    assert waits == sorted(waits)
    assert waits[-1] == LONGEST_BACK_OFF


def test_what_outlives_its_time_and_what_is_too_much() -> None:
    kept = [Kept("a", NOW - 100, 5), Kept("b", NOW - 50, 5), Kept("c", NOW - 1, 50)]
    assert outlived(kept, NOW, 60, 0) == ["a"]
    assert outlived(kept, NOW, 0, 55) == ["a"]
    assert outlived(kept, NOW, 0, 1) == ["a", "b"]
    assert outlived(kept, NOW, 0, 0) == []
