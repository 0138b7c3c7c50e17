import os
from pathlib import Path

import pytest

from dptrain import rundir
from dptrain.errors import StorageError, UsageError


def run(path: Path, at: int) -> Path:
    path.mkdir(parents=True)
    (path / rundir.JOURNAL).write_text("")
    os.utime(path / rundir.JOURNAL, ns=(at, at))
    return path


def test_fresh_directories_are_new_and_named_after_the_job(tmp_path: Path) -> None:
    found = [rundir.fresh(tmp_path / "runs", "my job/7") for _ in range(4)]
    assert len(set(found)) == 4
    assert all(path.is_dir() and path.name.startswith("my_job_7-2") for path in found)
    assert rundir.fresh(tmp_path, "..").name.startswith("job-")


def test_the_newest_run_of_a_job_is_found(tmp_path: Path) -> None:
    run(tmp_path / "mlp-20250101-000000", 5)
    newest = run(tmp_path / "mlp-20240101-000000-2", 7)
    run(tmp_path / "mlp-large-20250101-000000", 9)
    run(tmp_path / "mlp-x", 9)
    (tmp_path / "mlp-20260101-000000").mkdir()
    assert rundir.newest(tmp_path, "mlp") == newest
    for runs, name in ((tmp_path, "cnn"), (tmp_path / "none", "mlp")):
        with pytest.raises(UsageError, match="found none"):
            rundir.newest(runs, name)


def test_a_directory_of_ones_own_is_made_or_taken_empty(tmp_path: Path) -> None:
    assert rundir.claim(tmp_path / "a/b", resume=False).is_dir()
    assert rundir.claim(tmp_path / "a/b", resume=False).is_dir()
    (tmp_path / "a/b/notes.txt").write_text("mine")
    assert rundir.claim(tmp_path / "a/b", resume=False).is_dir()


@pytest.mark.parametrize("left", [rundir.JOURNAL, rundir.RESULT, rundir.CHECKPOINTS])
def test_a_run_is_only_taken_to_resume_it(tmp_path: Path, left: str) -> None:
    (tmp_path / left).mkdir()
    with pytest.raises(UsageError, match=f"found {left} of an earlier one; go on with --resume"):
        rundir.claim(tmp_path, resume=False)
    assert rundir.claim(tmp_path, resume=True) == tmp_path


def test_a_file_in_the_way_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("")
    for path in (tmp_path / "x", tmp_path / "x/y"):
        with pytest.raises(StorageError, match="choose another"):
            rundir.claim(path, resume=False)
    with pytest.raises(StorageError):
        rundir.fresh(tmp_path / "x", "job")
    with pytest.raises(StorageError):
        rundir.write_json(tmp_path / "x/y.json", {})


def test_json_is_written_whole_and_read_back(tmp_path: Path) -> None:
    rundir.write_json(tmp_path / "x.json", {"a": [1, 2.5, "ä", None]})
    assert rundir.read_json(tmp_path / "x.json") == {"a": [1, 2.5, "ä", None]}
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]
    (tmp_path / "x.json").write_text("{")
    for name, found in (("x.json", "valid JSON"), ("none.json", "a readable file"), (".", "a readable file")):
        with pytest.raises(StorageError, match=f"expected {found}"):
            rundir.read_json(tmp_path / name)
