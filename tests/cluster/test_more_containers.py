"""docker-compose.more.yml beside docker-compose.yml: parameter servers, Prometheus and TensorBoard, for real."""

import json
import os
import tempfile
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from dptrain.v1 import job_pb2
from tests.cluster.containers import DEADLINE, NAPS, Containers, free_ports, missing, ready
from tests.faults.live import until
from tests.service.jobs import JOB

FILES = ("docker-compose.yml", "docker-compose.more.yml")
STEPS = 300
TEXT = JOB.replace("steps = 30", f"steps = {STEPS}")

pytestmark = [pytest.mark.skipif(missing() != "", reason=missing() or "containers can be made")]


class More(NamedTuple):
    """A cluster with all extras, and where the host's loopback has those that answer by HTTP."""

    containers: Containers
    prometheus: str
    tensorboard: str


@pytest.fixture(scope="module")
def more() -> Iterator[More]:
    with tempfile.TemporaryDirectory(prefix="containers-") as name, ExitStack() as left:
        folder = Path(name)
        # Users of containers read it too.
        folder.chmod(0o755)
        (folder / "servers.toml").write_text(TEXT)
        ports = [str(port) for port in free_ports(2)]
        settings = {"JOB": str(folder / "servers.toml"), "PROMETHEUS_PORT": ports[0], "TENSORBOARD_PORT": ports[1]}
        containers = Containers(folder, FILES, **settings)
        left.callback(containers.down)
        without = [] if os.environ.get("PROMETHEUS_IMAGE") else ["--scale", "prometheus=0"]
        containers.up(1, "--scale", "server-worker=2", *without)
        try:
            yield More(containers, *(f"http://127.0.0.1:{port}" for port in ports))
        finally:
            print(containers.compose("logs", "--tail", "30"))


def test_parameter_servers_train_the_job_with_workers_of_their_own(more: More) -> None:
    result = ran(more.containers)
    assert (result["state"], result["weights_sha256"]) == ("done", more.containers.solo(TEXT))
    assert result["workers"] == 2

    # The end of a run is the end of its processes, and nobody starts them again.
    def over() -> bool:
        ids = more.containers.compose("ps", "--all", "-q", "server-1", "server-2", "server-worker").split()
        assert len(ids) == 4
        return {more.containers.ended(one) for one in ids} == {"exited 0"}

    assert until(over, DEADLINE, nap=NAPS), more.containers.compose("ps", "--all")


@pytest.mark.skipif(not os.environ.get("PROMETHEUS_IMAGE"), reason="PROMETHEUS_IMAGE names no image of Prometheus")
def test_prometheus_has_the_figures_of_the_service(more: More) -> None:
    with ExitStack() as left:
        client = more.containers.client(left)
        ready(client, 1)
        (more.containers.folder / "job.toml").write_text(JOB)
        done = client.wait(client.submit(more.containers.folder / "job.toml", workers="1").id)
        assert done.state == job_pb2.JOB_STATE_SUCCEEDED, done

    def value(query: str) -> str | None:
        told = got(f"{more.prometheus}/api/v1/query?{urllib.parse.urlencode({'query': query})}")
        found = told["data"]["result"] if told is not None else []
        return found[0]["value"][1] if found else None

    assert until(lambda: value('up{job="dptrain"}') == "1", DEADLINE, nap=NAPS)
    assert until(lambda: value('dptrain_jobs{state="succeeded"}') == "1", DEADLINE, nap=NAPS)


def test_tensorboard_shows_the_run(more: More) -> None:
    ran(more.containers)

    def last() -> int:
        """The newest step that it has read: it looks every few seconds."""
        tags = got(f"{more.tensorboard}/data/plugin/scalars/tags")
        if tags is None or "loss" not in tags.get("servers", {}):
            return 0
        points = got(f"{more.tensorboard}/data/plugin/scalars/scalars?run=servers&tag=loss")
        return int(points[-1][1]) if points else 0

    assert until(lambda: last() == STEPS, DEADLINE, nap=NAPS), last()


def ran(containers: Containers) -> dict[str, Any]:
    """The result of the parameter servers' run, when it is there."""
    found: dict[str, Any] = {}

    def there() -> bool:
        try:
            found.update(
                json.loads(containers.compose("exec", "-T", "coordinator", "cat", "/data/servers/result.json"))
            )
        except AssertionError:
            return False
        return True

    assert until(there, DEADLINE, nap=1.0), containers.compose("ps", "--all")
    return found


def got(url: str) -> Any:
    """What is answered, as JSON; None while nobody answers."""
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return json.load(answer)
    except (urllib.error.URLError, ConnectionError):
        return None
