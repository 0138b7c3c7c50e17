"""Residuals that lie with the workers: handed over, collected, gone with a worker, and always those of solo."""

import json
import random
import signal
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from dptrain.exchange.parameter_server.leases import Lease
from dptrain.exchange.parameter_server.residuals import SERVER, Age, Keeping, Ledger, claimed, parts
from dptrain.job.load import load_job
from dptrain.job.spec import Job
from dptrain.result import Result
from dptrain.training import run
from tests.exchange.jobs import job
from tests.exchange.parameter_server.running import Cluster
from tests.exchange.parameter_server.test_elastic import JOB, Run, folder  # noqa: F401

TOP_K = {"gradients": "top_k", "top_k": 0.05}

JOBS = {
    "mlp": job("mlp", 8, arithmetic=TOP_K),
    "cnn": job("cnn", 6, arithmetic=TOP_K),
    "clipped": job("mlp", 6, arithmetic=TOP_K, optimizer={"clip_norm": 0.3}),
}


@pytest.fixture(scope="module")
def truths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    return {name: run(it, run_dir=tmp_path_factory.mktemp(name) / "run") for name, it in JOBS.items()}


@pytest.mark.parametrize(
    ("name", "workers", "servers", "standby"),
    [("mlp", 1, 1, False), ("mlp", 3, 1, False), ("cnn", 2, 1, False), ("cnn", 5, 1, True), ("mlp", 3, 2, True),
     ("clipped", 2, 3, False)],
)  # fmt: skip
def test_the_hash_is_solos(
    name: str, workers: int, servers: int, standby: bool, truths: dict[str, Result], tmp_path: Path
) -> None:
    result = Cluster(JOBS[name], tmp_path, servers, standby=standby).train(workers)
    assert result.weights_sha256 == truths[name].weights_sha256
    assert result.metrics == truths[name].metrics
    assert result.arithmetic["gradients"] == "top_k"


def test_processes_of_a_host_share_them(truths: dict[str, Result], tmp_path: Path) -> None:
    cluster = Cluster(JOBS["mlp"], tmp_path)

    def ready() -> None:
        cluster.worker(processes=3)
        cluster.worker()

    assert cluster.train(ready=ready).weights_sha256 == truths["mlp"].weights_sha256


class Joined:
    """An observer that lets a worker join after some steps."""

    def __init__(self, cluster: Cluster, *steps: int) -> None:
        self.cluster, self.steps = cluster, steps

    def started(self, info: object) -> None: ...

    def progressed(self, line: dict[str, object]) -> None:
        if line["step"] in self.steps:
            self.cluster.worker()
            self.cluster.joined(2 + self.steps.index(line["step"]))

    def warned(self, text: str) -> None: ...

    def recovered(self, recovery: object) -> None: ...

    def finished(self, result: object) -> None: ...

    def close(self) -> None: ...


def test_who_joins_is_handed_those_of_its_shards(tmp_path: Path) -> None:
    it = job("mlp", 8, arithmetic=TOP_K, train={"steps": 60}, output={"journal_steps": 1, "checkpoint_steps": 7})
    alone = run(it, run_dir=tmp_path / "solo")
    cluster = Cluster(it, tmp_path)
    result = cluster.train(1, observer=Joined(cluster, 3, 9))
    assert result.weights_sha256 == alone.weights_sha256
    assert cluster.codes == [0, 0, 0]
    assert [worker["shards_computed"] > 0 for worker in result.per_worker[1:]] == [True] * 3
    # Nobody lost any: each shard was computed once a step.
    assert sum(worker["shards_computed"] for worker in result.per_worker) == 60 * 8


def test_a_run_goes_on_here_and_there(tmp_path: Path) -> None:
    def until(steps: int) -> Job:
        return job("mlp", 8, arithmetic=TOP_K, train={"steps": steps}, optimizer={"schedule": {"type": "constant"}})

    straight = run(until(20), run_dir=tmp_path / "straight")
    here = tmp_path / "run"
    run(until(4), run_dir=here)
    Cluster(until(9), tmp_path).train(2, resume=True)
    run(until(12), run_dir=here, resume=True)
    result = Cluster(until(20), tmp_path, 2).train(3, resume=True)
    assert result.weights_sha256 == straight.weights_sha256


def test_steps_that_count_for_nothing_leave_residuals_as_they_are(tmp_path: Path) -> None:
    """One row is so large that its batch's gradient overflows, once an epoch."""
    random = np.random.default_rng(3)
    x = random.standard_normal((120, 6)).astype(np.float32)
    x[7] = 3e38
    np.savez(tmp_path / "rows.npz", x=x, y=random.integers(0, 3, 120))
    it = job(
        "mlp",
        6,
        data={"source": str(tmp_path / "rows.npz"), "validation": 0.0, "test": 0.0},
        model={"layers": [{"type": "linear", "units": 9}, {"type": "relu"}, {"type": "linear", "units": 3}]},
        arithmetic=TOP_K,
        train={"steps": 30, "batch_size": 20, "evaluate_steps": 0, "result": "last", "non_finite": "skip"},
    )
    alone = run(it, run_dir=tmp_path / "solo")
    skipped = [
        json.loads(line).get("skipped", 0) for line in (tmp_path / "solo" / "journal.jsonl").read_text().splitlines()
    ]
    assert sum(skipped) == 5
    cluster = Cluster(it, tmp_path)
    assert cluster.train(3).weights_sha256 == alone.weights_sha256


STEPS = JOB.replace("[train]", '[arithmetic]\ngradients = "top_k"\ntop_k = 0.02\n[train]')


@pytest.fixture(scope="module")
def solo(tmp_path_factory: pytest.TempPathFactory) -> str:
    place = tmp_path_factory.mktemp("solo")
    (place / "job.toml").write_text(STEPS)
    return run(load_job(place / "job.toml", (), {}), run_dir=place / "run").weights_sha256


def events(run: Run, text: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run.dir / "journal.jsonl").read_text().splitlines()]
    return [line for line in lines if line.get("event") == "warning" and text in line["text"]]


def strike(run: Run, command: str, number: signal.Signals, chance: random.Random) -> None:
    there = run.children(command)
    if there:
        with suppress(psutil.Error):
            chance.choice(there).send_signal(number)


@pytest.mark.long
def test_workers_that_leave_hand_theirs_over(folder: Path, solo: str) -> None:  # noqa: F811
    (folder / "job.toml").write_text(STEPS)
    run, chance = Run(folder, "-n", "3"), random.Random(6)
    for step in (150, 500, 900):
        run.reach(step)
        strike(run, "worker", signal.SIGTERM, chance)
    code, said = run.end()
    assert code == 0, said
    assert run.result["weights_sha256"] == solo
    assert not events(run, "residuals")
    assert len(run.result["per_worker"]) > 4


@pytest.mark.long
def test_workers_that_die_take_theirs_along(folder: Path, solo: str) -> None:  # noqa: F811
    """Before there is a checkpoint, and after: the run goes back by itself, and is not started again."""
    (folder / "job.toml").write_text(STEPS)
    run, chance = Run(folder, "-n", "3", "--set", "exchange.lease_seconds=2"), random.Random(7)
    for step, number in ((100, signal.SIGKILL), (500, signal.SIGSTOP), (900, signal.SIGKILL)):
        run.reach(step)
        strike(run, "worker", number, chance)
    code, said = run.end()
    assert code == 0, said
    assert run.result["weights_sha256"] == solo
    assert run.result["attempt"] == 1
    back = [line["text"] for line in events(run, "residuals")]
    assert len(back) == 3
    assert "steps 0 to" in back[0]
    assert "steps 800 to" in back[2]


@pytest.mark.long
def test_another_chief_finds_them_with_the_workers(folder: Path, solo: str) -> None:  # noqa: F811
    (folder / "job.toml").write_text(STEPS)
    run = Run(folder, "-n", "2", "--standby")
    run.reach(500)
    run.server(0).kill()
    code, said = run.end()
    assert code == 0, said
    assert run.result["weights_sha256"] == solo
    assert [recovery["chief"] for recovery in run.result["recoveries"]] == [1]
    assert not events(run, "residuals")


def rows(shards: int, n: int = 5) -> list[Any]:
    return list(np.arange(shards * n, dtype=np.float32).reshape(shards, n) + 1)


def test_the_ledger_knows_who_computed_a_shard_last() -> None:
    ledger, nobody = Ledger(rows(3)), {1: {}, 2: {}, 3: {}}  # type: ignore[var-annotated]
    ledger.begin()
    ledger.at(Age(0, 0))
    assert not ledger.lacks(0, 2, nobody)
    ledger.committed(Age(1, 1), [Lease(7, 1, 0, 2), Lease(8, 2, 2, 3)])
    assert [ledger.holders(shard, nobody) for shard in range(3)] == [[1], [1], [2]]
    assert ledger.holders(0, {2: {}}) == []
    # A step that did not count changes nothing.
    ledger.at(Age(2, 1))
    assert ledger.age == Age(1, 1)
    assert ledger.lacks(0, 2, nobody)
    ledger.granted(0, 2, {})
    assert not ledger.lacks(0, 2, nobody)
    ledger.renew()
    assert ledger.holders(0, nobody) == []
    claims = claimed(Keeping(np.zeros((2, 3, 5), np.float32)).claims())
    assert claims == {}
    has = {1: {0: {Age(1, 1)}}, 2: {0: {Age(2, 2)}}}
    assert ledger.holders(0, has) == [1]
    # Another server has committed a step that this one has not seen.
    ledger.at(Age(3, 2))
    assert ledger.holders(0, has) == []


def test_a_residual_that_comes_damaged_is_asked_for_again() -> None:
    ledger = Ledger(rows(2))
    ledger.begin()
    ledger.committed(Age(4, 4), [Lease(1, 5, 0, 2)])
    ledger.at(Age(4, 4))
    theirs = np.full(5, 9, np.float32)
    (part,) = parts(theirs, 1, Age(4, 4))
    ledger.take(5, part)
    assert not ledger.here(1)
    assert ledger.ask(1, 5) is not None
    assert ledger.ask(1, 5) is None
    (stale,) = parts(theirs, 1, Age(3, 3))
    ledger.take(5, stale)
    ledger.take(6, part)
    (spoilt,) = parts(theirs, 1, Age(4, 4))
    spoilt.checksum ^= 1
    ledger.take(5, spoilt)
    assert not ledger.here(1)
    assert ledger.ask(1, 5) is not None
    ledger.take(5, part)
    assert ledger.here(1)
    assert ledger.rows[1].tolist() == theirs.tolist()
    assert SERVER in ledger.holders(1, {})


def test_a_worker_keeps_two_of_each_shard() -> None:
    memory = np.full((2, 2, 4), 7, np.float32)
    keeping = Keeping(memory)
    keeping.begin(Age(0, 0), 0, 2)
    assert not memory[0].any()
    memory[1] = 1
    keeping.ended(Age(0, 0), 0, 0, 2)
    assert {(kept.shard, *Age.of(kept.age)) for kept in keeping.claims()} == {
        (shard, *age) for shard in (0, 1) for age in (Age(0, 0), Age(1, 1))
    }
    # The step did not count, and another is computed with the same residual.
    keeping.begin(Age(0, 0), 0, 1)
    with pytest.raises(KeyError):
        keeping.row(0, Age(1, 1))
    keeping.ended(Age(0, 0), 1, 0, 1)
    assert keeping.row(0, Age(2, 1)).tolist() == [1] * 4
    with pytest.raises(KeyError):
        keeping.begin(Age(2, 1), 0, 2)
    for part in parts(np.full(4, 3, np.float32), 1, Age(2, 1)):
        keeping.take(part)
    keeping.begin(Age(2, 1), 0, 2)
    assert memory[1, 1].tolist() == [3] * 4
    (part,) = parts(np.full(4, 3, np.float32), 2, Age(2, 1))
    with pytest.raises(ValueError, match="no such shard"):
        keeping.take(part)


def test_jobs_without_residuals_are_not_kept_waiting(tmp_path: Path) -> None:
    it = job("mlp", 8)
    cluster = Cluster(replace(it, output=replace(it.output, checkpoint_steps=2)), tmp_path)
    assert cluster.train(2).same_bits
