import json
from pathlib import Path
from typing import Any

from dptrain.service.page.curves import curves


def line(step: int, attempt: int = 1, **more: Any) -> dict[str, Any]:
    plain = {"step": step, "epoch": step / 10, "loss": 1 / step, "lr": 0.1, "samples_per_second": 5.0, "seconds": 1.0}
    return {**plain, "compute": [0.2, 0.4], "wait": [0.1, 0.3], "attempt": attempt, **more}


def write(path: Path, *lines: dict[str, Any]) -> None:
    with path.open("a") as file:
        file.writelines(json.dumps(one) + "\n" for one in lines)


def test_lines_are_read_once_and_whole(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    assert curves(path, 0) == {"rows": [], "metrics": {}, "events": [], "workers": [], "cursor": 0}
    write(path, line(1), line(2, metrics={"accuracy": 0.5}), {"event": "warning", "text": "x", "attempt": 1})
    with path.open("a") as file:
        file.write('{"step": 3, "lo')
    first = curves(path, 0)
    assert [row[0] for row in first["rows"]] == [1, 2]
    assert first["rows"][1] == [2, 1.0, 0.2, 0.5, 0.1, 5.0, 1, (0.2 + 0.4) / 2, (0.1 + 0.3) / 2]
    assert first["metrics"] == {"accuracy": [[2, 0.5]]}
    assert first["events"][0]["text"] == "x"
    assert first["workers"] == [[0.4, 0.2], [0.8, 0.6]]
    assert curves(path, first["cursor"])["rows"] == []
    with path.open("a") as file:
        file.write('ss": 1}\n')
    write(path, line(4))
    again = curves(path, first["cursor"])
    assert [row[0] for row in again["rows"]] == [3, 4]
    assert again["cursor"] == path.stat().st_size


def test_a_step_that_comes_again_replaces_what_came_after_it(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    write(path, *map(line, range(1, 8)), line(4, 2, loss=9.0), line(6, 2, loss=8.0))
    assert [(row[0], row[3]) for row in curves(path, 0)["rows"]][3:] == [(4, 9.0), (6, 8.0)]


def test_many_points_become_few_that_have_their_means(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    write(path, *map(line, range(1, 10_001)))
    rows = curves(path, 0, 500)["rows"]
    assert len(rows) == 500
    assert rows[-1][0] == 10_000
    assert abs(rows[0][3] - sum(1 / step for step in range(1, 21)) / 20) < 1e-12


def test_after_a_death_the_living_are_shown(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    write(path, line(1), line(2, compute=[0.5], wait=[0.25]))
    assert curves(path, 0)["workers"] == [[0.5, 0.25]]


def test_another_file_is_read_from_its_beginning(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    write(path, line(1))
    assert [row[0] for row in curves(path, 10_000)["rows"]] == [1]


def test_what_is_no_line_of_ours_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_text('[1]\nnonsense\n{"step": "odd"}\n{"step": 1}\n')
    assert curves(path, 0)["rows"] == [[1, None, None, None, None, None, 0, None, None]]
