import json
import os
from pathlib import Path

import pytest

from dptrain.errors import StorageError
from dptrain.journal import Journal, read_all, read_steps


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal.jsonl"


def test_lines_come_back_in_order(path: Path) -> None:
    journal = Journal(path)
    lines = [{"step": 1, "loss": 0.1 + 0.2}, {"event": "warning", "text": "a\nb ä"}, {"step": 2, "loss": None}]
    for line in lines:
        journal.write(line)
    journal.close()
    journal.close()
    assert read_all(path) == [{**line, "attempt": 1} for line in lines]
    assert path.read_bytes().count(b"\n") == 3


def test_every_start_is_another_attempt(path: Path) -> None:
    for attempt in (1, 2, 3):
        journal = Journal(path)
        assert journal.attempt == attempt
        journal.write({"step": attempt})
        journal.close()
    assert [line["attempt"] for line in read_all(path)] == [1, 2, 3]


@pytest.mark.parametrize("torn", [b'{"step": 3, "lo', b"{", b'{"step": 3}', b"\xff\x00"])
def test_a_last_line_cut_short_costs_only_itself(path: Path, torn: bytes) -> None:
    whole = b'{"step": 2, "attempt": 1}\n'
    path.write_bytes(whole + torn)
    journal = Journal(path)
    assert journal.attempt == 2
    journal.write({"step": 3, "loss": 1.0})
    journal.write({"step": 4, "loss": 1.0})
    journal.close()
    assert path.read_bytes().startswith(whole + torn + b"\n{")
    assert [line["step"] for line in read_steps(path)] == [2, 3, 4]
    assert read_steps(path)[1]["loss"] == 1.0


def test_readers_take_the_last_attempt_of_a_step(path: Path) -> None:
    lines = [(1, 1, "a"), (2, 1, "b"), (3, 1, "c"), (2, 2, "d"), (3, 2, "e"), (4, 2, "f"), (3, 1, "late")]
    text = "".join(json.dumps({"step": s, "attempt": a, "loss": x}) + "\n" for s, a, x in lines)
    path.write_text(text + '{"event": "warning", "attempt": 9}\n[1]\n{"step": 4, "attempt": "odd"}\n')
    assert [line["loss"] for line in read_steps(path)] == ["a", "d", "e", "f"]
    assert Journal(path).attempt == 10


def test_no_journal_has_no_lines(path: Path) -> None:
    assert read_all(path) == read_steps(path) == []


def test_a_journal_that_cannot_be_opened_is_a_storage_error(path: Path) -> None:
    path.mkdir()
    with pytest.raises(StorageError, match=r"journal .*: expected to be written, found Is a directory"):
        Journal(path)


def test_a_full_disk_is_a_storage_error(path: Path) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("this system has no /dev/full")
    journal = Journal(path)
    handle = os.open(full, os.O_WRONLY)
    os.dup2(handle, journal._file._handle)  # type: ignore[union-attr]
    os.close(handle)
    with pytest.raises(StorageError, match="No space left on device; make room, then go on with --resume"):
        journal.write({"step": 1})
    with pytest.raises(StorageError):
        journal.close()
    journal.close()
