"""Shards that are computed twice: the first answer counts, and the second must be the same bytes."""

import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dptrain.errors import DisagreementError
from dptrain.exchange.parameter_server.client import Client
from dptrain.exchange.parameter_server.intake import Intake
from dptrain.job.spec import Job
from dptrain.nn.accumulate import Partials
from dptrain.v1 import parameter_server_pb2 as pb
from tests.exchange.parameter_server.running import Cluster
from tests.exchange.parameter_server.test_run import job

SHARDS = 8
LATE, NEXT = 3, 4
WAIT = 60.0


def backed(k: int) -> Job:
    it = job()
    return replace(it, exchange=replace(it.exchange, backup_workers=k))


class Overtaken(Client):
    """Worker 2 sends what it has of one step when worker 1 has done all of that step; worker 1 waits until it is here.

    That step worker 1 does not answer before worker 2 has something of it, however late that one joins or wakes.

    Where ``wrong``, worker 2's gradients of that step have one bit flipped.
    """

    wrong = False

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.late = self._membership.worker == 2

    def _push(self, task: pb.Compute, partials: Partials) -> None:
        if self.late and task.step == LATE:
            self.leases.add(task.lease)
            self.at_it.set()
            self._await(self.all_done)
            if self.wrong:
                np.asarray(partials.vectors)[0].view(np.uint32)[7] ^= 1
        elif not self.late and task.step == LATE:
            self._await(self.at_it)
        elif not self.late and task.step == NEXT:
            self._await(self.compared)
        super()._push(task, partials)
        if not self.late and task.step == LATE:
            self.done.update(range(task.lo, task.hi))
            if len(self.done) == SHARDS:
                self.all_done.set()

    def _acknowledged(self, pushed: Any, segment: int) -> None:
        def noted() -> Any:
            for answer in pushed:
                if self.late and answer.lease in self.leases:
                    self.compared.set()
                yield answer

        super()._acknowledged(noted(), segment)

    def _await(self, event: threading.Event) -> None:
        """Wait, and give signs of life all the while."""
        until = time.monotonic() + WAIT
        while not event.wait(0.1):
            assert time.monotonic() < until
            self.weights.waits += 1

    at_it: threading.Event
    all_done: threading.Event
    compared: threading.Event
    done: set[int]
    leases: set[int]


def overtaken(monkeypatch: pytest.MonkeyPatch, *, wrong: bool) -> list[Any]:
    """Let workers be such; the boxes that what comes late is compared with."""
    fresh: dict[str, Any] = {name: threading.Event() for name in ("at_it", "all_done", "compared")}
    fresh |= {"done": set(), "leases": set(), "wrong": wrong}
    monkeypatch.setattr("dptrain.exchange.parameter_server.client.Client", type("Worker", (Overtaken,), fresh))
    looked: list[Any] = []
    differ = Intake.differ

    def noted(self: Intake, lease: int, first: Any) -> bool:
        looked.append(first)
        return differ(self, lease, first)

    monkeypatch.setattr(Intake, "differ", noted)
    return looked


def test_the_first_answer_counts(solo: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked = overtaken(monkeypatch, wrong=False)
    cluster = Cluster(backed(SHARDS), tmp_path)
    assert cluster.train(2).weights_sha256 == solo
    assert cluster.codes == [0, 0]
    assert looked


def test_another_second_answer_names_the_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    overtaken(monkeypatch, wrong=True)
    cluster = Cluster(backed(SHARDS), tmp_path)
    with pytest.raises(DisagreementError, match=f"workers (1 and 2|2 and 1) at step {LATE}, shard "):
        cluster.train(2)
    assert cluster.codes == [1, 1]
