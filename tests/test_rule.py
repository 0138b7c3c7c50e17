from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from dptrain.job.spec import Stop, Train
from dptrain.rule import Rule
from dptrain.state import Judgement, State

NAN = float("nan")


def rule(validated: bool = True, steps_per_epoch: int = 10, stop: Stop | None = None, **train: Any) -> Rule:
    return Rule(Train(**{"steps": 100, **train}, stop=stop or Stop()), steps_per_epoch, validated)


def state(step: int, judgement: Judgement | None = None) -> State:
    return State(step, step, np.zeros(0), (), 0, judgement or Judgement())


def judged(made: Rule, values: list[float]) -> tuple[Judgement, list[bool]]:
    judgement, best = Judgement(), []
    for i, value in enumerate(values):
        judgement, improved = made.judge(judgement, i + 1, value)
        best.append(improved)
    return judgement, best


def test_the_length_is_in_steps_or_epochs() -> None:
    assert rule(steps=7).total_steps == 7
    assert rule(steps=0, epochs=3).total_steps == 30
    assert [rule(steps=7).done(state(step)) for step in (0, 6, 7, 8)] == [False, False, True, True]


@pytest.mark.parametrize(
    ("every", "steps", "expected"),
    [(0, 35, [10, 20, 30]), (7, 30, [7, 14, 21, 28]), (1, 3, [1, 2, 3]), (50, 30, [])],
)
def test_evaluations_come_at_multiples_of_the_interval(every: int, steps: int, expected: list[int]) -> None:
    made = rule(steps=steps, evaluate_steps=every)
    assert [step for step in range(steps + 1) if made.evaluates(state(step))] == expected
    assert not any(rule(validated=False, steps=steps).evaluates(state(step)) for step in range(steps + 1))


def test_an_extended_training_makes_the_evaluations_of_a_long_one() -> None:
    short, long = rule(steps=25), rule(steps=60)
    due = [{step for step in range(26) if made.evaluates(state(step))} for made in (short, long)]
    assert due[0] == due[1]


def test_a_state_is_evaluated_once() -> None:
    made = rule()
    assert made.evaluates(state(10))
    assert not made.evaluates(state(10, Judgement(evaluated=10)))
    assert made.evaluates(state(20, Judgement(evaluated=10)))


@pytest.mark.parametrize(
    ("metric", "target", "values", "ends"),
    [
        ("loss", 0.5, [0.9, 0.6], False),
        ("loss", 0.5, [0.9, 0.5], True),
        ("loss", 0.5, [0.4, 0.9], True),
        ("accuracy", 0.9, [0.5, 0.89], False),
        ("accuracy", 0.9, [0.5, 0.9], True),
        ("mae", 1.0, [2.0], False),
        ("mae", 1.0, [0.9], True),
        ("r2", 0.0, [-1.0, 0.1], True),
        ("loss", 0.5, [NAN], False),
        ("loss", None, [0.0], False),
    ],
)
def test_target(metric: Any, target: float | None, values: list[float], ends: bool) -> None:
    made = rule(stop=Stop(metric=metric, target=target))
    judgement, _ = judged(made, values)
    assert made.done(state(len(values), judgement)) == ends
    assert (made.reached(judgement) != "") == ends
    assert not ends or made.reached(judgement).startswith(f"{metric} reached ")


@pytest.mark.parametrize(
    ("min_delta", "values", "without_gain", "best"),
    [
        (0.0, [3, 2, 1], 0, 1),
        (0.0, [3, 3, 3], 2, 3),
        (0.0, [1, 2, 3], 2, 1),
        (0.0, [3, 4, 2], 0, 2),
        (0.5, [3, 2.75, 2.5], 2, 2.5),
        (0.5, [3, 2.75, 2.25], 0, 2.25),
        (0.0, [NAN, NAN], 2, None),
        (0.0, [3, NAN, 2], 0, 2),
        (0.0, [3, NAN, NAN], 2, 3),
        (0.0, [float("inf"), 3], 0, 3),
    ],
)
def test_patience(min_delta: float, values: list[float], without_gain: int, best: float | None) -> None:
    for metric, sign in (("loss", 1), ("accuracy", -1)):
        made = rule(stop=Stop(metric=metric, patience=2, min_delta=min_delta))  # type: ignore[arg-type]
        judgement, _ = judged(made, [sign * value for value in values])
        assert judgement.without_gain == without_gain
        assert judgement.best == (None if best is None else sign * best)
        assert made.done(state(3, judgement)) == (without_gain >= 2)


def test_best_is_by_value_even_below_min_delta() -> None:
    made = rule(stop=Stop(min_delta=0.5))
    judgement, best = judged(made, [3.0, 2.9, 2.95, NAN, 2.0])
    assert best == [True, True, False, False, True]
    assert (judgement.best, judgement.best_step, judgement.evaluated) == (2.0, 5, 5)


def test_a_judgement_does_not_depend_on_when_it_was_interrupted() -> None:
    made = rule(stop=Stop(patience=9))
    whole, _ = judged(made, [3, 4, 2, 5, 6])
    half, _ = judged(made, [3, 4])
    half = replace(half)
    for step, value in ((3, 2), (4, 5), (5, 6)):
        half, _ = made.judge(half, step, value)
    assert half == whole
