"""Deaths within a step, in real runs: who goes on, what is told, what fails the job all the same."""

import json
import os
import re
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from dptrain.board import RANK, STEP
from dptrain.journal import read_all
from dptrain.launch import command, library
from dptrain.phases import Phase
from tests.faults.jobs import JOBS
from tests.faults.live import Job, begun, joined, pace, signalled
from tests.faults.oracle import PROGRAM, Command, Surroundings, undisturbed
from tests.mpirun import ranks

pytestmark = pytest.mark.skipif(
    library() != "Open MPI", reason="only Open MPI, with ULFM, goes on after a death; with MPICH the job is restarted"
)

MLP = JOBS[0]

POISON = """
import os, signal
import numpy as np

class Poisoned:
    "Kills whoever computes the row whose first feature is large, once training has begun."

    def parameters(self, rng):
        return {"W": rng.normal(size=(64, 5)) * 0.1, "b": np.zeros(5)}

    def forward(self, params, x, rng):
        self.passes = getattr(self, "passes", 0) + 1
        if rng is not None and (x[:, 0] > 3.2).any() and self.passes > 30:
            ACTION

        def backward(dy):
            return {"W": x.T @ dy, "b": dy.sum(axis=0)}

        return x @ params["W"] + params["b"], backward

build = Poisoned
"""
POISON_JOB = """
seed = 11
[data]
source = "synthetic"
synthetic = { rows = 2000, shape = [64], classes = 5 }
[model]
python = "poison.py:build"
[train]
batch_size = 120
shards = 8
steps = 400
"""


@pytest.fixture(autouse=True)
def _segments(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a supervisor, what killed workers of Open MPI leave of its shared memory goes with the tests' folders."""
    monkeypatch.setenv("OMPI_MCA_btl_sm_backing_directory", str(tmp_path_factory.mktemp("segments")))


def start(place: Surroundings, workers: int, text: str = MLP.text, *options: str) -> tuple[Command, Job]:
    """A job that trains."""
    going, live = begun(place, text, workers, *options, progress="plain")
    assert live is not None, going.err
    return going, live


def launched(place: Surroundings, line: Sequence[str], environ: Mapping[str, str]) -> tuple[Command, Job]:
    """A job of three workers that trains, started by mpirun itself."""
    (place.folder / "job.toml").write_text(MLP.text)
    going = place.start(line, **environ)
    live = joined(place, 3, lambda: going.running)
    assert live is not None, going.err
    return going, live


def result(place: Surroundings) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((place.folder / "run" / "result.json").read_text())
    return content


def test_the_chief_dies_and_another_goes_on_with_journal_and_terminal(tmp_path: Path) -> None:
    place = Surroundings(tmp_path)
    going, live = start(place, 3)
    pace(live, 100)
    chief = live.cells[0]
    assert chief[RANK] == 0
    phase = live.freeze(chief, Phase.UPDATE)
    step = chief[STEP]
    signalled(chief, signal.SIGKILL)
    ended = place.ended(going, 240)
    assert ended.code == 0, ended.said
    found = result(place)
    assert found["weights_sha256"] == undisturbed(MLP.text).weights_sha256
    (recovery,) = found["recoveries"]
    assert recovery["died"] == [
        {"rank": 0, "host": os.uname().nodename, "step": step, "phase": phase, "hung": False},
    ]
    assert recovery["workers"] == 2
    assert recovery["chief"] == 1
    assert recovery["step"] in (step - 1, step)
    assert found["workers"] == 3
    assert found["attempt"] == 1
    assert [worker["rank"] for worker in found["per_worker"]] == [1, 2]
    assert f"rank 0 ({os.uname().nodename}) died at step {step} in {phase}: 2 workers go on" in ended.err
    assert ended.out.count("weights sha256:") == 1
    lines = read_all(place.folder / "run" / "journal.jsonl")
    steps = [line["step"] for line in lines if "loss" in line]
    assert set(range(1, MLP.steps + 1)) - set(steps) <= {step - 1, step, step + 1}
    assert {line["attempt"] for line in lines} == {1}
    assert [line["step"] for line in lines if line.get("event") == "recovery"] == [recovery["step"]]
    assert place.leftovers() == []


def test_a_spare_takes_the_place_of_the_dead(tmp_path: Path) -> None:
    place = Surroundings(tmp_path)
    text = MLP.text.replace("shards = 8", "shards = 3")
    going, live = start(place, 4, text)
    pace(live, 50)
    signalled(live.cells[1], signal.SIGKILL)
    ended = place.ended(going, 240)
    assert ended.code == 0, ended.said
    found = result(place)
    assert found["weights_sha256"] == undisturbed(text).weights_sha256
    spare = found["per_worker"][-1]
    assert spare["rank"] == 3
    assert spare["shards_computed"] > 0


@pytest.mark.parametrize("workers", [3, 5])
def test_a_shard_that_ends_every_worker_is_named(tmp_path: Path, workers: int) -> None:
    place = Surroundings(tmp_path)
    (tmp_path / "poison.py").write_text(POISON.replace("ACTION", "os.kill(os.getpid(), signal.SIGKILL)"))
    (tmp_path / "job.toml").write_text(POISON_JOB)
    ended = place.run([*PROGRAM, "run", "job.toml", "-n", str(workers), "--run-dir", "run"], 240)
    assert ended.code == 1, ended.said
    (said,) = [line for line in ended.err.splitlines() if "owned it one after the other" in line]
    assert "shard" in said
    assert ended.err.count("died at step") == 1
    assert place.leftovers() == []


def test_who_is_stuck_is_ended_and_the_others_go_on(tmp_path: Path) -> None:
    """Not stopped, and not waiting for others: it sleeps where it should compute."""
    place = Surroundings(tmp_path)
    action = "if not os.path.exists('hit'):\n                open('hit', 'w').close()\n                time.sleep(600)"
    (tmp_path / "poison.py").write_text("import time\n" + POISON.replace("ACTION", action))
    (tmp_path / "job.toml").write_text(POISON_JOB)
    ended = place.run([*PROGRAM, "run", "job.toml", "-n", "3", "--run-dir", "run"], 240)
    assert ended.code == 0, ended.said
    assert re.search(r"rank \d at step \d+ in forward gave no sign of life for 5\.\d s: ended", ended.err)
    (recovery,) = result(place)["recoveries"]
    assert recovery["died"][0]["hung"]
    alone = place.run([*PROGRAM, "run", "job.toml", "--run-dir", "alone"], 240)
    assert alone.code == 0, alone.said
    truth = json.loads((tmp_path / "alone" / "result.json").read_text())
    assert result(place)["weights_sha256"] == truth["weights_sha256"]


def test_an_exception_is_no_fault(tmp_path: Path) -> None:
    place = Surroundings(tmp_path)
    (tmp_path / "poison.py").write_text(POISON.replace("ACTION", "raise RuntimeError('no more')"))
    (tmp_path / "job.toml").write_text(POISON_JOB)
    ended = place.run([*PROGRAM, "run", "job.toml", "-n", "3", "--run-dir", "run"], 240)
    assert ended.code == 1, ended.said
    assert "no more" in ended.err
    assert "died" not in ended.err
    assert place.leftovers() == []


def test_an_exception_after_a_death_ends_all(tmp_path: Path) -> None:
    """Those that have survived one death still leave together, with the failure's code."""
    place = Surroundings(tmp_path)
    action = (
        "os.kill(os.getpid(), signal.SIGKILL) if not os.path.exists('hit') and not open('hit', 'w').close() else fail()"
    )
    (tmp_path / "poison.py").write_text(
        POISON.replace("ACTION", action) + "\ndef fail():\n    raise ValueError('later')\n"
    )
    (tmp_path / "job.toml").write_text(POISON_JOB)
    ended = place.run([*PROGRAM, "run", "job.toml", "-n", "4", "--run-dir", "run"], 240)
    assert ended.code == 1, ended.said
    assert "later" in ended.err
    assert ended.err.count("died at step") == 1
    assert place.leftovers() == []


def test_a_program_of_ones_own_survives_too(tmp_path: Path) -> None:
    place = Surroundings(tmp_path)
    (tmp_path / "program.py").write_text(
        "import dptrain\n"
        "for run in ('run', 'again'):\n"
        "    result = dptrain.train('job.toml', run_dir=run)\n"
        "    print(result.weights_sha256, len(result.recoveries), result.workers, flush=True)\n"
    )
    line, environ = command(3, [], place.environ)
    going, live = launched(place, [*line[: line.index(sys.executable) + 1], "program.py"], environ)
    pace(live, 50)
    signalled(live.cells[2], signal.SIGKILL)
    ended = place.ended(going, 240)
    assert ended.code == 0, ended.said
    hash_ = undisturbed(MLP.text).weights_sha256
    assert sorted(ended.out.splitlines()) == sorted([f"{hash_} 1 3"] * 2 + [f"{hash_} 0 2"] * 2)


def test_what_is_not_everybodys_is_not_survived_within_a_step(tmp_path: Path) -> None:
    """Of ``allreduce`` only one worker holds the optimizer's state: all leave; the job goes on from a checkpoint."""
    place = Surroundings(tmp_path)
    going, live = start(place, 3, MLP.text + '\n[exchange]\ntype = "allreduce"\n')
    pace(live, 100)
    signalled(live.cells[1], signal.SIGKILL)
    ended = place.ended(going, 240)
    assert ended.code == 0, ended.said
    assert result(place)["attempt"] == 2
    assert place.leftovers() == []


def test_an_interrupted_run_that_survived_says_how_to_resume(tmp_path: Path) -> None:
    place = Surroundings(tmp_path)
    going, live = start(place, 3)
    pace(live, 50)
    signalled(live.cells[0], signal.SIGKILL)
    pace(live, 50)
    going.process.send_signal(signal.SIGINT)
    ended = place.ended(going, 240)
    assert ended.code == 0, ended.said
    assert result(place)["state"] == "stopped"
    assert "to resume:" in ended.out
    again = place.run([*PROGRAM, "run", "job.toml", "--run-dir", "run", "--resume"], 240)
    assert again.code == 0, again.said
    assert result(place)["weights_sha256"] == undisturbed(MLP.text).weights_sha256


def test_without_fault_tolerance_a_death_ends_the_launch(tmp_path: Path) -> None:
    """The negative control: what survives is ULFM, not luck."""
    place = Surroundings(tmp_path)
    line, environ = command(3, ["run", "job.toml", "--run-dir", "run"], {**place.environ, "DPTRAIN_FT": "off"})
    going, live = launched(place, line, environ)
    pace(live, 50)
    signalled(live.cells[2], signal.SIGKILL)
    ended = place.ended(going, 240)
    assert ended.code not in (0, None)
    assert not (tmp_path / "run" / "result.json").exists()


@pytest.mark.parametrize("seed", range(1, 6))
def test_deaths_at_any_border_between_phases_on_machines_of_any_shape(tmp_path: Path, seed: int) -> None:
    done = ranks(6, "tests.dying_suite", str(tmp_path), str(seed), timeout=120)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())["found"]
    assert [result["weights_sha256"] for result in found] == [result["solo"] for result in found]
    died = {entry["rank"] for result in found for recovery in result["recoveries"] for entry in recovery["died"]}
    assert len(died) >= 4
    assert {result["attempt"] for result in found} == {1}


def test_a_trace_goes_on_with_those_that_are_left(tmp_path: Path) -> None:
    place = Surroundings(tmp_path)
    going, live = start(place, 3, MLP.text, "--trace", "trace.json")
    pace(live, 100)
    signalled(live.cells[0], signal.SIGKILL)
    ended = place.ended(going, 240)
    assert ended.code == 0, ended.said
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert {event["tid"] for event in events if event["ph"] == "X"} == {1, 2}
    recoveries = [event for event in events if event["name"] == "recovery"]
    assert {event["tid"] for event in recoveries} == {1, 2}
    assert result(place)["weights_sha256"] == undisturbed(MLP.text).weights_sha256
