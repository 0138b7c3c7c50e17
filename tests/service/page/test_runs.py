"""A folder of runs as the page reads it."""

import itertools
import json
import os
import shutil
from pathlib import Path

from dptrain import presence
from dptrain.service.page.curves import Thinned
from dptrain.service.page.reading import Local
from dptrain.service.page.runs import MOST, POINTS, Runs


def line(step: int, attempt: int = 1, **more: object) -> str:
    told = {"step": step, "epoch": step / 10, "loss": 1.0 / step, "seconds": step / 2, "attempt": attempt}
    return json.dumps({**told, **more}) + "\n"


def test_a_journal_that_grows_is_read_once(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "one"
    folder.mkdir(parents=True)
    (folder / "job.toml").write_text('name = "one"\n[train]\nsteps = 100\n')
    journal = folder / "journal.jsonl"
    reading, who = Runs(tmp_path / "runs"), Local()
    assert reading.job(who, "one").state == "STARTING"
    journal.write_text(line(1) + line(2, metrics={"accuracy": 0.5}) + line(3)[:9])
    view = reading.job(who, "one")
    assert (view.state, view.step, view.total_steps, view.remaining) == ("RUNNING", 2, 100, 49.0)
    assert (view.losses, dict(view.metrics)) == ((1.0, 0.5), {"accuracy": 0.5})
    # What was read is not read again: it may have become anything.
    with journal.open("r+b") as file:
        file.write(b"x" * 20)
        file.seek(0, 2)
        file.write(line(3)[9:].encode() + b'{"event": "recovery"}\n{broken}\n[]\n' + line(4).encode())
    view = reading.job(who, "one")
    assert (view.step, view.recoveries, view.remaining) == (4, 1, 48.0)
    assert view.losses == (1.0, 0.5, 1 / 3, 0.25)
    assert reading.job(who, "one") is view
    # A resumed run repeats steps; how fast it was before does not count.
    with journal.open("a") as file:
        file.write(line(3, 2, compute=[0.1, 0.1]))
    view = reading.job(who, "one")
    assert (view.step, view.launches, view.workers, view.remaining) == (3, 2, 2, None)
    (folder / "restarts.jsonl").write_text('{"step": 2}\n')
    assert reading.job(who, "one").recoveries == 2
    # Another journal is told from its beginning.
    journal.write_text(line(1))
    view = reading.job(who, "one")
    assert (view.step, view.recoveries, view.losses) == (1, 1, (1.0,))
    shutil.rmtree(folder)
    assert reading.jobs(who) == []


def test_a_log_begins_with_its_newest_lines_and_goes_on(tmp_path: Path) -> None:
    (tmp_path / "job.toml").touch()
    journal = tmp_path / "journal.jsonl"
    reading, who = Runs(tmp_path), Local()
    assert reading.log(who, tmp_path.name, "", 2).lines == []
    journal.write_text("".join(line(step) for step in range(1, 6)) + "{broken}\n")
    first = reading.log(who, tmp_path.name, "", 2)
    assert [told.text.split()[0] for told in first.lines] == ["step=4", "step=5"]
    with journal.open("a") as file:
        file.write(line(6))
    after = reading.log(who, tmp_path.name, first.cursor, 2)
    assert [told.text.split()[0] for told in after.lines] == ["step=6"]
    assert reading.log(who, tmp_path.name, after.cursor, 2).lines == []
    for odd in ("x", "99999999", "-1"):
        assert len(reading.log(who, tmp_path.name, odd, 2).lines) == 2


def test_values_are_thinned_and_stay_in_order() -> None:
    thinned = Thinned(POINTS)
    for value in range(10 * MOST):
        thinned.add(float(value))
        assert len(thinned.values) < 2 * POINTS
    assert len(thinned.values) >= POINTS
    assert {b - a for a, b in itertools.pairwise(thinned.values)} == {32.0}


def test_who_reads_data_for_long_lives_and_who_is_gone_does_not(tmp_path: Path) -> None:
    (tmp_path / "job.toml").touch()
    journal = tmp_path / "journal.jsonl"
    long_ago = 1e9
    os.utime(tmp_path / "job.toml", (long_ago, long_ago))
    reading, who = Runs(tmp_path), Local()
    assert reading.job(who, tmp_path.name).state == "FAILED"
    with presence.alive(tmp_path):
        assert reading.job(who, tmp_path.name).state == "STARTING"
        journal.write_text(line(1))
        os.utime(journal, (long_ago, long_ago))
        assert reading.job(who, tmp_path.name).state == "RUNNING"
    assert reading.job(who, tmp_path.name).state == "FAILED"
