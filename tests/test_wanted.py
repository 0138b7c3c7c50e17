"""Workers of a parameter server come and leave while it trains, and the bits stay those of one alone."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dptrain import wanted
from dptrain.errors import UsageError
from dptrain.wanted import HERE, Group, Watch

TEXT = """
name = "elastic"

[data]
source = "digits"

[model]
layers = [{ type = "linear", units = 10 }]

[train]
steps = 1500
batch_size = 64

[exchange]
type = "ps"
"""


@pytest.mark.parametrize(
    ("text", "found"), [("3\n", {HERE: 3}), ("a slots=2\nb:1\n", {"a": 2, "b": 1}), (" 12 ", {HERE: 12})]
)
def test_what_is_asked_for(tmp_path: Path, text: str, found: dict[str, int]) -> None:
    path = tmp_path / "workers"
    path.write_text(text)
    assert wanted.read(path) == found
    path.write_text(wanted.text_of(found))
    assert wanted.read(path) == found


@pytest.mark.parametrize("text", ["0", "-1", "", "a slots=0", "9999999", "1.5 of them"])
def test_what_can_t_be_asked_for(tmp_path: Path, text: str) -> None:
    path = tmp_path / "workers"
    path.write_text(text)
    with pytest.raises(UsageError):
        wanted.read(path)


def test_a_file_is_looked_at_until_it_is_wrong_and_again_when_it_is_right(tmp_path: Path) -> None:
    path = tmp_path / "workers"
    watch = Watch(path, {HERE: 2}, lambda asked: [Group(HERE, asked[HERE])])
    assert watch.look() is None
    for text, groups in (("3", [Group(HERE, 3)]), ("none", None), ("node slots=2", None), ("1", [Group(HERE, 1)])):
        part = tmp_path / "part"
        part.write_text(text)
        part.replace(path)
        assert watch.look() == groups
        assert bool(watch.complaint) == (groups is None)
        assert watch.look() is None
    assert wanted.found(path) is None
    watch.settle([Group(HERE, 1)])
    assert wanted.found(path) == ({HERE: 1}, {HERE: 1})
    wanted.forget(path)
    assert wanted.found(path) is None


def run(folder: Path, *words: str) -> "subprocess.Popen[str]":
    line = [sys.executable, "-P", "-m", "dptrain", "run", "job.toml", "--progress", "plain", *words]
    environ = {name: value for name, value in os.environ.items() if not name.startswith("DPTRAIN_")}
    return subprocess.Popen(line, cwd=folder, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def solo_hash(folder: Path) -> str:
    command = run(folder, "--set", "exchange.type=solo", "--run-dir", "solo")
    command.communicate(timeout=120)
    return str(json.loads((folder / "solo" / "result.json").read_text())["weights_sha256"])


@pytest.mark.parametrize(
    "apart", [pytest.param(False, id="together"), pytest.param(True, id="apart", marks=pytest.mark.long)]
)
def test_workers_come_and_leave_and_the_last_change_may_come_at_the_end(tmp_path: Path, apart: bool) -> None:
    (tmp_path / "job.toml").write_text(TEXT)
    file, run_dir = tmp_path / "workers", tmp_path / "run"
    words = ["--set", "exchange.host_sum=false"] if apart else []
    with run(tmp_path, "--run-dir", "run", "-n", "2", "--workers-file", "workers", *words) as command:

        def settled(n: int) -> bool:
            return wanted.found(file) == ({HERE: n}, {HERE: n})

        def ask(n: int) -> None:
            part = tmp_path / "part"
            part.write_text(f"{n}\n")
            part.replace(file)

        def steps() -> int:
            journal = run_dir / "journal.jsonl"
            lines = journal.read_text().splitlines(keepends=True) if journal.exists() else []
            return max((json.loads(line)["step"] for line in lines if line.endswith("\n")), default=0)

        until = time.monotonic() + 120
        for n in (2, 3, 1, 3):
            if n != 2 or steps():
                ask(n)
            while not settled(n) and command.poll() is None:
                assert time.monotonic() < until
                time.sleep(0.02)
        while steps() < 1450 and command.poll() is None:
            assert time.monotonic() < until
            time.sleep(0.01)
        ask(1)
        out, err = command.communicate(timeout=120)
    assert command.returncode == 0, err
    result = json.loads((run_dir / "result.json").read_text())
    assert result["weights_sha256"] == solo_hash(tmp_path)
    assert "now 3 workers\n" in out
    assert "now 1 worker\n" in out
    assert result["attempt"] == 1
    assert not err
