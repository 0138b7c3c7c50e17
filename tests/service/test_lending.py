"""Jobs over MPI on nodes that see no folder of the server's."""

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from dptrain import checkpoint, rundir
from dptrain.board import PID
from dptrain.launch import library
from dptrain.service import keeper
from dptrain.service.server import JOBS
from tests.faults.live import signalled
from tests.faults.network import missing
from tests.service import over_nodes
from tests.service.jobs import solo_hash
from tests.service.over_nodes import QUIET, STEPS, TEXT, Service

pytestmark = pytest.mark.skipif(missing() != "", reason=missing() or "nodes can be made")


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    with over_nodes.service(tmp_path / "place") as made:
        made.apart = True
        yield made


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


def test_a_node_that_was_stopped_changes_nothing_when_it_goes_on(service: Service, tmp_path: Path) -> None:
    """The chief's: the others go on from its checkpoint without it, and it is refused whatever it still wants."""
    nodes = (1, 2, 3)
    for node in nodes:
        service.agent(node)
    service.seen("node joined", 3)
    job = service.submit("-n", "1..3")
    service.reaches(job, 60)
    chief = service.worker(0, nodes)[PID]
    (stopped,) = (found for found in map(service.cluster.processes, nodes) if chief in found)
    for pid in stopped:
        os.kill(pid, signal.SIGSTOP)
    service.seen("node lost", 1)
    reached = service.step(job)
    service.reaches(job, reached + 50)
    for pid in stopped:
        os.kill(pid, signal.SIGCONT)
    service.seen("node joined", 4)
    result = service.result(job)
    assert result["weights_sha256"] == solo_hash(tmp_path, QUIET)
    assert result["attempt"] == 2
    service.whole(job)
    said = [json.loads(line)["l"] for line in (service.data / JOBS / job / keeper.LOG).read_text().splitlines()]
    assert any("starting again from step" in line and "step 0" not in line for line in said), said
