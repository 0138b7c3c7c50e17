"""Processes of ``dptrain run --exchange ps``, killed and stopped: the hash stays solo's and nothing is left behind."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from dptrain.job.load import load_job
from dptrain.training import run

JOB = """
seed = 11
[model]
layers = [{type = "linear", units = 512}, {type = "dropout"}, {type = "linear", units = 10}]
[optimizer]
lr = 0.05
momentum = 0.9
[train]
batch_size = 50
steps = 1500
evaluate_steps = 100
[output]
journal_steps = 5
checkpoint_steps = 200
"""


def temporary(folder: Path) -> Path:
    """The temporary folder of what is started: with a longer path than a socket's may be."""
    return folder / ("temporary" * 12)


class Run:
    """A supervised run, and what it says of itself while it goes on."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.dir = folder / "run"
        line = [
            sys.executable,
            "-P",
            "-m",
            "dptrain",
            "run",
            str(folder / "job.toml"),
            "--exchange",
            "ps",
            "--set",
            "exchange.host_sum=false",
        ]
        env = {**os.environ, "TMPDIR": str(temporary(folder)), "DPTRAIN_PROGRESS": "none"}
        self.process = subprocess.Popen(
            [*line, "--run-dir", str(self.dir), *arguments], env=env, stderr=subprocess.PIPE, text=True
        )

    def reach(self, step: int) -> None:
        while self.step < step and self.process.poll() is None:
            time.sleep(0.05)

    @property
    def step(self) -> int:
        steps = [line.get("step", 0) for line in self._lines()]
        return max(steps, default=0)

    def _lines(self) -> Iterator[dict[str, Any]]:
        with suppress(OSError):
            for line in (self.dir / "journal.jsonl").read_text().splitlines():
                with suppress(ValueError):
                    yield json.loads(line)

    def children(self, command: str) -> list[psutil.Process]:
        found = []
        with suppress(psutil.Error):
            for child in psutil.Process(self.process.pid).children(recursive=True):
                with suppress(psutil.Error):
                    if command in child.cmdline():
                        found.append(child)
        return found

    def server(self, number: int) -> psutil.Process:
        """One of the servers."""
        listening = f"server-{number}.sock"
        return next(
            child
            for child in self.children("param-server")
            if child.cmdline()[child.cmdline().index("--listen") + 1].endswith(listening)
        )

    def end(self) -> tuple[int, str]:
        _, said = self.process.communicate(timeout=240)
        return self.process.returncode, said

    @property
    def result(self) -> dict[str, Any]:
        content: dict[str, Any] = json.loads((self.dir / "result.json").read_text())
        return content


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    (tmp_path / "job.toml").write_text(JOB)
    temporary(tmp_path).mkdir(parents=True)
    yield tmp_path
    assert os.listdir(temporary(tmp_path)) == []
    assert not [p for p in psutil.process_iter(["cmdline"]) if str(tmp_path) in " ".join(p.info["cmdline"] or [])]


@pytest.fixture(scope="module")
def solo(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("solo")
    (folder / "job.toml").write_text(JOB)
    return run(load_job(folder / "job.toml", (), {}), run_dir=folder / "run").weights_sha256


@pytest.mark.long
def test_workers_killed_and_stopped_at_random(folder: Path, solo: str) -> None:
    run = Run(folder, "-n", "3", "--set", "exchange.lease_seconds=2")
    chance = random.Random(5)
    for i in range(5):
        run.reach(100 + 200 * i)
        workers = run.children("worker")
        if workers:
            with suppress(psutil.Error):
                chance.choice(workers).send_signal(signal.SIGSTOP if i % 2 else signal.SIGKILL)
    code, said = run.end()
    assert code == 0, said
    assert run.result["weights_sha256"] == solo
    assert len(run.result["per_worker"]) > 3


@pytest.mark.long
def test_servers_die_one_after_the_other(folder: Path, solo: str) -> None:
    """Of two with a segment each and one without: that one, then the chief. The last goes on within the step."""
    run = Run(folder, "-n", "2", "--servers", "2", "--standby")
    for step, number in ((200, 2), (500, 0)):
        run.reach(step)
        run.server(number).kill()
    code, said = run.end()
    assert code == 0, said
    result = run.result
    assert result["weights_sha256"] == solo
    assert result["attempt"] == 1
    died = [[one["rank"] for one in recovery["died"]] for recovery in result["recoveries"]]
    assert died == [[2], [0]]
    assert [recovery["chief"] for recovery in result["recoveries"]] == [0, 1]
    assert said.count("died") == 2


@pytest.mark.long
def test_without_a_standby_the_newest_checkpoint_is_used(folder: Path, solo: str) -> None:
    run = Run(folder, "-n", "2")
    run.reach(300)
    run.server(0).kill()
    code, said = run.end()
    assert code == 0, said
    assert "starting again from step" in said
    assert run.result["weights_sha256"] == solo
    assert run.result["attempt"] == 2
