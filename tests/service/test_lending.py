"""Jobs over MPI on nodes that see no folder of the server's."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from dptrain import checkpoint, hosts, rundir
from dptrain.board import PID
from dptrain.journal import read_all
from dptrain.launch import library
from dptrain.service import keeper, runner
from dptrain.service.server import JOBS
from tests.faults.live import signalled, until
from tests.faults.network import missing
from tests.service import over_nodes
from tests.service.jobs import solo_hash
from tests.service.over_nodes import QUIET, STEPS, TEXT, Service

pytestmark = pytest.mark.skipif(missing() != "", reason=missing() or "nodes can be made")


def run(words: list[str], folder: Path) -> None:
    line = [*over_nodes.DPTRAIN, *words, "--progress", "none"]
    subprocess.run(line, cwd=folder, check=True, capture_output=True, timeout=120)


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    with over_nodes.service(tmp_path / "place") as made:
        made.apart = True
        yield made


@pytest.mark.long
def test_data_goes_to_the_nodes_and_what_the_chief_writes_comes_back_though_chiefs_die(
    service: Service, tmp_path: Path
) -> None:
    rng = np.random.default_rng(3)
    x = rng.standard_normal((500, 8)).astype(np.float32)
    np.savez(tmp_path / "own.npz", x=x, y=np.arange(500) % 10)
    service.said("upload", str(tmp_path / "own.npz"))
    nodes = (1, 2, 3)
    for node in nodes:
        service.agent(node)
    service.seen("node joined", 3)
    job = service.submit("-n", "3", text=TEXT.replace("digits", "own.npz"))
    service.reaches(job, 40)
    assert signalled(service.worker(0, nodes), signal.SIGKILL)
    service.reaches(job, service.step(job) + 100)
    if library() == "Open MPI":
        assert signalled(service.worker(1, nodes), signal.SIGKILL)
    result = service.result(job)
    assert result["weights_sha256"] == solo_hash(tmp_path, QUIET.replace("digits", f"{tmp_path}/own.npz"))
    died = [entry["died"][0]["rank"] for entry in result["recoveries"]]
    assert died == ([0, 1] if library() == "Open MPI" else [])
    assert result["attempt"] == (1 if library() == "Open MPI" else 2)
    service.whole(job)
    run = service.data / JOBS / job / "run"
    assert sorted(run.glob("events.out.tfevents.*"))
    # The nodes kept the data, by its digest, and nothing else; what they were lent for the time of the run is gone.
    for node in nodes:
        (kept,) = (service.place.folder / f"cache-{node}").glob("nodes/files/*")
        assert kept.stat().st_size == (tmp_path / "own.npz").stat().st_size
    service.said("download", job, str(tmp_path / "home"), "--checkpoints")
    (newest, *_) = checkpoint.generations(tmp_path / "home" / rundir.CHECKPOINTS)
    assert checkpoint.read(newest).manifest["step"] == STEPS
    assert (tmp_path / "home" / rundir.WEIGHTS).read_bytes() == (run / rundir.WEIGHTS).read_bytes()


@pytest.mark.long
def test_a_node_that_was_stopped_changes_nothing_when_it_goes_on(service: Service, tmp_path: Path) -> None:
    """The chief's: the others go on from its checkpoint without it, and it is refused whatever it still wants."""
    nodes = (1, 2, 3)
    for node in nodes:
        service.agent(node)
    service.seen("node joined", 3)
    job = service.submit("-n", "1..3")
    # Checkpoints come to the server beside training: a node stopped before the first is here has nobody go on from one.
    run = service.data / JOBS / job / "run"
    assert until(lambda: runner.checkpoints(run) != [], 90, nap=0.02), service.server.err
    chief = service.worker(0, nodes)[PID]
    (stopped,) = (found for found in map(service.cluster.processes, nodes) if chief in found)
    for pid in stopped:
        os.kill(pid, signal.SIGSTOP)
    service.seen("node lost", 1)
    reached = service.step(job)
    service.reaches(job, reached + 50)
    for pid in stopped:
        with contextlib.suppress(ProcessLookupError):  # one that was ending when they were listed
            os.kill(pid, signal.SIGCONT)
    service.seen("node joined", 4)
    result = service.result(job)
    assert result["weights_sha256"] == solo_hash(tmp_path, QUIET)
    assert result["attempt"] == 2
    service.whole(job)
    said = [json.loads(line)["l"] for line in (service.data / JOBS / job / keeper.LOG).read_text().splitlines()]
    assert any("starting again from step" in line and "step 0" not in line for line in said), "\n".join(said)


OWN = """
import numpy as np


class Softmax:
    def parameters(self, rng):
        return {"w": rng.normal(0.0, 0.1, (64, 10)), "b": np.zeros(10)}

    def forward(self, params, x, rng):
        return x @ params["w"] + params["b"], lambda dy: {"w": x.T @ dy, "b": dy.sum(axis=0)}
"""
"""A model of a user's own."""


@pytest.mark.long
def test_a_model_of_one_s_own_and_the_weights_it_starts_from_go_to_the_nodes_too(
    service: Service, tmp_path: Path
) -> None:
    """By hand, over a server's nodes, in a folder that is the server's alone; stopped, and gone on with elsewhere."""
    text = QUIET.replace('layers = [{ type = "linear", units = 10 }]', "{model}")
    first = text.replace("{model}", 'python = "own.py:Softmax"')
    place = service.data / "by-hand"
    place.mkdir()
    (place / "own.py").write_text(OWN)
    (place / "first.toml").write_text(first.replace(f"steps = {STEPS}", "steps = 60"))
    run(["run", "first.toml", "--run-dir", "first"], place)
    second = text.replace("{model}", 'python = "own.py:Softmax"\ninit_from = "first"')
    (place / "second.toml").write_text(second)
    run(["run", "second.toml", "--run-dir", "solo"], place)
    for node in (1, 2):
        service.agent(node)
    service.seen("node joined", 2)
    (place / "hosts").write_text("node-1\nnode-2\n")
    reach = {name: str(Path(sys.executable).parent / "dptrain-rsh") for name in hosts.AGENTS}
    line = ["run", "second.toml", "--hostfile", "hosts", "--set", "output.journal_steps=1"]
    command = service.on(0, *line, before=["env", "-C", str(place)], **reach, DPTRAIN_NODES=str(service.data))
    runs = place / "runs"
    assert until(lambda: any(read_all(path) for path in runs.glob("*/journal.jsonl")), 60, nap=0.02), command.err
    command.process.send_signal(signal.SIGTERM)
    stopped = service.place.ended(command, 60)
    (kept,) = runs.iterdir()
    before = rundir.read_json(kept / rundir.RESULT)
    assert (stopped.code, before["state"]) == (0, "stopped"), stopped.err
    (place / "hosts").write_text("node-2\n")
    command = service.on(
        0, *line, "--resume", before=["env", "-C", str(place)], **reach, DPTRAIN_NODES=str(service.data)
    )
    ended = service.place.ended(command, 90)
    result = rundir.read_json(kept / rundir.RESULT)
    assert (ended.code, result["state"], result["attempt"]) == (0, "done", 2), ended.err
    truth = rundir.read_json(place / "solo" / rundir.RESULT)
    assert result["weights_sha256"] == truth["weights_sha256"]
    assert result["job_sha256"] == truth["job_sha256"]
    assert rundir.read_text(kept / rundir.MODEL_SOURCE) == OWN
