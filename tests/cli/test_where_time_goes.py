"""Real workers, one of them slow: who is named, and what the trace shows."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from dptrain.phases import NAMES
from tests.cli.conftest import Program, weights
from tests.traces import check_nesting, only, read, sums

MODEL = """
import os
import time

import numpy as np

RANK = int(os.environ.get("PMI_RANK") or os.environ.get("OMPI_COMM_WORLD_RANK") or 0)


class Softmax:
    def __init__(self, slow, seconds):
        self.seconds = seconds * 4 if RANK == slow else seconds

    def parameters(self, rng):
        return {"W": rng.standard_normal((64, 10)) * 0.1}

    def forward(self, params, x, rng):
        if rng is not None:
            time.sleep(self.seconds)
        return x @ params["W"], lambda dz: {"W": x.T @ dz}


def build(slow, seconds):
    return Softmax(slow, seconds)
"""

JOB = """
[data]
source = "digits"

[model]
python = "model.py:build"
options = {{ slow = {slow}, seconds = 0.015 }}

[optimizer]
lr = 0.1

[train]
batch_size = 60
shards = 3

[output]
journal_steps = 4
"""


@pytest.fixture
def slow(tmp_path: Path) -> Any:
    """Writes the job in which a rank (or none, -1) takes four times the others' time in forward."""

    def write(rank: int) -> None:
        (tmp_path / "model.py").write_text(MODEL)
        (tmp_path / "job.toml").write_text(JOB.format(slow=rank))

    return write


def result(tmp_path: Path, run: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((tmp_path / run / "result.json").read_text())
    return content


def test_the_slow_worker_and_its_phase_are_named(dptrain: Program, slow: Any, tmp_path: Path) -> None:
    slow(1)
    done = dptrain("run", "job.toml", "--run-dir", "r", "--trace", "t.json", workers=3)
    assert done.returncode == 0, done.stderr
    said = re.search(
        r"^slowest worker: rank 1 \((\S+)\), forward took (\S+) times the workers' median$", done.stdout, re.M
    )
    assert said, done.stdout
    found = result(tmp_path, "r")
    assert found["slowest"]["rank"] == 1
    assert found["slowest"]["phase"] == "forward"
    assert found["slowest"]["host"] == said[1]
    assert 1.2 < found["slowest"]["times"] < 4.2
    # The others wait for it, it does not wait for them, and yet it is found.
    assert re.search(r"^trace t\.json; ", done.stdout, re.M)
    check_trace(tmp_path, found["per_worker"], found["steps"])
    check_journal(tmp_path / "r/journal.jsonl", found["per_worker"])


def check_trace(tmp_path: Path, per_worker: list[Mapping[str, Any]], steps: int) -> None:
    facts, threads = read(tmp_path / "t.json")
    assert sorted(threads) == [0, 1, 2]
    for reading in facts["clocks"]:
        for ahead, round_trip in zip(reading["ahead_seconds"], reading["round_trip_seconds"], strict=True):
            assert abs(ahead) <= round_trip / 2
    for rank, events in threads.items():
        check_nesting(events)
        assert len(only(events, "step")) == steps
        found = sums(events)
        for name in NAMES:
            assert found[name] == pytest.approx(per_worker[rank]["phases"][name], abs=1e-3), name
    # Nobody can be in a step while another is two further: time is one for all.
    starts = {rank: [event["begin"] for event in only(events, "step")] for rank, events in threads.items()}
    for step in range(steps - 1):
        assert max(begins[step] for begins in starts.values()) <= min(begins[step + 1] for begins in starts.values())


def check_journal(path: Path, per_worker: list[Mapping[str, Any]]) -> None:
    """The sums of all lines are the result's, but for what came after the last step's verdict."""
    lines = [line for line in map(json.loads, path.read_text().splitlines()) if "phases" in line]
    for rank, worker in enumerate(per_worker):
        for name in ("data", "forward", "backward", "partials"):
            total = sum(line["phases"].get(name, [0, 0, 0])[rank] for line in lines)
            assert total == pytest.approx(worker["phases"][name], abs=1e-3), name
        total = sum(line["compute"][rank] for line in lines)
        own = sum(worker["phases"][name] for name in ("data", "forward", "backward", "partials"))
        assert total == pytest.approx(own, rel=0.05, abs=0.02)
    assert lines[-1]["phases"]["forward"][1] > lines[-1]["phases"]["forward"][0]


def test_without_a_slow_worker_nobody_is_named_and_a_trace_moves_no_bit(
    dptrain: Program, slow: Any, tmp_path: Path
) -> None:
    slow(-1)
    done = dptrain("run", "job.toml", "--run-dir", "r", workers=3)
    assert done.returncode == 0, done.stderr
    assert "slowest" not in done.stdout
    assert result(tmp_path, "r")["slowest"] is None
    alone = dptrain("run", "job.toml", "--trace", "a.json")
    started = dptrain("run", "job.toml", "-n", "2", "--trace", "b.json")
    assert weights(alone.stdout) == weights(started.stdout) == weights(done.stdout)
    assert len(read(tmp_path / "a.json")[1]) == 1
    assert len(read(tmp_path / "b.json")[1]) == 2


def test_a_trace_that_can_not_be_written_ends_all_at_once(dptrain: Program, tmp_path: Path) -> None:
    done = dptrain("run", "--trace", "none/t.json", workers=3)
    assert done.returncode == 2
    assert done.stderr.count("dptrain: rank 0: trace none/t.json: expected a file that can be written") == 1
    assert not (tmp_path / "runs").exists()
