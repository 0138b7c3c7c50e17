"""A server with agents on three nodes, and what may become of them while a job runs.

``python -m tests.service.over_nodes [--apart] [WHAT...]`` does each to a job: it must end with solo's hash. With
``--apart`` no node sees the server's folder, and the journal must tell of each step of the last attempt once.
"""

import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dptrain import journal, rundir
from dptrain.board import RANK, Cell
from dptrain.errors import StorageError
from dptrain.service.server import JOBS, TOKENS
from dptrain.wire import certificates
from dptrain.wire.tokens import Role, TokenFile, keep
from tests.faults.live import Job, signalled, until
from tests.faults.network import Cluster
from tests.faults.oracle import Command, Surroundings
from tests.service.jobs import JOB, solo_hash

PATIENCE = 240.0
"""Seconds after which what is waited for is taken not to come: far longer than it takes where much else runs."""

DPTRAIN = [sys.executable, "-P", "-m", "dptrain"]
STEPS = 2000
QUIET = JOB.replace("steps = 30", f"steps = {STEPS}")
TEXT = QUIET.replace("[train]", "[output]\ncheckpoint_steps = 50\n\n[train]")

FEW = {"node": 600, "ps": 1500}
"""Steps of each kind of job, which are done when the other's are, about. Those over MPI take longer to begin."""


def of_steps(steps: int) -> str:
    """TEXT with another number of steps."""
    return TEXT.replace(f"steps = {STEPS}", f"steps = {steps}")


def truths(folder: Path) -> dict[str, str]:
    """Solo's hash of each kind of job of FEW steps."""
    return {kind: solo_hash(folder, of_steps(few)) for kind, few in FEW.items()}


class Service:
    """A server with agents, each on its own node; commands run on the server's."""

    def __init__(self, place: Surroundings, cluster: Cluster, options: Sequence[str] = ()) -> None:
        self.place, self.cluster, self.options = place, cluster, options
        self.commands: list[Command] = []
        self.apart = False
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
        line = ["serve", "--agents", "--listen", self.address, "--data", "data", *self.options]
        return self.on(0, *line, "--tls-cert", "certs/server.crt", "--tls-key", "certs/server.key")

    def agent(self, node: int, *options: str, slots: int = 1, apart: bool = False, **environ: str) -> Command:
        """With ``apart``, of this or of all, it doesn't see the server's folder."""
        apart = apart or self.apart
        words = ["agent", *self.client, "--slots", str(slots), "--token-file", "token", *options]
        hidden = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs none data && exec "$@"', "sh"] if apart else []
        cache = str(self.place.folder / f"cache-{node}")
        return self.on(node, *words, before=hidden, DPTRAIN_CACHE=cache, **environ)

    def on(self, node: int, *words: str, before: Sequence[str] = (), **environ: str) -> Command:
        line = [*self.cluster.inside(node), *before, *DPTRAIN, *words]
        self.commands.append(self.place.start(line, **self.environ, **environ))
        return self.commands[-1]

    def said(self, *words: str) -> str:
        ended = self.place.ended(self.on(0, *words, *self.client), 60)
        assert ended.code == 0, f"{words}: {ended.out}{ended.err}"
        return ended.out

    def submit(self, *words: str, text: str = "") -> str:
        (self.place.folder / "job.toml").write_text(text or TEXT)
        found: str = json.loads(self.said("submit", "job.toml", "-o", "json", *words))["id"]
        return found

    def submit_each(self) -> dict[str, str]:
        """A job of each kind, of FEW steps and three workers; their IDs."""
        text = '{}\n[exchange]\ntype = "{}"\n'
        return {kind: self.submit("-n", "3", text=text.format(of_steps(few), kind)) for kind, few in FEW.items()}

    def have_begun(self, jobs: Mapping[str, str]) -> None:
        """Return when each has done a tenth of its steps."""
        for kind, job in jobs.items():
            self.reaches(job, FEW[kind] // 10)

    def end_as(self, jobs: Mapping[str, str], truths: Mapping[str, str]) -> None:
        """Each ends with its hash, and a whole journal."""
        for kind, job in jobs.items():
            assert self.result(job)["weights_sha256"] == truths[kind], kind
            self.whole(job, FEW[kind])

    def events(self, name: str) -> list[dict[str, Any]]:
        """What the server's log says of one kind."""
        lines = [json.loads(line) for line in self.server.err.splitlines(keepends=True) if line.endswith("}\n")]
        return [line for line in lines if line["event"] == name]

    @property
    def failed(self) -> bool:
        """Whether a job has."""
        return any(line["state"] == "FAILED" for line in self.events("job"))

    def seen(self, name: str, times: int) -> None:
        assert until(lambda: len(self.events(name)) >= times, PATIENCE, nap=0.05), self.server.err

    def step(self, job: str) -> int:
        """How far a job is, by its journal."""
        journal = self.data / JOBS / job / "run" / rundir.JOURNAL
        lines = journal.read_text().splitlines(keepends=True) if journal.exists() else []
        whole = [json.loads(line) for line in lines if line.endswith("\n")]
        return max((line["step"] for line in whole if "step" in line and "event" not in line), default=0)

    def reaches(self, job: str, step: int) -> None:
        assert until(lambda: self.step(job) >= step or self.failed, PATIENCE, nap=0.02), self.server.err
        assert not self.failed, self.server.err

    def worker(self, rank: int, nodes: Sequence[int]) -> Cell:
        """The worker of a rank, of those that train, one on each of the nodes."""
        found: dict[int, Cell] = {}

        def seen() -> bool:
            jobs = (Job.among(self.cluster.processes(node), 1) for node in nodes)
            found.update({cell[RANK]: cell for job in jobs if job is not None for cell in job.living})
            return rank in found

        assert until(seen, PATIENCE, nap=0.02), self.server.err
        return found[rank]

    def whole(self, job: str, last: int = STEPS) -> None:
        """A job's journal tells of every step once a launch, in order, and of the last one."""
        lines = journal.read_all(self.data / JOBS / job / "run" / rundir.JOURNAL)
        steps: dict[int, list[int]] = {}
        for line in lines:
            if "step" in line and "event" not in line:
                steps.setdefault(line["attempt"], []).append(line["step"])
        assert all(some == sorted(set(some)) for some in steps.values()), steps
        found = [line["step"] for line in journal.read_steps(self.data / JOBS / job / "run" / rundir.JOURNAL)]
        assert found == sorted(set(found)), found
        assert max(found) == last

    def result(self, job: str) -> dict[str, Any]:
        """What a job came to, as soon as it has."""
        found: dict[str, Any] = {}

        def done() -> bool:
            try:
                found.update(rundir.read_json(self.data / JOBS / job / "run" / rundir.RESULT))
            except StorageError:
                return False
            return bool(found["state"] == "done")

        assert until(lambda: self.failed or done(), PATIENCE, nap=0.05), self.server.err
        assert not self.failed, self.server.err
        return found


@contextmanager
def service(folder: Path, *options: str) -> Iterator[Service]:
    """A server on a node of its own, in a new folder, with ``options``; everything is ended afterwards."""
    place = Surroundings(folder)
    with Cluster(place) as cluster:
        commands: list[Command] = []
        try:
            made = Service(place, cluster, options)
            commands = made.commands
            yield made
        finally:
            place.kill()
            for command in commands:
                command.wait(10)


def _agent_killed(service: Service, agents: Mapping[int, Command]) -> None:
    os.kill(agents[3].process.pid, signal.SIGKILL)


def _agent_stopped(service: Service, agents: Mapping[int, Command]) -> None:
    """Beyond the deadline; it goes on when the job has begun again without it."""
    os.kill(agents[3].process.pid, signal.SIGSTOP)
    service.seen("node lost", 1)
    os.kill(agents[3].process.pid, signal.SIGCONT)
    service.seen("node joined", 4)


def _link_cut(service: Service, agents: Mapping[int, Command]) -> None:
    """Of the chief's node, and mended when the others have gone on."""
    service.cluster.cut(1)
    service.seen("node lost", 1)
    time.sleep(3)
    service.cluster.mend(1)


def _worker_killed(service: Service, agents: Mapping[int, Command]) -> None:
    assert signalled(service.worker(2, list(agents)), signal.SIGKILL)


def _chief_killed(service: Service, agents: Mapping[int, Command]) -> None:
    """Under Open MPI the chief of another node goes on with the same run directory."""
    assert signalled(service.worker(0, list(agents)), signal.SIGKILL)


def _link_cut_for_a_moment(service: Service, agents: Mapping[int, Command]) -> None:
    service.cluster.cut(3)
    time.sleep(2)
    service.cluster.mend(3)


def _server_killed(service: Service, agents: Mapping[int, Command]) -> None:
    os.kill(service.server.process.pid, signal.SIGKILL)
    service.server.wait(10)
    service.server = service.serve()


def _all_agents_killed(service: Service, agents: Mapping[int, Command]) -> None:
    for agent in agents.values():
        os.kill(agent.process.pid, signal.SIGKILL)
    service.seen("node lost", 3)
    for node in agents:
        service.agent(node)


WHAT: Mapping[str, Callable[[Service, Mapping[int, Command]], None]] = {
    "worker killed": _worker_killed,
    "chief killed": _chief_killed,
    "agent killed": _agent_killed,
    "agent stopped": _agent_stopped,
    "link cut": _link_cut,
    "link cut for a moment": _link_cut_for_a_moment,
    "server killed": _server_killed,
    "all agents killed": _all_agents_killed,
}


def main() -> int:
    """Do it, and tell of each; 1 where one ended otherwise than it should."""
    bad = 0
    work = Path(tempfile.mkdtemp(prefix="over-nodes-"))
    truth = solo_hash(work, QUIET)
    apart = sys.argv[1:2] == ["--apart"]
    for what in sys.argv[1 + apart :] or WHAT:
        began = time.monotonic()
        with service(work / what.replace(" ", "-")) as made:
            made.apart = apart
            agents = {node: made.agent(node) for node in (1, 2, 3)}
            made.seen("node joined", 3)
            job = made.submit("-n", "3")
            made.reaches(job, 40)
            struck = made.step(job)
            WHAT[what](made, agents)
            try:
                good = made.result(job)["weights_sha256"] == truth
                made.whole(job)
            except AssertionError as error:
                good = False
                print(error)
            print(f"{'good' if good else 'BAD'}: {what} at step {struck} {time.monotonic() - began:.0f} s", flush=True)
            if not good:
                print((made.data / JOBS / job / "log.jsonl").read_text()[-4000:], flush=True)
            bad += not good
    shutil.rmtree(work)
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
