"""Every exchange, over every number of workers, held to solo's SHA-256. One mpirun of eight ranks runs all cases."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.exchange.jobs import JOBS, MACHINES, ROUNDS, SHARDS
from tests.mpirun import ranks

SIZES = sorted({size for sizes in ROUNDS for size in sizes})

Results = list[dict[str, Any]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    folder = tmp_path_factory.mktemp("suite")
    done = ranks(8, "tests.exchange.suite", str(folder))
    assert done.returncode == 0, done.stderr
    found: Results = json.loads((folder / "found.json").read_text())
    return found


def some(results: Results, **wanted: Any) -> Results:
    found = [result for result in results if all(result.get(key) == value for key, value in wanted.items())]
    assert found, wanted
    return found


def solo(results: Results, name: str, shards: int) -> dict[str, Any]:
    (result,) = some(results, case="solo", job=name, shards=shards)
    return result


@pytest.mark.parametrize("kind", ["node", "segments"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("shards", SHARDS)
@pytest.mark.parametrize("name", JOBS)
def test_every_number_of_workers_gives_the_bits_of_solo(
    results: Results, name: str, shards: int, size: int, kind: str
) -> None:
    truth = solo(results, name, shards)
    for result in some(results, case=kind, job=name, shards=shards, size=size):
        same(result, truth)
        assert result["exchange"] == kind


@pytest.mark.parametrize("number", range(len(MACHINES)), ids=str)
@pytest.mark.parametrize("shards", SHARDS)
@pytest.mark.parametrize("name", JOBS)
def test_workers_of_several_machines_give_the_bits_of_solo(
    results: Results, name: str, shards: int, number: int
) -> None:
    (result,) = some(results, case="machines", number=number, job=name, shards=shards)
    same(result, solo(results, name, shards))
    sizes, _ = MACHINES[number]
    found = [worker["machine"] for worker in result["per_worker"]]
    assert sorted(found.count(machine) for machine in set(found)) == sorted(sizes)


def same(result: dict[str, Any], truth: dict[str, Any]) -> None:
    for key in ("weights_sha256", "metrics", "loss", "job_sha256"):
        assert result[key] == truth[key], key
    assert result["same_bits"]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("shards", SHARDS)
@pytest.mark.parametrize("name", JOBS)
def test_the_work_was_shared(results: Results, name: str, shards: int, size: int) -> None:
    truth = solo(results, name, shards)
    (alone,) = truth["per_worker"]
    steps = truth["steps"]
    assert alone["shards_computed"] == shards * steps
    for result in some(results, case="node", job=name, shards=shards, size=size):
        computed = [worker["shards_computed"] for worker in result["per_worker"]]
        read = [worker["rows_read"] for worker in result["per_worker"]]
        owners = min(size, shards)
        assert sum(computed) == alone["shards_computed"]
        assert max(computed) <= -(-shards // owners) * steps
        assert [count == 0 for count in computed] == [rank >= owners for rank in range(size)]
        assert sum(read) == alone["rows_read"]


def test_the_bits_are_those_of_the_shards_and_the_seed(results: Results) -> None:
    """Negative controls: another row count a shard gives other bits, as does another job."""
    hashes = {(name, shards): solo(results, name, shards)["weights_sha256"] for name in JOBS for shards in SHARDS}
    assert len({hashes["mlp", shards] for shards in SHARDS}) == len(SHARDS)
    assert len({hashes["cnn", shards] for shards in (1, 6, 8)}) == 3


def test_allreduce_does_not_give_the_same_bits_and_says_so(results: Results) -> None:
    """Negative control: the comparison of hashes can fail."""
    by_size = {size: some(results, case="allreduce", size=size)[0] for size in (1, 3, 5, 7)}
    assert by_size[1]["weights_sha256"] != by_size[3]["weights_sha256"]
    assert not any(result["same_bits"] for result in by_size.values())
    truth = solo(results, "mlp", 8)
    for result in by_size.values():
        assert result["loss"] == pytest.approx(truth["loss"], rel=1e-3)


def test_a_run_goes_on_under_other_workers_and_exchanges(results: Results) -> None:
    (straight,) = some(results, case="straight")
    by_size = {result["size"]: result for result in some(results, case="resumed")}
    assert [by_size[size]["attempt"] for size in (3, 5, 1)] == [1, 2, 3]
    assert by_size[1]["exchange"] == "solo"
    assert by_size[1]["weights_sha256"] == straight["weights_sha256"]
    assert by_size[1]["metrics"] == straight["metrics"]
    assert by_size[5]["weights_sha256"] != straight["weights_sha256"]


def test_every_worker_finds_the_same_arithmetic(results: Results) -> None:
    for name in JOBS:
        for shards in SHARDS:
            prints = {r["fingerprint"] for r in some(results, job=name, shards=shards, case="node")}
            assert prints == {solo(results, name, shards)["fingerprint"]}


def test_the_suite_leaves_only_run_directories(results: Results) -> None:
    for result in some(results, case="node"):
        left = sorted(path.name for path in Path(result["run_dir"]).iterdir())
        assert [name for name in left if not name.startswith("events.out.tfevents.")] == [
            "checkpoints",
            "encoding.json",
            "job.toml",
            "journal.jsonl",
            "result.json",
            "weights.safetensors",
        ]
