"""A cluster of real containers by docker-compose.yml, driven from outside over gRPC with TLS."""

import json
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from dptrain.service.client import Client
from dptrain.v1 import cluster_service_pb2, job_pb2
from dptrain.wire.security import ClientTls
from tests.faults.live import until

IMAGE = "CLUSTER_IMAGE"
"""Of the environment: names the image that is tested."""

COMPOSE = "CLUSTER_COMPOSE"
"""Of the environment: the command that reads docker-compose.yml, where it is to be a certain one."""

ROOT = Path(__file__).resolve().parents[2]
READY, LOST = cluster_service_pb2.NODE_STATE_READY, cluster_service_pb2.NODE_STATE_LOST
FILES = ("docker-compose.yml",)
Done = subprocess.CompletedProcess[str]
DEADLINE = 180.0
NAPS = 0.25


def missing() -> str:
    """Why there can be no containers here; "" where there can."""
    if not os.environ.get(IMAGE):
        return f"containers: {IMAGE} names no image; tests/cluster/run.sh makes one and runs this"
    if not _compose():
        return "containers: neither docker-compose nor docker compose is here"
    asked = _run("docker", "info", check=False)
    return "" if asked.returncode == 0 else f"containers: no engine answers: {asked.stderr.strip()[-200:]}"


class Containers:
    """A coordinator and workers with two slots each; what is said of nodes is said of workers' containers."""

    def __init__(self, folder: Path, files: Sequence[str] = FILES, **settings: str) -> None:
        self.folder = folder
        self._files = [word for name in files for word in ("--file", str(ROOT / name))]
        self.project = f"dptrain-test-{os.getpid()}"
        self.network = f"{self.project}_cluster"
        port, page = free_ports(2)
        self._environ = {**os.environ, "IMAGE": os.environ[IMAGE], "PORT": str(port), "PAGE_PORT": str(page)}
        self._environ |= {"SLOTS": "2", "COMPOSE_IGNORE_ORPHANS": "1"} | settings
        self.address = f"localhost:{port}"

    def compose(self, *words: str, **given: Any) -> str:
        line = [*_compose(), "--project-name", self.project, *self._files, *words]
        return _run(*line, environ=self._environ, **given).stdout

    def up(self, workers: int, *words: str) -> None:
        """Have so many workers, whatever became of those before."""
        self.compose("up", "--detach", "--no-build", "--no-recreate", "--scale", f"worker={workers}", *words)

    def down(self) -> None:
        self.compose("down", "--volumes", "--timeout", "2")

    def client(self, left: ExitStack) -> Client:
        """An operator's, who has brought certificate and token out once."""
        ca, token = self.folder / "ca.crt", self.folder / "operator.token"
        ca.write_text(self.compose("exec", "-T", "coordinator", "cat", "/access/ca.crt"))
        token.touch(0o600)
        token.write_text(self.compose("exec", "-T", "coordinator", "cat", "/data/server/token"))
        return left.enter_context(Client(self.address, token_file=token, tls=ClientTls(ca), environ={}))

    def container(self, service: str) -> str:
        return self.compose("ps", "-q", service).split()[0]

    def ended(self, container: str) -> str:
        """How a container stands, and the code it ended with."""
        return docker("inspect", "--format", "{{.State.Status}} {{.State.ExitCode}}", container).strip()

    def node_of(self, client: Client, jobs: Sequence[str]) -> str:
        """A node on which all these jobs have workers, else the first of the last one's."""
        found: list[list[str]] = []
        for job in jobs:
            hosts = self.compose("exec", "-T", "coordinator", "cat", f"/data/server/jobs/{job}/hosts")
            found.append([line.split()[0] for line in hosts.splitlines()])
        common = [name for name in found[-1] if all(name in hosts for hosts in found)]
        return (common or found[-1])[0]

    def solo(self, text: str, data: Path | None = None) -> str:
        """The hash of a job that one process of the same image has trained, without a network."""
        place = self.folder / "solo"
        place.mkdir(mode=0o755, exist_ok=True)
        (place / "job.toml").write_text(text)
        if data is not None and not (place / data.name).exists():
            shutil.copy(data, place / data.name)
        mount = ["--volume", f"{place}:/job:ro", "--network", "none", "--entrypoint", "sh"]
        line = "cd /tmp && dptrain run /job/job.toml --progress none --run-dir run >&2 && cat run/result.json"
        told = _run("docker", "run", "--rm", *mount, os.environ[IMAGE], "-c", line).stdout
        found: str = json.loads(told)["weights_sha256"]
        return found


@contextmanager
def cluster(folder: Path, workers: int) -> Iterator[tuple[Containers, Client]]:
    """Containers and a client; all that was made is removed afterwards."""
    made = Containers(folder)
    with ExitStack() as left:
        left.callback(made.down)
        made.up(workers)
        client = made.client(left)
        try:
            ready(client, workers)
            yield made, client
        except BaseException:
            print(made.compose("logs", "--tail", "60"))
            raise


def docker(*words: str) -> str:
    """What the engine answers."""
    return _run("docker", *words).stdout


def nodes(client: Client) -> Mapping[str, Any]:
    """Where each node stands."""
    return {node.name: node.state for node in client.nodes()}


def ready(client: Client, workers: int) -> None:
    """Return when so many nodes are."""
    assert until(lambda: list(nodes(client).values()).count(READY) == workers, DEADLINE, nap=NAPS), nodes(client)


def become(client: Client, node: str, state: Any) -> None:
    """Return when a node stands so."""
    assert until(lambda: nodes(client).get(node) == state, DEADLINE, nap=NAPS), nodes(client)


def reaches(client: Client, jobs: Sequence[str], step: int) -> None:
    """Return when all jobs have done so many steps."""

    def far() -> bool:
        found = [client.job(job) for job in jobs]
        assert all(job.state != job_pb2.JOB_STATE_FAILED for job in found), found
        return all(job.progress.step >= step for job in found)

    assert until(far, DEADLINE, nap=NAPS), [client.job(job) for job in jobs]


def _compose() -> list[str]:
    """The command; [] where there is none."""
    if asked := os.environ.get(COMPOSE):
        return asked.split()
    if shutil.which("docker") and _run("docker", "compose", "version", check=False).returncode == 0:
        return ["docker", "compose"]
    return ["docker-compose"] if shutil.which("docker-compose") else []


def _run(
    *line: str, environ: Mapping[str, str] | None = None, check: bool = True
) -> "subprocess.CompletedProcess[str]":
    done = subprocess.run(line, env=environ, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0 or not check, f"{' '.join(line)}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
    return done


def free_ports(count: int) -> list[int]:
    with ExitStack() as held:
        sockets = [held.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [made.getsockname()[1] for made in sockets]
