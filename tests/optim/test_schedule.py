import math

import pytest

from dptrain.job import spec
from dptrain.optim import make_schedule


def rates(lr=0.4, total=20, **settings):
    schedule = make_schedule(spec.Schedule(**settings), lr, total)
    return [schedule.at(count) for count in range(1, total + 1)]


def test_constant_with_warm_up():
    assert rates() == [0.4] * 20
    assert rates(warmup_steps=4)[:6] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4, 0.4], rel=1e-15)


def test_steps():
    found = rates(type="step", step_size=3, gamma=0.5, warmup_steps=2)
    expected = [0.2, 0.4] + [0.4 * 0.5 ** (u // 3) for u in range(18)]
    assert found == pytest.approx(expected, rel=1e-15)


def test_cosine_over_what_the_warm_up_leaves():
    found = rates(type="cosine", minimum=0.1, warmup_steps=5)
    assert found[:5] == pytest.approx([0.08, 0.16, 0.24, 0.32, 0.4], rel=1e-15)
    expected = [0.1 + 0.3 * (1 + math.cos(math.pi * u / 15)) / 2 for u in range(15)]
    assert found[5:] == pytest.approx(expected, rel=1e-11)


def test_cosine_stays_at_its_minimum():
    found = rates(type="cosine", minimum=0.1, decay_steps=8)
    assert found[0] == 0.4
    assert found[4] == pytest.approx(0.25, rel=1e-11)
    assert found[8:] == [0.1] * 12


def test_a_rate_depends_on_the_count_alone():
    schedule = make_schedule(spec.Schedule(type="cosine"), 0.4, 20)
    assert [schedule.at(count) for count in (7, 3, 7)] == [rates(type="cosine")[i] for i in (6, 2, 6)]


def test_a_warm_up_longer_than_the_training():
    assert rates(type="cosine", warmup_steps=40) == pytest.approx([0.01 * c for c in range(1, 21)], rel=1e-14)
