"""The parameter server as a whole, held to solo's hash."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dptrain.errors import DataError, DptrainError, WorkerCrashed
from dptrain.job.load import check, complete
from dptrain.job.spec import Job
from dptrain.training import run
from tests.exchange.parameter_server.running import Cluster

CONTENT: dict[str, Any] = {
    "seed": 7,
    "data": {"source": "digits"},
    "model": {"layers": [{"type": "linear", "units": 24}, {"type": "dropout"}, {"type": "linear", "units": 10}]},
    "optimizer": {"type": "adam", "lr": 0.01, "clip_norm": 0.5},
    "train": {"steps": 12, "batch_size": 60, "evaluate_steps": 5, "result": "best"},
}


def job(**train: object) -> Job:
    return complete(check({**CONTENT, "train": {**CONTENT["train"], **train}}, ""))


@pytest.fixture(scope="session")
def solo(tmp_path_factory: pytest.TempPathFactory) -> str:
    return run(job(), run_dir=tmp_path_factory.mktemp("solo") / "run").weights_sha256


@pytest.mark.parametrize("workers", [1, 2, 3, 5, 8])
def test_the_hash_is_solos(workers: int, solo: str, tmp_path: Path) -> None:
    cluster = Cluster(job(), tmp_path)
    result = cluster.train(workers)
    assert result.weights_sha256 == solo
    assert result.exchange == "ps"
    assert result.same_bits
    assert cluster.codes == [0] * workers
    assert sum(worker["shards_computed"] for worker in result.per_worker[1:]) == 12 * 8
    assert (tmp_path / "run" / "journal.jsonl").exists()


def test_a_run_goes_on_here_and_there(solo: str, tmp_path: Path) -> None:
    here = tmp_path / "run"
    run(job(steps=4), run_dir=here)
    Cluster(job(steps=9), tmp_path).train(2, resume=True)
    assert run(job(), run_dir=here, resume=True).weights_sha256 == solo


def test_workers_that_join_get_shards_at_the_next_step(solo: str, tmp_path: Path) -> None:
    cluster = Cluster(job(), tmp_path)

    class Later:
        """Lets another worker join once the run is on its way."""

        def started(self, info: object) -> None: ...

        def progressed(self, line: dict[str, object]) -> None:
            if line["step"] == 2:
                cluster.worker()
                cluster.joined(2)

        def warned(self, text: str) -> None: ...

        def recovered(self, recovery: object) -> None: ...

        def finished(self, result: object) -> None: ...

        def close(self) -> None: ...

    cluster.job = replace(cluster.job, output=replace(cluster.job.output, journal_steps=1))
    result = cluster.train(1, observer=Later())
    assert result.weights_sha256 == solo
    assert cluster.codes == [0, 0]


def test_an_exception_in_a_worker_fails_the_job_with_its_line(tmp_path: Path) -> None:
    cluster = Cluster(job(), tmp_path)

    def broken(*_: object) -> None:
        raise ZeroDivisionError("of the test")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dptrain.exchange.parameter_server.compute.Here.partials", broken)
        with pytest.raises(WorkerCrashed, match=r"rank 1 at step 0 in forward and backward.*ZeroDivisionError"):
            cluster.train(1)
    assert [type(code) for code in cluster.codes] == [ZeroDivisionError]


def test_other_data_is_refused_and_nothing_else_happens(solo: str, tmp_path: Path) -> None:
    import numpy as np

    other = tmp_path / "other.npz"
    np.savez(other, x=np.zeros((100, 64), np.float32), y=np.arange(100) % 10)
    cluster = Cluster(job(), tmp_path)
    result = cluster.train(1, ready=lambda: cluster.worker(data=other))
    assert result.weights_sha256 == solo
    refused = [code for code in cluster.codes if isinstance(code, DptrainError)]
    assert len(refused) == 1
    assert isinstance(refused[0], DataError)
