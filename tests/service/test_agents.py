"""Jobs over the agents of three nodes, each a network namespace of its own; the server is on a fourth."""

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from dptrain.service import keeper
from dptrain.service.server import JOBS
from tests.faults.live import until
from tests.faults.network import missing
from tests.service import over_nodes
from tests.service.jobs import solo_hash
from tests.service.over_nodes import QUIET, TEXT, Service


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    with over_nodes.service(tmp_path / "place") as made:
        yield made


@pytest.mark.skipif(missing() != "", reason=missing() or "nodes can be made")
def test_a_job_goes_on_when_an_agent_dies_and_when_a_node_is_drained(service: Service, tmp_path: Path) -> None:
    agents = {node: service.agent(node) for node in (1, 2, 3)}
    service.seen("node joined", 3)
    job = service.submit("-n", "1..3")
    service.reaches(job, 40)
    os.kill(agents[3].process.pid, signal.SIGKILL)
    service.reaches(job, service.step(job) + 100)
    service.said("nodes", "drain", "node-2")
    result = service.result(job)
    assert result["weights_sha256"] == solo_hash(tmp_path, QUIET)
    moves = [(line["state"], line["workers"]) for line in service.events("job") if line["state"] == "STARTING"]
    assert moves == [("STARTING", 3), ("STARTING", 1)]
    assert "node-3 is left out" in (service.data / JOBS / job / keeper.LOG).read_text()
    listed = json.loads(service.said("nodes", "-o", "json"))
    assert {node["name"]: node["state"].removeprefix("NODE_STATE_") for node in listed} == {
        "node-1": "READY",
        "node-2": "DRAINED",
        "node-3": "LOST",
    }


@pytest.mark.long
@pytest.mark.skipif(missing() != "", reason=missing() or "nodes can be made")
def test_nodes_with_nothing_in_common_work_for_a_parameter_server_that_outlives_an_agent_and_the_server(
    service: Service, tmp_path: Path
) -> None:
    rng = np.random.default_rng(3)
    x = rng.standard_normal((500, 8)).astype(np.float32)
    np.savez(tmp_path / "own.npz", x=x, y=np.arange(500) % 10)
    service.said("upload", str(tmp_path / "own.npz"))
    agents = {node: service.agent(node, apart=True) for node in (1, 2, 3)}
    service.seen("node joined", 3)
    job = service.submit("-n", "3", text=TEXT.replace("digits", "own.npz") + '\n[exchange]\ntype = "ps"\n')
    service.reaches(job, 40)
    os.kill(agents[3].process.pid, signal.SIGKILL)
    service.reaches(job, service.step(job) + 20)
    again = service.agent(3, apart=True)
    assert until(lambda: '"program": "worker"' in again.err, 60, nap=0.05)
    os.kill(service.server.process.pid, signal.SIGKILL)
    service.server.wait(10)
    service.server = service.serve()
    result = service.result(job)
    assert result["weights_sha256"] == solo_hash(tmp_path, QUIET.replace("digits", f"{tmp_path}/own.npz"))
    # Nothing of it was begun again.
    assert result["attempt"] == 1


@pytest.mark.long
@pytest.mark.skipif(missing() != "", reason=missing() or "nodes can be made")
def test_workers_of_a_parameter_server_leave_a_drained_node_and_come_to_another_at_a_step(
    service: Service, tmp_path: Path
) -> None:
    for node in (1, 2):
        service.agent(node)
    service.seen("node joined", 2)
    job = service.submit(
        "-n", "1..2", text=TEXT.replace("steps = 2000", "steps = 12000") + '\n[exchange]\ntype = "ps"\n'
    )
    service.reaches(job, 40)
    service.said("nodes", "drain", "node-2")
    service.seen("job workers", 1)
    service.agent(3)
    service.seen("job workers", 2)
    assert [line["workers"] for line in service.events("job workers")] == [1, 2]
    assert (service.data / JOBS / job / "hosts").read_text().split() == ["node-1", "slots=1", "node-3", "slots=1"]
    result = service.result(job)
    assert result["weights_sha256"] == solo_hash(tmp_path, QUIET.replace("steps = 2000", "steps = 12000"))
    assert result["attempt"] == 1
    assert not [line for line in service.events("job") if line["reason"] != "UNSPECIFIED"]
