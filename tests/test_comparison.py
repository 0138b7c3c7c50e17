import copy
from pathlib import Path

import pytest

import dptrain
from dptrain.cli.compare import drawn, lines
from dptrain.comparison import compare
from dptrain.errors import StorageError
from tests.softmax import LAYERS, job


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("runs")
    other = job(copy.deepcopy(LAYERS), optimizer={"lr": 0.1})
    other["model"]["layers"][0]["units"] = 12
    for name, content in (("a", job(LAYERS)), ("again", job(LAYERS)), ("other", other)):
        dptrain.train(content, run_dir=folder / name)
    return [folder / name for name in ("a", "again", "other")]


def test_equal_runs_differ_in_nothing(runs: list[Path]) -> None:
    found = compare(runs[:2])
    assert (found.differences, found.same_job, found.same_weights) == ({}, True, True)
    assert found.runs[0].curve == found.runs[1].curve != []
    text = "\n".join(lines(found))
    assert "no key of the job differs" in text
    assert "weights  the same" in text


def test_differences_are_named(runs: list[Path]) -> None:
    found = compare(runs)
    assert found.differences == {"optimizer.lr": [0.5, 0.5, 0.1], "model.layers.0.units": [24, 24, 12]}
    assert (found.same_job, found.same_weights) == (False, False)
    text = "\n".join(lines(found))
    assert "weights  different" in text
    assert "optimizer.lr          0.5  0.5    0.1" in text
    assert found.plain()["runs"][2]["figures"]["steps"] == 20


def test_a_run_without_a_result_is_compared_as_far_as_it_is(runs: list[Path], tmp_path: Path) -> None:
    for name in ("job.toml", "journal.jsonl"):
        (tmp_path / name).write_bytes((runs[0] / name).read_bytes())
    found = compare([runs[0], tmp_path])
    assert found.runs[1].state == "unfinished"
    assert found.runs[1].figures["steps"] == 20
    assert found.same_weights is None
    assert "weights  not known yet" in lines(found)


def test_a_run_beside_itself_is_numbered(runs: list[Path]) -> None:
    assert lines(compare([runs[0], runs[0]], ["abc", "abc"]))[0].split() == ["abc", "(1)", "abc", "(2)"]
    assert lines(compare(runs[:2], ["a/run", "b/run"]))[0].split() == ["a/run", "b/run"]


def test_a_directory_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="name the directory of a run"):
        compare([tmp_path, tmp_path])


def test_curves_share_a_scale() -> None:
    high, low = drawn([[(0, 10.0), (99, 1.0)], [(0, 1.0), (49, 0.1)]])
    assert (high[0], low[19]) == ("█", "▁")
    assert low[0] == high[-1]
    assert len(low) == len(high) // 2
    assert drawn([[], []]) == ["", ""]
    assert drawn([[(1, 2.0)]]) != [""]
