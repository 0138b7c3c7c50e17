"""The log of arrivals: what a run writes is read, and what no run can have written is refused, by its step."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dptrain.arrivals import Arrival, Part, arrival, read, share_of
from dptrain.errors import StorageError

Line = dict[str, Any]

ARRIVALS = [
    Arrival(0, (Part(0, 8, 0, 1),), 0, 1.0, ()),
    Arrival(2, (Part(0, 4, 0, 2), Part(4, 8, 1, 1)), 1, 0.5, ()),
    Arrival(1, (Part(0, 8, 2, 1),), 0, 1.0, ()),
]


def written(path: Path, lines: list[Line]) -> list[Arrival]:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return read(path, steps=3, shards=8, bound=1)


def lines() -> list[Line]:
    return [one.line(step) | {"attempt": 1} for step, one in enumerate(ARRIVALS, 1)]


def test_what_is_written_is_read(tmp_path: Path) -> None:
    assert written(tmp_path / "log", lines()) == ARRIVALS


def test_the_last_attempt_of_a_step_counts_and_a_torn_line_does_not(tmp_path: Path) -> None:
    stale = [{**lines()[1], "batch": 7}, lines()[0], {**lines()[2], "batch": 5}]
    path = tmp_path / "log"
    assert written(path, [*stale, *({**line, "attempt": 2} for line in lines())]) == ARRIVALS
    with path.open("a") as file:
        file.write('{"step": 3, "batch": 4, "att')
    assert read(path, steps=3, shards=8, bound=1) == ARRIVALS


@pytest.mark.parametrize(
    ("step", "change", "said"),
    [
        (2, lambda line: line.clear(), "no line of it"),
        (2, lambda line: line.update(batch="2"), "batch '2'"),
        (2, lambda line: line.update(batch=-1), "batch -1"),
        (3, lambda line: line.update(batch=2), "batch 2, which made step 2 too"),
        (2, lambda line: line.update(parts=None), "parts None"),
        (2, lambda line: line.update(parts=[[0, 8, 0]]), "parts"),
        (2, lambda line: line.update(parts=[[0, 8, 2, 1]]), "parts"),
        (2, lambda line: line.update(parts=[[0, 4, 0, 2], [5, 8, 1, 1]]), "not all of 8 shards once"),
        (2, lambda line: line.update(parts=[[0, 4, 0, 2]]), "not all of 8 shards once"),
        (2, lambda line: line.update(parts=[[0, 4, 0, 2], [4, 8, True, 1]]), "parts"),
        (2, lambda line: line.update(staleness=0), "staleness 0"),
        (2, lambda line: line.update(lr_share=0), "lr_share 0"),
        (2, lambda line: line.update(lr_share=float("nan")), "lr_share nan"),
        (3, lambda line: line.update(parts=[[0, 8, 0, 1]], staleness=2), "where exchange.staleness = 1"),
    ],
)
def test_a_spoilt_line_is_refused(step: int, change: Callable[[Line], None], said: str, tmp_path: Path) -> None:
    spoilt = lines()
    change(spoilt[step - 1])
    with pytest.raises(StorageError, match=f"step {step}") as caught:
        written(tmp_path / "log", spoilt)
    assert said in caught.value.found


def test_a_run_without_a_log_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="async or ssp"):
        read(tmp_path / "log", steps=1, shards=8, bound=None)


def test_an_arrival_survives_json() -> None:
    for one in ARRIVALS:
        assert arrival(json.loads(json.dumps(one))) == one
    assert arrival(None) is None


def test_the_share_of_the_learning_rate() -> None:
    assert [share_of(age, "inverse") for age in (0, 1, 3)] == [1.0, 0.5, 0.25]
    assert share_of(9, "constant") == 1.0
