import io
import re

import pytest

from dptrain.cli.progress import Bar, Plain, Silent, closing, observer

INFO = {
    "run_dir": "runs/a", "name": "digits", "workers": 2, "shards": 8, "spares": 0, "exchange": "segments",
    "parameters": 100, "total_steps": 50, "step": 0, "train_rows": 1200, "notes": ["read this"],
}  # fmt: skip
LINE = {"step": 10, "epoch": 1, "loss": 0.123456, "lr": 0.1, "samples_per_second": 12345.6}
RESULT = {
    "state": "done", "steps": 50, "epochs": 5, "loss": 0.25,
    "metrics": {"validation": {"accuracy": 0.5}, "test": {"loss": 0.3, "accuracy": 0.9722}},
    "samples_per_second": 34567.8, "weights_sha256": "sha256:" + "ab" * 32,
}  # fmt: skip
AGAIN = ["dptrain", "run", "my job.toml"]


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_plain_lines_come_once_a_second_and_at_every_evaluation() -> None:
    out, clock = io.StringIO(), Clock()
    shown = Plain(out, AGAIN, clock)
    for step in range(40):
        clock.now = step / 10
        metrics = {"loss": 0.5, "accuracy": 0.75} if step == 15 else None
        shown.progressed(LINE | {"step": step, "metrics": metrics})
    steps = [int(found) for found in re.findall(r"^step=(\d+)", out.getvalue(), re.MULTILINE)]
    assert steps == [0, 10, 15, 25, 35]
    evaluations = [line for line in out.getvalue().splitlines() if "validation" in line]
    assert evaluations == [
        "step=15 epoch=1 loss=0.1235 lr=0.1 samples/s=12346 validation.loss=0.5 validation.accuracy=0.75"
    ]


def test_plain_start_says_who_works_and_warns_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    out = io.StringIO()
    Plain(out, AGAIN).started(INFO | {"spares": 3, "step": 7})
    assert out.getvalue() == (
        "name=digits workers=2 shards=8 spares=3 exchange=segments parameters=100 train_rows=1200 total_steps=50 "
        "resumed_at=7\n"
    )
    assert capsys.readouterr().err == "dptrain: read this\n"


def test_closing_lines_name_the_hash_and_the_run() -> None:
    first, second = closing(RESULT, "runs/a", AGAIN)
    assert first == "steps=50 epochs=5 loss=0.25 accuracy=0.9722 samples/s=34568 weights sha256:" + "ab" * 32
    assert second == "run runs/a; try: dptrain eval runs/a"


def test_closing_lines_name_the_slowest_worker_and_the_trace() -> None:
    slow = {"rank": 3, "phase": "forward", "times": 1.8, "host": "node7"}
    _, second, third, fourth = closing(RESULT | {"slowest": slow}, "runs/a", AGAIN, "my trace.json")
    assert second == "slowest worker: rank 3 (node7), forward took 1.8 times the workers' median"
    assert third == "trace 'my trace.json'; open it in ui.perfetto.dev"
    assert fourth == "run runs/a; try: dptrain eval runs/a"
    out = io.StringIO()
    shown = Silent(out, AGAIN)
    shown.started(INFO | {"trace": "t.json"})
    shown.finished(RESULT | {"slowest": None})
    assert out.getvalue().splitlines()[1:] == [
        "trace t.json; open it in ui.perfetto.dev",
        "run runs/a; try: dptrain eval runs/a",
    ]


def test_a_stopped_run_says_how_to_go_on() -> None:
    _, second = closing(RESULT | {"state": "stopped", "steps": 12}, "runs/a", AGAIN)
    assert second == "stopped at step 12; to resume: dptrain run 'my job.toml' --run-dir runs/a --resume"


def test_silent_shows_the_closing_lines_alone() -> None:
    out = io.StringIO()
    shown = Silent(out, AGAIN)
    shown.started(INFO)
    shown.progressed(LINE)
    assert out.getvalue() == ""
    shown.finished(RESULT)
    assert out.getvalue().count("\n") == 2


@pytest.mark.parametrize("width", [20, 40, 60, 80, 120, 200])
def test_the_bar_fits_its_terminal(width: int) -> None:
    out, clock = io.StringIO(), Clock()
    shown = Bar(out, AGAIN, width, clock)
    shown.started(INFO | {"notes": []})
    start = len(out.getvalue())
    for step in range(1, 50):
        clock.now += 1
        shown.progressed(LINE | {"step": step, "metrics": {"loss": 0.5, "accuracy": 0.123456}})
    shown.close()
    drawn = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue()[start:]).replace("\r", "\n").split("\n")
    assert max(map(len, drawn)) < width
    assert any("49/50" in line for line in drawn)
    if width >= 80:
        assert any("accuracy=0.1235" in line for line in drawn)


def test_the_bar_is_drawn_at_most_ten_times_a_second() -> None:
    out, clock = io.StringIO(), Clock()
    shown = Bar(out, AGAIN, 80, clock)
    shown.started(INFO)
    for step in range(1000):
        clock.now = step / 1000
        shown.progressed(LINE | {"step": step % 50})
    drawn = out.getvalue().count("/50")
    shown.close()
    assert 8 <= drawn <= 14


def test_a_closed_bar_shows_the_cursor_again() -> None:
    out = io.StringIO()
    shown = Bar(out, AGAIN, 80)
    shown.started(INFO)
    assert "\x1b[?25l" in out.getvalue()
    shown.close()
    assert out.getvalue().rfind("\x1b[?25h") > out.getvalue().rfind("\x1b[?25l")


def test_the_mode_decides_what_is_shown() -> None:
    assert type(observer("auto", None, AGAIN)) is Plain
    assert type(observer("auto", 80, AGAIN)) is Bar
    assert type(observer("bar", None, AGAIN)) is Bar
    assert type(observer("plain", 80, AGAIN)) is Plain
    assert type(observer("none", 80, AGAIN)) is Silent
