"""Jobs over the agents of three nodes, each a network namespace of its own; the server is on a fourth."""

import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dptrain import rundir
from dptrain.errors import StorageError
from dptrain.service import keeper
from dptrain.service.server import JOBS, TOKENS
from dptrain.wire import certificates
from dptrain.wire.tokens import Role, TokenFile, keep
from tests.faults.live import until
from tests.faults.network import Cluster, missing
from tests.faults.oracle import Command, Surroundings
from tests.service.jobs import JOB, solo_hash

DPTRAIN = [sys.executable, "-P", "-m", "dptrain"]
QUIET = JOB.replace("steps = 30", "steps = 2000")
TEXT = QUIET.replace("[train]", "[output]\ncheckpoint_steps = 50\n\n[train]")


class Service:
    """A server with agents, each on its own node; commands run on the server's."""

    def __init__(self, place: Surroundings, cluster: Cluster) -> None:
        self.place, self.cluster = place, cluster
        self.commands: list[Command] = []
        self.address = f"{cluster.address(0)}:7077"
        self.data = place.folder / "data"
        # All nodes share this machine's cores, which no MPI can know.
        self.environ = {"XDG_CONFIG_HOME": str(place.folder / "config"), "OMPI_MCA_mpi_yield_when_idle": "1"}
        self.client = ["--server", self.address, "--tls-ca", "certs/ca.crt"]
        certificates.init(place.folder / "certs", [cluster.address(0)], 1)
        self.server = self.serve()
        self.seen("serving", 1)
        keep(place.folder / "token", lambda: TokenFile(self.data / TOKENS).create("nodes", Role.worker))

    def serve(self) -> Command:
        line = ["serve", "--agents", "--listen", self.address, "--data", "data"]
        return self.on(0, *line, "--tls-cert", "certs/server.crt", "--tls-key", "certs/server.key")

    def agent(self, node: int, slots: int = 1) -> Command:
        return self.on(node, "agent", *self.client, "--slots", str(slots), "--token-file", "token")

    def on(self, node: int, *words: str) -> Command:
        self.commands.append(self.place.start([*self.cluster.inside(node), *DPTRAIN, *words], **self.environ))
        return self.commands[-1]

    def said(self, *words: str) -> str:
        ended = self.place.ended(self.on(0, *words, *self.client), 60)
        assert ended.code == 0, f"{words}: {ended.out}{ended.err}"
        return ended.out

    def submit(self, *words: str) -> str:
        (self.place.folder / "job.toml").write_text(TEXT)
        found: str = json.loads(self.said("submit", "job.toml", "-o", "json", *words))["id"]
        return found

    def events(self, name: str) -> list[dict[str, Any]]:
        """What the server's log says of one kind."""
        lines = [json.loads(line) for line in self.server.err.splitlines(keepends=True) if line.endswith("}\n")]
        return [line for line in lines if line["event"] == name]

    def seen(self, name: str, times: int) -> None:
        assert until(lambda: len(self.events(name)) >= times, 60, nap=0.05), self.server.err

    def step(self, job: str) -> int:
        """How far a job is, by its journal."""
        journal = self.data / JOBS / job / "run" / rundir.JOURNAL
        lines = journal.read_text().splitlines(keepends=True) if journal.exists() else []
        whole = [json.loads(line) for line in lines if line.endswith("\n")]
        return max((line["step"] for line in whole if "step" in line and "event" not in line), default=0)

    def reaches(self, job: str, step: int) -> None:
        assert until(lambda: self.step(job) >= step, 90, nap=0.02), self.server.err

    def result(self, job: str) -> dict[str, Any]:
        """What a job came to, as soon as it has."""
        found: dict[str, Any] = {}

        def done() -> bool:
            try:
                found.update(rundir.read_json(self.data / JOBS / job / "run" / rundir.RESULT))
            except StorageError:
                return False
            return bool(found["state"] == "done")

        assert until(done, 90, nap=0.05), self.server.err
        return found


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    place = Surroundings(tmp_path / "place")
    with Cluster(place) as cluster:
        commands: list[Command] = []
        try:
            made = Service(place, cluster)
            commands = made.commands
            yield made
        finally:
            place.kill()
            for command in commands:
                command.wait(10)


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
