"""A keeper keeps what is printed whole and bounded, and begins no launch twice."""

import json
import os
from pathlib import Path

from dptrain.service import keeper
from dptrain.service.keeper import BEGUN, EXIT, LOG, ORDER, Order, _Log


def kept(folder: Path) -> list[tuple[str, int, str]]:
    return [(line["s"], line["r"], line["l"]) for line in map(json.loads, (folder / LOG).read_text().splitlines())]


def test_lines_are_kept_in_whatever_pieces_they_come(tmp_path: Path) -> None:
    log = _Log(tmp_path / LOG, 1 << 20)
    text = "step=1 ä\nrank 12 at step 3: bad\r\ndptrain: rank 4: worse\n\x00\x1b[2J\nno end".encode()
    for i in range(len(text)):
        log.take("out", text[i : i + 1])
    log.take("err", b"half")
    log.close()
    assert kept(tmp_path) == [
        ("out", 0, "step=1 ä"),
        ("out", 12, "rank 12 at step 3: bad"),
        ("out", 4, "dptrain: rank 4: worse"),
        ("out", 0, "\x00\x1b[2J"),
        ("out", 0, "no end"),
        ("err", 0, "half"),
    ]


def test_a_line_without_end_is_cut_and_a_full_log_says_so_once(tmp_path: Path) -> None:
    log = _Log(tmp_path / LOG, 100_000)
    log.take("out", b"x" * 40_000)
    for _ in range(100):
        log.take("out", b"y" * 5_000 + b"\n")
    log.close()
    found = [text for _, _, text in kept(tmp_path)]
    assert [len(text) for text in found[:3]] == [16_384, 16_384, 40_000 - 2 * 16_384 + 5_000]
    assert sum("the log is full" in text for text in found) == 1
    assert found[-1].startswith("dptrain: the log is full")
    assert (tmp_path / LOG).stat().st_size < 101_000


def test_a_line_that_a_dead_keeper_left_unfinished_spoils_no_other(tmp_path: Path) -> None:
    (tmp_path / LOG).write_text('{"t":1,"s":"ou')
    log = _Log(tmp_path / LOG, 1 << 20)
    log.take("out", b"next\n")
    log.close()
    assert json.loads((tmp_path / LOG).read_text().splitlines()[1])["l"] == "next"


def test_a_launch_that_has_begun_is_not_begun_again(tmp_path: Path) -> None:
    order = Order(2, ["--version"], 1 << 20, 0)
    (tmp_path / ORDER).write_text(json.dumps(order._asdict()))
    (tmp_path / BEGUN).write_text('{"launch": 2, "pid": 1, "born": 1, "time": 1.0}\n{"launch": 3, "pi')
    lock = keeper.lock(tmp_path)
    assert lock is not None
    assert keeper.lock(tmp_path) is None
    with lock:
        assert keeper.main(tmp_path, os.dup(lock.fileno())) == 0
    assert keeper.launches(tmp_path) == 2
    assert not (tmp_path / EXIT).exists()
    assert not (tmp_path / LOG).exists()
