"""Workers that are lost with the same shards: is the shard to blame, or were they killed together?"""

import contextlib
import os
import signal
import threading
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest

from dptrain.errors import PoisonError
from dptrain.exchange.parameter_server.client import Stub
from dptrain.exchange.parameter_server.hub import Hub, Part
from dptrain.v1 import parameter_server_pb2 as pb
from dptrain.wire.address import parse
from dptrain.wire.channel import connect
from tests.exchange.parameter_server.running import Cluster
from tests.exchange.parameter_server.test_elastic import Run, folder, solo  # noqa: F401
from tests.exchange.parameter_server.test_run import job
from tests.exchange.parameter_server.test_run import solo as truth  # noqa: F401


class Lifeless:
    """A member that takes part as a worker does, and is killed when it is told to."""

    def __init__(self, address: str, identity: dict[str, str]) -> None:
        self.channel = connect(parse(address))
        stub = Stub(self.channel)
        request = pb.JoinRequest(
            job_sha256=identity["job"], data_digest=identity["data"], fingerprint=identity["fingerprint"]
        )
        self.membership = stub.join(request, timeout=20).membership
        self._more = threading.Event()
        self._begun: int | None = None
        self._tasks = stub.work(self._said())

    def _said(self) -> Any:
        yield pb.WorkRequest(membership=self.membership)
        self._more.wait(30)
        if self._begun is not None:
            yield pb.WorkRequest(membership=self.membership, begun=pb.Begun(lease=self._begun))
            self._more.clear()
            self._more.wait(30)

    def task(self) -> pb.Compute:
        with contextlib.suppress(grpc.RpcError):
            for task in self._tasks:
                return task.compute  # type: ignore[no-any-return]
        raise AssertionError("no task")

    def begin(self, lease: int) -> None:
        """Say that the lease is being computed."""
        self._begun = lease
        self._more.set()

    def killed(self) -> None:
        self._tasks.cancel()
        self._more.set()
        self.channel.close()


@pytest.mark.parametrize(
    ("begun", "blamed"),
    [
        pytest.param((False, False, False), False, id="gone before they begin"),
        pytest.param((True,), False, id="one at it"),
        pytest.param((True, False), False, id="one at it, one gone before"),
        pytest.param((True, True), True, id="two at it"),
    ],
)
def test_two_owners_count_that_were_at_a_shard_that_another_was_lost_with(
    begun: tuple[bool, ...],
    blamed: bool,
    truth: str,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each is killed at a moment of its own within one step: that many were, as long as there are others, is no end."""
    identity: dict[str, str] = {}
    admit, hear = Hub.admit, Hub.hear
    heard = threading.Semaphore(0)

    def noted(self: Hub, part: Part) -> None:
        identity.update(part.identity)
        admit(self, part)
        threading.Thread(target=strike).start()

    def listened(self: Hub, request: pb.WorkRequest) -> bool:
        found = hear(self, request)
        if request.WhichOneof("said") == "begun":
            heard.release()
        return found

    monkeypatch.setattr(Hub, "admit", noted)
    monkeypatch.setattr(Hub, "hear", listened)
    cluster = Cluster(job(), tmp_path)
    tasks: list[pb.Compute] = []

    def strike() -> None:
        living = Lifeless(cluster.address, identity)
        tasks.append(living.task())
        for begins in begun:
            following = Lifeless(cluster.address, identity)
            living.killed()
            tasks.append(following.task())
            if begins:
                following.begin(tasks[-1].lease)
                assert heard.acquire(timeout=20)
            living = following
        living.killed()
        if not blamed:
            cluster.worker()

    if blamed:
        with pytest.raises(PoisonError, match=r"shard 0 at step 0.*workers 2 and 3"):
            cluster.train(0)
    else:
        assert cluster.train(0).weights_sha256 == truth
    assert [(task.again, task.lo) for task in tasks] == [(False, 0)] + [(True, 0)] * len(begun)


@pytest.mark.long
def test_workers_killed_at_one_moment_are_no_poison(folder: Path, solo: str) -> None:  # noqa: F811
    """The server learns of all deaths together, again and again, at whatever it is then."""
    run = Run(folder, "-n", "5")
    for step in (100, 350, 600, 850):
        run.reach(step)
        server, workers = run.server(0), run.children("worker")[1:]
        server.suspend()
        try:
            for worker in workers:
                with contextlib.suppress(psutil.Error):
                    os.kill(worker.pid, signal.SIGKILL)
        finally:
            server.resume()
    code, said = run.end()
    assert code == 0, said
    assert run.result["weights_sha256"] == solo
    assert run.result["attempt"] == 1
    assert len(run.result["per_worker"]) > 6
