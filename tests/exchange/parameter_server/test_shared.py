"""The suite that every exchange passes, over the wire: all of its jobs and numbers of shards, held to solo's hash.

Where workers of MPI come in groups and machines, here some have several processes, and there are several servers.
"""

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from dptrain.job.spec import Job
from dptrain.result import Result
from dptrain.training import run
from tests.exchange.jobs import DECLARED, JOBS, SHARDS, job
from tests.exchange.parameter_server.running import Cluster

SIZES = (1, 2, 3, 5, 8)

SERVERS = (
    # Servers, whether one stands by, and the processes of each worker.
    (2, False, (1, 1)),
    (3, True, (1, 2, 1)),
    (1, True, (3,)),
)

CASES: list[tuple[str, int, dict[str, Any]]] = [
    *((name, shards, {}) for name in JOBS for shards in SHARDS),
    *((name, shards, {"gradients": gradients, "top_k": 0.05}) for name, shards, gradients in DECLARED),
]


def named(case: tuple[str, int, dict[str, Any]]) -> str:
    name, shards, arithmetic = case
    return f"{name}-{shards}-{arithmetic.get('gradients', 'plain')}"


def of(case: tuple[str, int, dict[str, Any]], **changes: Any) -> Job:
    name, shards, arithmetic = case
    return job(name, shards, arithmetic=arithmetic, **changes)


def crossed(others: Sequence[Any]) -> list[Any]:
    """Every case with every one of the others, by turns one of the latter wherever tests are run."""
    return [
        pytest.param(
            number, other, id=f"{named(case)}-{other}", marks=pytest.mark.long if (number + i) % len(others) else ()
        )
        for number, case in enumerate(CASES)
        for i, other in enumerate(others)
    ]


@pytest.fixture(scope="module")
def solo(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The result of a case in one process."""

    @cache
    def result(number: int) -> Result:
        return run(of(CASES[number]), run_dir=tmp_path_factory.mktemp("solo") / "run")

    return result


def same(result: Result, truth: Result) -> None:
    for key in ("weights_sha256", "metrics", "loss", "job_sha256", "steps", "fingerprint"):
        assert getattr(result, key) == getattr(truth, key), key
    assert result.same_bits
    assert result.exchange == "ps"


def was_shared(result: Result, shards: int, workers: int) -> None:
    """Each shard was computed once a step, in even parts, by workers alone."""
    servers = [one["shards_computed"] for one in result.per_worker if "machine" in one]
    computed = [one["shards_computed"] for one in result.per_worker if "machine" not in one]
    owners = min(workers, shards)
    assert not any(servers)
    assert sum(computed) == shards * result.steps
    assert max(computed) <= -(-shards // owners) * result.steps
    assert [count == 0 for count in computed] == [number >= owners for number in range(workers)]


def left_only_a_run(folder: Path) -> None:
    left = sorted(path.name for path in folder.iterdir())
    assert [name for name in left if not name.startswith("events.out.tfevents.")] == [
        "checkpoints",
        "encoding.json",
        "job.toml",
        "journal.jsonl",
        "result.json",
        "weights.safetensors",
    ]


@pytest.mark.parametrize(("number", "workers"), crossed(SIZES))
def test_every_number_of_workers_gives_the_bits_of_solo(number: int, workers: int, solo: Any, tmp_path: Path) -> None:
    cluster = Cluster(of(CASES[number]), tmp_path)
    result = cluster.train(workers)
    same(result, solo(number))
    assert cluster.codes == [0] * workers
    was_shared(result, CASES[number][1], workers)
    left_only_a_run(tmp_path / "run")


@pytest.mark.parametrize(("number", "crew"), crossed(SERVERS))
def test_several_servers_and_processes_give_the_bits_of_solo(
    number: int, crew: tuple[int, bool, tuple[int, ...]], solo: Any, tmp_path: Path
) -> None:
    servers, standby, processes = crew
    cluster = Cluster(of(CASES[number]), tmp_path, servers, standby=standby)

    def ready() -> None:
        for count in processes:
            cluster.worker(processes=count)

    result = cluster.train(ready=ready)
    same(result, solo(number))
    for other in cluster.others:
        assert isinstance(other, Result), other
        same(other, solo(number))
    assert cluster.codes == [0] * len(processes)
    was_shared(result, CASES[number][1], len(processes))


def test_a_run_goes_on_under_other_workers_and_exchanges(tmp_path: Path) -> None:
    """Begun by three workers of a server, gone on with by one alone, by five of two servers, and alone again."""
    constant = {"schedule": {"type": "step", "step_size": 5}}

    def until(steps: int) -> Job:
        train = {"steps": steps, "evaluate_steps": 1, "stop": {"patience": 99}}
        return job("mlp", 8, train=train, optimizer=constant)

    straight = run(until(15), run_dir=tmp_path / "straight")
    here = tmp_path / "run"
    first = Cluster(until(4), tmp_path).train(3)
    run(until(6), run_dir=here, resume=True)
    third = Cluster(until(11), tmp_path, 2).train(5, resume=True)
    last = run(until(15), run_dir=here, resume=True)
    assert [first.attempt, third.attempt, last.attempt] == [1, 3, 4]
    assert last.weights_sha256 == straight.weights_sha256
    assert last.metrics == straight.metrics
    assert third.weights_sha256 != straight.weights_sha256
    result = json.loads((here / "result.json").read_text())
    assert result["exchange"] == "solo"
