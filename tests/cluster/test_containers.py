"""A coordinator and workers in containers, and what becomes of jobs on them; each must end with solo's hash.

Two jobs run at a time, one by a parameter server and one over MPI, so that each fault meets both.
"""

import gzip
import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from dptrain.service.client import Client
from dptrain.v1 import job_pb2
from tests.cluster.containers import LOST, READY, Containers, become, cluster, docker, missing, reaches, ready
from tests.faults.live import until
from tests.service.jobs import JOB

FASHION = Path("/usr/share/datasets/fashion-mnist")
PARTS = ("images-idx3", "labels-idx1")
KINDS = ("ps", "node")
STEPS = 3000
TEXT = JOB.replace("steps = 30", f"steps = {STEPS}").replace("[train]", "[output]\ncheckpoint_steps = 100\n\n[train]")

pytestmark = [pytest.mark.skipif(missing() != "", reason=missing() or "containers can be made")]


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="containers-") as made:
        # Users of containers read it too.
        Path(made).chmod(0o755)
        yield Path(made)


@pytest.fixture(scope="module")
def made(folder: Path) -> Iterator[tuple[Containers, Client]]:
    with cluster(folder, 3) as found:
        yield found


@pytest.fixture
def containers(made: tuple[Containers, Client]) -> Containers:
    return made[0]


@pytest.fixture
def client(made: tuple[Containers, Client]) -> Client:
    """Of a cluster that has all of its three workers again."""
    containers, found = made
    containers.up(3)
    ready(found, 3)
    return found


@pytest.fixture(scope="module")
def truth(made: tuple[Containers, Client]) -> str:
    return made[0].solo(TEXT)


def begin(client: Client, folder: Path, workers: str = "3", text: str = TEXT) -> list[str]:
    (folder / "job.toml").write_text(text)
    sets = [[f"exchange.type={kind}"] for kind in KINDS]
    return [client.submit(folder / "job.toml", workers=workers, sets=one).id for one in sets]


def ended(client: Client, jobs: Sequence[str], folder: Path, truth: str) -> None:
    """All jobs succeed with the hash, and nobody wrote to a journal whose attempt was over."""
    for kind, job in zip(KINDS, jobs, strict=True):
        found = client.wait(job)
        assert found.state == job_pb2.JOB_STATE_SUCCEEDED, (kind, found)
        assert found.result.weights_sha256 == truth, kind
        client.download(job, "journal.jsonl", folder / f"{job}.jsonl")
        lines = [json.loads(line) for line in (folder / f"{job}.jsonl").read_text().splitlines()]
        attempts = [line["attempt"] for line in lines if "attempt" in line]
        assert attempts == sorted(attempts), kind


def test_undisturbed(client: Client, folder: Path, truth: str) -> None:
    ended(client, begin(client, folder), folder, truth)


@pytest.mark.skipif(not FASHION.exists(), reason="no Fashion-MNIST here: apt-get install dataset-fashion-mnist")
def test_fashion_mnist_comes_by_upload(client: Client, containers: Containers, folder: Path) -> None:
    images, labels = (gzip.decompress((FASHION / f"train-{name}-ubyte.gz").read_bytes()) for name in PARTS)
    x = np.frombuffer(images, np.uint8, offset=16).reshape(60000, -1)
    np.savez(folder / "fashion.npz", x=x, y=np.frombuffer(labels, np.uint8, offset=8))
    client.upload(folder / "fashion.npz")
    text = JOB.replace("digits", "fashion.npz").replace("steps = 30", "steps = 100")
    text = text.replace("layers = [", 'layers = [{ type = "linear", units = 64 }, { type = "relu" }, ')
    ended(client, begin(client, folder, text=text), folder, containers.solo(text, folder / "fashion.npz"))


def test_a_worker_is_killed(client: Client, containers: Containers, folder: Path, truth: str) -> None:
    jobs = begin(client, folder)
    reaches(client, jobs, STEPS // 10)
    node = containers.node_of(client, jobs)
    docker("kill", node)
    become(client, node, LOST)
    containers.up(3)
    ended(client, jobs, folder, truth)


def test_a_worker_is_paused_beyond_the_deadline(
    client: Client, containers: Containers, folder: Path, truth: str
) -> None:
    jobs = begin(client, folder)
    reaches(client, jobs, STEPS // 10)
    node = containers.node_of(client, jobs)
    docker("pause", node)
    try:
        become(client, node, LOST)
    finally:
        docker("unpause", node)
    become(client, node, READY)
    ended(client, jobs, folder, truth)


def test_a_worker_is_cut_off_and_comes_back(client: Client, containers: Containers, folder: Path, truth: str) -> None:
    jobs = begin(client, folder)
    reaches(client, jobs, STEPS // 10)
    node = containers.node_of(client, jobs)
    docker("network", "disconnect", containers.network, node)
    try:
        become(client, node, LOST)
    finally:
        docker("network", "connect", containers.network, node)
    become(client, node, READY)
    ended(client, jobs, folder, truth)


def test_the_coordinator_is_killed(client: Client, containers: Containers, folder: Path, truth: str) -> None:
    jobs = begin(client, folder)
    reaches(client, jobs, STEPS // 10)
    docker("kill", containers.container("coordinator"))
    containers.up(3)
    ended(client, jobs, folder, truth)


def test_two_workers_become_four(client: Client, containers: Containers, folder: Path, truth: str) -> None:
    containers.up(2)
    ready(client, 2)
    jobs = begin(client, folder, "1..4", TEXT.replace(f"steps = {STEPS}", f"steps = {4 * STEPS}"))
    reaches(client, jobs, STEPS // 10)
    containers.up(4)
    ready(client, 4)

    def grown() -> bool:
        return any(client.job(job).workers > 2 for job in jobs)

    assert until(grown, 120, nap=0.25), [client.job(job) for job in jobs]
    long = TEXT.replace(f"steps = {STEPS}", f"steps = {4 * STEPS}")
    ended(client, jobs, folder, containers.solo(long))
