"""Files that grow are read in any pieces, and every line once."""

import json
import random
from pathlib import Path

import pytest

from dptrain.errors import UsageError
from dptrain.service import books
from dptrain.service.books import Journals, Point, coarse, cursor_of, last_error, read, tail_of, wanted


def lines(n: int, seed: int = 3) -> list[dict[str, object]]:
    generator = random.Random(seed)
    return [{"n": i, "text": "ä\x85\u2028" * generator.randrange(6)} for i in range(n)]


def written(path: Path, content: list[dict[str, object]]) -> Path:
    path.write_bytes(b"".join(json.dumps(line, ensure_ascii=False).encode() + b"\n" for line in content))
    return path


@pytest.mark.parametrize("most", [100, 1000, 1 << 18])
def test_every_cursor_goes_on_with_the_next_line(tmp_path: Path, most: int) -> None:
    content = lines(200)
    path = written(tmp_path / "log", content)
    found, offset = [], 0
    while True:
        chunk = read(path, offset, most)
        if chunk.offset == offset:
            break
        for after, line in chunk.lines:
            found.append(line)
            rest = read(path, after).lines
            assert [entry for _, entry in rest] == content[len(found) :]
        offset = chunk.offset
    assert found == content


def test_what_is_not_whole_yet_waits_and_what_is_no_line_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "log"
    assert read(path, 7) == ([], 7)
    path.write_bytes(b'{"a": 1}\nnot json\n[1]\n\xff\n{"a": 2}\n{"a":')
    chunk = read(path, 0)
    assert [line["a"] for _, line in chunk.lines] == [1, 2]
    assert read(path, chunk.offset).lines == []
    with path.open("ab") as file:
        file.write(b" 3}\n")
    assert [line["a"] for _, line in read(path, chunk.offset).lines] == [3]
    # A line that is longer than all that is read at once does not stop those after it.
    path.write_bytes(b"x" * 500 + b'\n{"a": 4}\n')
    offset, found = 0, []
    while (chunk := read(path, offset, 100)).offset != offset:
        offset = chunk.offset
        found += [line["a"] for _, line in chunk.lines]
    assert found == [4]


@pytest.mark.parametrize("wished", [1, 2, 7, 50, 67, 1000])
def test_a_tail_has_so_many_accepted_lines(tmp_path: Path, wished: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(books, "_READ", 400)
    content = lines(200)
    path = written(tmp_path / "log", content)
    offset = tail_of(path, wished, lambda line: line["n"] % 3 == 0)
    accepted = [line for line in content if line["n"] % 3 == 0]  # type: ignore[operator]
    found = [line for _, line in read(path, offset, 1 << 20).lines if line["n"] % 3 == 0]
    assert found == accepted[-wished:]
    assert tail_of(tmp_path / "none", wished, lambda line: True) == 0


@pytest.mark.parametrize("text", ["-1", "1.5", "x", "9" * 20, "٣", " 1"])
def test_cursors_of_nobody_are_refused(text: str) -> None:
    assert (cursor_of(""), cursor_of("12")) == (0, 12)
    with pytest.raises(UsageError, match="cursor"):
        cursor_of(text)


def test_progress_is_that_of_the_newest_attempt(tmp_path: Path) -> None:
    path, journals = tmp_path / "journal.jsonl", Journals()
    assert journals.progress(path).step == 0
    first = {"step": 10, "seconds": 1.0, "epoch": 0.5, "loss": 2.0, "samples_per_second": 5.0, "attempt": 1}
    written(path, [first, first | {"step": 20, "seconds": 3.0, "metrics": {"validation": 1.0}}])
    found = journals.progress(path)
    assert (found.step, found.pace, found.metrics) == (20, 0.2, {"validation": 1.0})
    with path.open("a") as file:
        for line in ({"event": "recovery", "step": 12}, first | {"step": 11, "attempt": 2, "loss": None}):
            file.write(json.dumps(line) + "\n")
    found = journals.progress(path)
    assert (found.step, found.loss, found.recoveries, found.metrics) == (11, 2.0, 1, {"validation": 1.0})
    # A shorter file is another run's.
    written(path, [first])
    assert journals.progress(path).step == 10


def test_many_points_become_few_and_nothing_that_sticks_out_is_lost() -> None:
    points = [Point(i, float(i), float(i % 7), float(i % 7), float(i % 7)) for i in range(1000)]
    few = coarse(points, 13)
    assert len(few) == 13
    assert few[-1].step == 999
    assert (min(p.minimum for p in few), max(p.maximum for p in few)) == (0.0, 6.0)
    assert coarse(points[:13], 13) == points[:13]


def test_curves_are_asked_for_by_name_and_by_beginning() -> None:
    names = ["loss", "metric.accuracy", "compute.0", "wait.3"]
    assert [name for name in names if wanted([])(name)] == ["loss", "metric.accuracy"]
    assert [name for name in names if wanted(["loss", "wait.*"])(name)] == ["loss", "wait.3"]


def test_the_newest_error_is_dptrains_own_and_of_this_launch(tmp_path: Path) -> None:
    content: list[dict[str, object]] = [
        {"t": 5.0, "s": "err", "l": "dptrain: old"},
        {"t": 11.0, "s": "err", "l": "dptrain: the cause"},
        {"t": 12.0, "s": "out", "l": "dptrain: said on stdout"},
        {"t": 13.0, "s": "err", "l": "somebody else"},
    ]
    path = written(tmp_path / "log.jsonl", content)
    assert last_error(path, 10.0) == "the cause"
    assert last_error(path, 12.0) == ""
    assert last_error(tmp_path / "none", 0.0) == ""
