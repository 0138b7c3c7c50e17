import numpy as np
import pytest

from dptrain.phases import Phase
from dptrain.straggler import Pace, Slowest

NOISE = 0.15


def run(shards: list[int], times: list[float], steps: int = 100, seed: int = 0, noise: float = NOISE) -> Slowest | None:
    """Steps in which workers take ``times`` seconds, more or less, three parts of four of it in forward."""
    rng = np.random.default_rng(seed)
    pace = Pace(shards)
    phases = np.zeros((len(shards), len(Phase)))
    phases[:, Phase.WAITING] = 1e6
    for _ in range(steps):
        took = np.array(times) * rng.gamma(1 / noise**2, noise**2, len(times))
        pace.stepped(tuple(took.tolist()))
        phases[:, Phase.FORWARD] += took * 0.75
        phases[:, Phase.BACKWARD] += took * 0.25
    return pace.slowest(phases)


@pytest.mark.parametrize("steps", [32, 100, 1000])
@pytest.mark.parametrize("slow", [0, 1, 2, 3])
def test_a_clearly_slow_worker_is_named(slow: int, steps: int) -> None:
    times = [1.0] * 4
    times[slow] = 1.8
    found = run([2] * 4, times, steps)
    assert found is not None
    assert (found.rank, found.phase) == (slow, "forward")
    assert found.times == pytest.approx(1.8, rel=0.15)


def test_of_two_one_can_be_slow() -> None:
    found = run([4, 4], [1.0, 2.0])
    assert found is not None
    assert found.rank == 1


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("workers", [2, 3, 8])
def test_noise_names_nobody(workers: int, seed: int) -> None:
    assert run([1] * workers, [1.0] * workers, seed=seed, noise=1.0) is None


def test_a_little_slow_is_not_clearly_slow() -> None:
    assert run([1] * 3, [1.0, 1.1, 1.0]) is None


def test_too_few_steps_say_nothing() -> None:
    assert run([1] * 3, [1.0, 3.0, 1.0], steps=31) is None


def test_a_few_terrible_steps_name_nobody() -> None:
    pace, phases = Pace([1, 1]), np.ones((2, len(Phase)))
    for step in range(200):
        pace.stepped((1.0, 50.0 if step < 20 else 1.0))
    assert pace.slowest(phases) is None


@pytest.mark.parametrize("times", [[2.0, 3.0, 3.0], [3.0, 3.0, 3.0], [2.9, 3.0, 3.1]])
def test_more_shards_may_take_longer_and_fewer_as_long(times: list[float]) -> None:
    assert run([2, 3, 3], times) is None


def test_fewer_shards_than_the_others_must_take_longer_than_they() -> None:
    found = run([2, 3, 3], [4.5, 3.0, 3.0])
    assert found is not None
    assert found.rank == 0
    found = run([1, 1, 2], [1.0, 1.0, 3.0])
    assert found is not None
    assert found.rank == 2
    assert found.times == pytest.approx(1.5, rel=0.1)


def test_spares_neither_count_nor_are_named() -> None:
    assert run([1, 1, 0, 0, 0], [1.0, 1.0, 0.0, 0.0, 0.0], noise=0.05) is None
    found = run([1, 1, 1, 0, 0], [1.0, 2.0, 1.0, 0.0, 9.0])
    assert found is not None
    assert found.rank == 1
    assert run([1, 0], [2.0, 0.0]) is None


def test_where_most_are_slow_it_is_no_workers_fault() -> None:
    assert run([1, 1, 1], [1.0, 2.0, 2.0]) is None


def test_the_phase_with_the_largest_excess_is_named() -> None:
    pace = Pace([1, 1, 1])
    phases = np.zeros((3, len(Phase)))
    phases[:, Phase.DATA] = 0.1, 0.5, 0.1
    phases[:, Phase.BACKWARD] = 10.0, 12.0, 10.0
    phases[:, Phase.EVALUATION] = 0.0, 99.0, 0.0
    for _ in range(64):
        pace.stepped((1.0, 1.5, 1.0))
    assert pace.slowest(phases) == Slowest(1, "backward", 1.2)
