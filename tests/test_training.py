"""The composition root in one process; tests/test_ranks.py does it with several."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dptrain
from dptrain import limits, parts, rundir
from dptrain.data import store
from dptrain.errors import (
    ArithmeticMismatch,
    CheckpointError,
    DptrainError,
    ModelError,
    NonFiniteError,
    OutOfMemory,
    StorageError,
    UsageError,
    WorkerCrashed,
    exit_code,
)
from dptrain.journal import read_all, read_steps
from dptrain.phases import NAMES
from dptrain.random import Purpose, stream
from dptrain.watch import Unwatched
from tests.softmax import (
    LAYERS,
    Batched,
    Counting,
    Drawing,
    Merging,
    MergingMany,
    Noisy,
    Single,
    Softmax,
    fail,
    job,
    nan,
    quit,
)

ROOT = Path(__file__).resolve().parent.parent
COSINE = {"schedule": {"type": "cosine", "decay_steps": 20}}
JOBS = {
    "momentum": job(LAYERS),
    "cosine": job(LAYERS, optimizer=COSINE),
    "adam": job(LAYERS, optimizer={"type": "adam", "lr": 0.01}),
    "best": job(LAYERS, train={"result": "best", "stop": {"patience": 99, "min_delta": 0.01}, "evaluate_steps": 3}),
}


class StopAt(Unwatched):
    """Asks to stop once a step is in the journal; remembers what it is told."""

    def __init__(self, step: int = 0, number: int = signal.SIGTERM) -> None:
        self.step, self.number = step, number
        self.info: dict[str, Any] = {}
        self.warnings: list[str] = []

    def started(self, info: Mapping[str, Any]) -> None:
        self.info = dict(info)

    def progressed(self, line: Mapping[str, Any]) -> None:
        if line["step"] == self.step:
            os.kill(os.getpid(), self.number)

    def warned(self, text: str) -> None:
        self.warnings.append(text)


def test_a_run_leaves_what_the_readme_says(tmp_path: Path) -> None:
    result = dptrain.train(JOBS["momentum"], run_dir=tmp_path / "run")
    folder = tmp_path / "run"
    left = {"checkpoints", "encoding.json", "job.toml", "journal.jsonl", "result.json", "weights.safetensors"}
    (events,) = (p.name for p in folder.glob("events.out.tfevents.*"))
    assert {p.name for p in folder.iterdir()} == {*left, events}
    content = json.loads((folder / "result.json").read_text())
    assert content == asdict(result)
    assert content["state"] == "done"
    assert content["steps"] == 20
    assert content["epochs"] == round(20 / 24, 4)
    assert content["exchange"] == "solo"
    assert (content["workers"], content["shards"]) == (1, 5)
    assert content["same_bits"] is True
    assert content["recoveries"] == []
    assert set(content["metrics"]) == {"validation", "test"}
    assert {"loss", "accuracy"} <= set(content["metrics"]["test"])
    assert content["metrics"]["test"]["accuracy"] > 0.8
    assert all(content[name].startswith("sha256:") for name in ("weights_sha256", "job_sha256", "fingerprint"))
    (worker,) = content["per_worker"]
    assert (worker["shards_computed"], worker["rows_read"]) == (100, 20 * 60)
    assert worker["peak_memory_bytes"] > 1 << 20
    assert set(worker["phases"]) == set(NAMES)
    assert sum(worker["phases"][name] for name in NAMES) >= content["seconds"] - 1e-3
    assert content["slowest"] is None
    assert {"kernels", "numpy", "blas", "threads", "dtype"} <= set(content["arithmetic"])

    lines = read_steps(folder / rundir.JOURNAL)
    assert [line["step"] for line in lines] == list(range(1, 21))
    for line in lines:
        assert {"epoch", "loss", "lr", "samples_per_second", "attempt", "compute", "wait", "phases"} <= set(line)
        assert ("metrics" in line) == (line["step"] % 5 == 0)
        assert len(line["compute"]) == len(line["wait"]) == 1
        own = sum(line["phases"].get(name, [0.0])[0] for name in ("data", "forward", "backward", "partials"))
        assert 0 < own <= line["compute"][0] + 1e-5
        # What came after a step's exchange is in the line of the next.
        assert ("evaluation" in line["phases"]) == (line["step"] % 5 == 1 and line["step"] > 1)
    total = sum(line["phases"]["forward"][0] for line in lines)
    assert total == pytest.approx(worker["phases"]["forward"], abs=1e-3)
    assert np.mean([line["loss"] for line in lines]) == pytest.approx(content["loss"])
    from safetensors.numpy import load_file

    flat = np.concatenate([v.ravel() for v in dptrain.load(folder).tensors.values()])
    assert {n: v.shape for n, v in load_file(folder / "weights.safetensors").items()} == {
        n: v.shape for n, v in dptrain.load(folder).tensors.items()
    }
    from dptrain.layout import digest

    assert digest(flat) == content["weights_sha256"]


def test_the_hash_is_of_the_job_alone(tmp_path: Path) -> None:
    first = dptrain.train(JOBS["momentum"], run_dir=tmp_path / "a")
    again = dptrain.train({**JOBS["momentum"], "name": "other"}, run_dir=tmp_path / "b")
    other = dptrain.train({**JOBS["momentum"], "seed": 4}, run_dir=tmp_path / "c")
    assert first.weights_sha256 == again.weights_sha256 != other.weights_sha256
    assert first.job_sha256 == again.job_sha256 != other.job_sha256
    assert first.fingerprint == again.fingerprint
    assert first.metrics == again.metrics


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dptrain.Result]:
    """The undisturbed runs."""
    folder = tmp_path_factory.mktemp("straight")
    return {name: dptrain.train(it, run_dir=folder / name) for name, it in JOBS.items()}


@pytest.mark.parametrize("name", JOBS)
@pytest.mark.parametrize(("at", "number"), [(1, signal.SIGTERM), (7, signal.SIGINT), (10, signal.SIGUSR1)])
def test_a_stopped_run_goes_on_to_the_hash_of_the_undisturbed(
    straight: dict[str, dptrain.Result], name: str, at: int, number: int, tmp_path: Path
) -> None:
    stopped = dptrain.train(JOBS[name], run_dir=tmp_path, observer=StopAt(at, number))
    assert (stopped.state, stopped.signal) == ("stopped", number)
    assert stopped.steps == at + 1 if at % 3 else at <= stopped.steps <= at + 1
    assert stopped.metrics == {}
    assert stopped.weights_sha256 != straight[name].weights_sha256
    observer = StopAt()
    resumed = dptrain.train(JOBS[name], run_dir=tmp_path, resume=True, observer=observer)
    assert observer.info["step"] == stopped.steps
    truth = straight[name]
    assert (resumed.state, resumed.attempt, resumed.signal) == ("done", 2, 0)
    for figure in ("weights_sha256", "metrics", "loss", "steps", "epochs", "result", "job_sha256", "same_bits"):
        assert getattr(resumed, figure) == getattr(truth, figure), figure
    assert [line["step"] for line in read_steps(tmp_path / rundir.JOURNAL)] == list(range(1, 21))
    assert {line["attempt"] for line in read_all(tmp_path / rundir.JOURNAL)} == {1, 2}


def test_a_finished_run_resumed_is_the_same_run(straight: dict[str, dptrain.Result], tmp_path: Path) -> None:
    first = dptrain.train(JOBS["best"], run_dir=tmp_path)
    again = dptrain.train(JOBS["best"], run_dir=tmp_path, resume=True)
    for figure in ("state", "weights_sha256", "metrics", "loss", "steps"):
        assert getattr(again, figure) == getattr(first, figure) == getattr(straight["best"], figure)


@pytest.mark.parametrize("name", ["momentum", "best"])
def test_the_stopping_rule_may_be_extended(straight: dict[str, dptrain.Result], name: str, tmp_path: Path) -> None:
    """The end at step 7 is no multiple of the interval of evaluations."""
    short = json.loads(json.dumps(JOBS[name]))
    short["train"]["steps"] = 7
    assert dptrain.train(short, run_dir=tmp_path).steps == 7
    longer = dptrain.train(JOBS[name], run_dir=tmp_path, resume=True)
    assert longer.weights_sha256 == straight[name].weights_sha256
    assert longer.metrics == straight[name].metrics


def test_patience_may_be_added_to_a_run_without(tmp_path: Path) -> None:
    dptrain.train(job(LAYERS, train={"steps": 7, "stop": {"min_delta": 100.0}}), run_dir=tmp_path / "a")
    patient = {"stop": {"patience": 1, "min_delta": 100.0}}
    result = dptrain.train(job(LAYERS, train=patient), run_dir=tmp_path / "a", resume=True)
    truth = dptrain.train(job(LAYERS, train=patient), run_dir=tmp_path / "b")
    assert result.weights_sha256 == truth.weights_sha256
    assert result.steps == truth.steps == 10
    assert "did not gain" in result.reason
    with pytest.raises(CheckpointError, match="whose evaluations were made as"):
        dptrain.train(job(LAYERS, train={**patient, "evaluate_steps": 4}), run_dir=tmp_path / "a", resume=True)


@pytest.mark.parametrize(
    "change",
    [{"seed": 9}, {"optimizer": {"lr": 0.4}}, {"train": {"batch_size": 61}}, {"data": {"test": 0.2}}],
    ids=str,
)
def test_another_job_is_refused_and_leaves_the_run_alone(change: dict[str, Any], tmp_path: Path) -> None:
    dptrain.train(JOBS["momentum"], run_dir=tmp_path)
    before = {name: (tmp_path / name).read_bytes() for name in ("job.toml", "result.json", "encoding.json")}
    with pytest.raises(CheckpointError, match=r"found another job's; resume with the job.toml of that run"):
        dptrain.train(job(LAYERS, change), run_dir=tmp_path, resume=True)
    assert {name: (tmp_path / name).read_bytes() for name in before} == before


def test_a_schedule_over_the_whole_training_is_another_job_when_extended(tmp_path: Path) -> None:
    whole = job(LAYERS, optimizer={"schedule": {"type": "cosine"}}, train={"steps": 7})
    dptrain.train(whole, run_dir=tmp_path)
    whole["train"]["steps"] = 20
    with pytest.raises(CheckpointError, match="another job's"):
        dptrain.train(whole, run_dir=tmp_path, resume=True)


def test_a_warm_up_makes_an_implied_decay_another_job_than_the_same_number_said(tmp_path: Path) -> None:
    schedule = {"type": "cosine", "warmup_steps": 5}
    implied = dptrain.train(job(LAYERS, optimizer={"schedule": schedule}), run_dir=tmp_path / "a")
    said = dptrain.train(job(LAYERS, optimizer={"schedule": {**schedule, "decay_steps": 20}}), run_dir=tmp_path / "b")
    assert implied.weights_sha256 != said.weights_sha256
    assert implied.job_sha256 != said.job_sha256


def test_a_run_directory_is_not_taken_twice(tmp_path: Path) -> None:
    dptrain.train(JOBS["momentum"], run_dir=tmp_path)
    with pytest.raises(UsageError, match="--resume"):
        dptrain.train(JOBS["momentum"], run_dir=tmp_path)
    with pytest.raises(UsageError, match="found none"):
        dptrain.train({**JOBS["momentum"], "output": {"runs": str(tmp_path / "none")}}, resume=True)


def test_a_broken_newest_checkpoint_is_passed_over_aloud(straight: dict[str, dptrain.Result], tmp_path: Path) -> None:
    it = job(LAYERS, output={"checkpoint_steps": 4})
    dptrain.train(it, run_dir=tmp_path, observer=StopAt(10))
    newest, older, *_ = sorted((tmp_path / "checkpoints").glob("step-*"), reverse=True)
    (newest / "state.safetensors").write_bytes(b"")
    observer = StopAt()
    resumed = dptrain.train(it, run_dir=tmp_path, resume=True, observer=observer)
    assert any(str(newest) in text and "passed over" in text for text in observer.warnings)
    assert observer.info["step"] == int(older.name[5:])
    assert resumed.weights_sha256 == straight["momentum"].weights_sha256
    steps = [line["step"] for line in read_all(tmp_path / rundir.JOURNAL) if "step" in line]
    assert sorted(set(steps)) == list(range(1, 21))
    assert len(steps) > 20


def test_a_signal_at_the_last_step_still_finishes(straight: dict[str, dptrain.Result], tmp_path: Path) -> None:
    result = dptrain.train(JOBS["momentum"], run_dir=tmp_path, observer=StopAt(20))
    assert (result.state, result.signal) == ("done", 0)
    assert result.metrics == straight["momentum"].metrics


def test_a_huge_rate_is_stopped_by_name(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError) as caught:
        dptrain.train(job(LAYERS, optimizer={"lr": 1e38}), run_dir=tmp_path)
    assert caught.value.where.startswith("rank 0 at step ")
    assert "shard" in caught.value.where
    assert "layers." in caught.value.where or "loss" in caught.value.where
    assert "optimizer.clip_norm" in caught.value.cure
    assert not (tmp_path / rundir.RESULT).exists()


def first_drawn(chance: float, seed: int = 3, shards: int = 5) -> tuple[int, int]:
    """The first step and shard where tests.softmax.Drawing acts."""
    for step in range(20):
        for shard in range(shards):
            if stream(seed, Purpose.MODEL, step, shard).random() < chance:
                return step, shard
    raise AssertionError("nowhere")


def test_nan_in_one_shard_is_named(tmp_path: Path) -> None:
    step, shard = first_drawn(0.03)
    assert step > 0
    with pytest.raises(NonFiniteError) as caught:
        dptrain.train(job(), model=Drawing(0.03, nan), run_dir=tmp_path)
    assert caught.value.where == f"rank 0 at step {step}, shard {shard}, gradient of W"


def test_nan_can_be_skipped(tmp_path: Path) -> None:
    result = dptrain.train(job(train={"non_finite": "skip"}), model=Drawing(0.03, nan), run_dir=tmp_path)
    assert (result.state, result.steps) == ("done", 20)
    lines = read_steps(tmp_path / rundir.JOURNAL)
    skipped = [line["step"] - 1 for line in lines if line.get("skipped")]
    expected = {s for s in range(20) if any(stream(3, Purpose.MODEL, s, i).random() < 0.03 for i in range(5))}
    assert set(skipped) == expected
    assert all(np.isfinite(v).all() for v in dptrain.load(tmp_path, model=Softmax()).tensors.values())


@pytest.mark.parametrize(("act", "why"), [(fail, "RuntimeError: no more of this"), (quit, "SystemExit: 3")])
def test_an_exception_of_the_model_is_a_crash_with_its_place(act: Any, why: str, tmp_path: Path) -> None:
    # Probing takes five passes over shards, then each step takes five.
    with pytest.raises(WorkerCrashed) as caught:
        dptrain.train(job(), model=Counting(23, act), run_dir=tmp_path)
    assert caught.value.where == "rank 0 at step 3 in forward and backward"
    assert caught.value.found == why
    assert caught.value.exit_code == 1


def test_where_memory_ends_it_says_for_what_and_how_much_there_was(tmp_path: Path) -> None:
    def ask() -> None:
        np.zeros((1 << 44, 3), np.float32)

    with pytest.raises(OutOfMemory) as caught:
        dptrain.train(job(), model=Counting(23, ask), run_dir=tmp_path)
    assert caught.value.where == "rank 0 at step 3 in forward and backward"
    assert re.search(r"beside the \d+ MB that this worker has needed", caught.value.expected)
    assert "192. TiB" in caught.value.found
    assert "(17592186044416, 3)" in caught.value.found
    assert caught.value.exit_code == exit_code(MemoryError()) == 2


def test_where_a_limit_ends_it_says_which_and_how_to_lift_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def ask() -> None:
        np.zeros((1 << 44, 3), np.float32)

    monkeypatch.setattr(limits, "most_data", lambda: 1_500_000_000)
    with pytest.raises(OutOfMemory) as caught:
        dptrain.train(job(), model=Counting(23, ask), run_dir=tmp_path)
    assert caught.value.where == "rank 0 at step 3 in forward and backward"
    assert caught.value.expected == "to get by with 1.5 GB of memory, the limit of each process"
    assert "192. TiB" in caught.value.found
    assert "--job-memory" in caught.value.cure


def test_an_exception_while_evaluating_says_so(tmp_path: Path) -> None:
    with pytest.raises(WorkerCrashed) as caught:
        dptrain.train(job(), model=Counting(6, fail, training=False), run_dir=tmp_path)
    assert caught.value.where == "rank 0 at step 5 in evaluation"


def test_an_exception_of_the_observer_ends_the_run(tmp_path: Path) -> None:
    class Failing(Unwatched):
        def progressed(self, line: Mapping[str, Any]) -> None:
            raise BrokenPipeError("gone")

    with pytest.raises(WorkerCrashed, match=r"rank 0 at step 1 .*BrokenPipeError: gone"):
        dptrain.train(JOBS["momentum"], run_dir=tmp_path, observer=Failing())


class Blocked(StopAt):
    """Puts something in the place of checkpoints."""

    def started(self, info: Mapping[str, Any]) -> None:
        (Path(info["run_dir"]) / "checkpoints").write_text("in the way")


def test_training_goes_on_and_ends_without_checkpoints_aloud(
    straight: dict[str, dptrain.Result], tmp_path: Path
) -> None:
    observer = Blocked()
    result = dptrain.train(job(LAYERS, output={"checkpoint_steps": 5}), run_dir=tmp_path, observer=observer)
    assert any("training goes on without a new checkpoint: " in text for text in observer.warnings)
    assert "the run ends without a last checkpoint: " in observer.warnings[-1]
    assert "step-0000000020: expected to be written" in observer.warnings[-1]
    assert [line["step"] for line in read_steps(tmp_path / rundir.JOURNAL)] == list(range(1, 21))
    assert (result.state, result.weights_sha256) == ("done", straight["momentum"].weights_sha256)
    assert (tmp_path / rundir.RESULT).exists()


def test_a_run_that_is_stopped_needs_its_last_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"step-00000000(07|08): expected to be written"):
        dptrain.train(JOBS["momentum"], run_dir=tmp_path, observer=Blocked(7))
    assert not (tmp_path / rundir.RESULT).exists()


LIMITED = """
import os, resource, sys, time
from tests.softmax import LAYERS, job
import dptrain
from dptrain.watch import Unwatched
from dptrain.errors import DptrainError
class Limit(Unwatched):
    def progressed(self, line):
        if line["step"] == 8:
            until = time.monotonic() + 30
            while not os.path.exists(sys.argv[1] + "/checkpoints/step-0000000005") and time.monotonic() < until:
                os.sched_yield()
            resource.setrlimit(resource.RLIMIT_FSIZE, (3000, resource.RLIM_INFINITY))
    def warned(self, text):
        print("warned:", text)
try:
    dptrain.train(job(LAYERS, output={"checkpoint_steps": 5}), run_dir=sys.argv[1], observer=Limit())
except DptrainError as error:
    print("failed:", error.exit_code, error)
"""


def python(code: str, *arguments: str, **environ: str) -> str:
    """What a program in a process of its own prints."""
    line = [sys.executable, "-c", code, *arguments]
    full = {**os.environ, "PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1", **environ}
    done = subprocess.run(line, capture_output=True, text=True, env=full, cwd=ROOT, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_disk_that_fills_up_ends_a_run_that_went_on(tmp_path: Path) -> None:
    told = python(LIMITED, str(tmp_path))
    assert "warned: training goes on without a new checkpoint: " in told
    assert "warned: training goes on without a journal: " in told
    (failed,) = [line for line in told.splitlines() if line.startswith("failed: ")]
    assert "warned: the run ends without a last checkpoint: " in told
    assert failed.startswith(f"failed: 2 {tmp_path / rundir.WEIGHTS}: ")
    assert "File too large" in failed
    assert not (tmp_path / rundir.RESULT).exists()
    observer = StopAt()
    resumed = dptrain.train(job(LAYERS), run_dir=tmp_path, resume=True, observer=observer)
    assert observer.info["step"] == 5
    assert resumed.weights_sha256 == dptrain.train(job(LAYERS), run_dir=tmp_path / "new").weights_sha256


def test_a_journal_that_cannot_be_opened_is_told(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / rundir.JOURNAL).mkdir()
    with pytest.raises(StorageError, match=r"journal\.jsonl: expected to be written"):
        dptrain.train(JOBS["momentum"], run_dir=tmp_path / "run", resume=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="found a file"):
        dptrain.train(JOBS["momentum"], run_dir=tmp_path / "file")


def test_a_warm_start_begins_with_the_other_runs_weights(tmp_path: Path) -> None:
    first = dptrain.train(JOBS["best"], run_dir=tmp_path / "a")
    warm = job(LAYERS, {"model": {"init_from": str(tmp_path / "a")}}, train={"steps": 1}, optimizer={"lr": 1e-30})
    result = dptrain.train(warm, run_dir=tmp_path / "b")
    assert result.weights_sha256 == first.weights_sha256
    assert result.metrics == first.metrics
    cold = dptrain.train(job(LAYERS, train={"steps": 1}, optimizer={"lr": 1e-30}), run_dir=tmp_path / "c")
    assert cold.weights_sha256 != first.weights_sha256
    assert cold.job_sha256 != result.job_sha256
    checkpoint = next((tmp_path / "a/checkpoints").glob("step-*"))
    warm["model"]["init_from"] = str(checkpoint)
    assert dptrain.train(warm, run_dir=tmp_path / "d").weights_sha256 == first.weights_sha256
    warm["model"]["layers"] = [{"type": "linear", "units": 10}]
    with pytest.raises(ModelError, match="the tensors of this job's model"):
        dptrain.train(warm, run_dir=tmp_path / "e")
    warm["model"]["init_from"] = str(tmp_path / "nowhere")
    with pytest.raises(CheckpointError):
        dptrain.train(warm, run_dir=tmp_path / "f")


def test_shards_that_meet_in_a_batched_model_are_found_out(tmp_path: Path) -> None:
    models = {type(m).__name__: m for m in (Softmax(), Batched(), Merging(), MergingMany(), Single())}
    found = {name: dptrain.train(job(), model=m, run_dir=tmp_path / name) for name, m in models.items()}
    hashes = {name: result.weights_sha256 for name, result in found.items()}
    assert hashes["Batched"] == hashes["Softmax"]
    assert hashes["Merging"] == hashes["MergingMany"] == hashes["Single"] != hashes["Softmax"]
    assert found["Merging"].metrics == found["MergingMany"].metrics == found["Single"].metrics
    assert all(result.same_bits for result in found.values())


def test_a_model_that_is_not_repeatable_promises_nothing(tmp_path: Path) -> None:
    observer = StopAt(5)
    result = dptrain.train(job(), model=Noisy(), run_dir=tmp_path, observer=observer)
    assert result.same_bits is False
    assert result.state == "stopped"
    again = dptrain.train(job(), model=Noisy(), run_dir=tmp_path, resume=True, observer=(told := StopAt()))
    assert again.same_bits is False
    assert any("other bits each time" in note for note in told.info["notes"])


OTHER_KERNEL = """
import sys
from tests.softmax import LAYERS, job
import dptrain
try:
    it = job(LAYERS, arithmetic={"accept_other": sys.argv[2] == "accept"})
    result = dptrain.train(it, run_dir=sys.argv[1], resume=sys.argv[2] != "new")
    print(result.same_bits, result.fingerprint)
except dptrain.DptrainError as error:
    print(type(error).__name__, error)
"""


def test_a_checkpoint_of_another_arithmetic_is_refused_unless_accepted(tmp_path: Path) -> None:
    here = dptrain.train(job(LAYERS), run_dir=tmp_path, observer=StopAt(5))
    kernel = "Prescott" if "Haswell" in os.environ.get("OPENBLAS_CORETYPE", "") else "Haswell"
    same, other = python(OTHER_KERNEL, str(tmp_path / "new"), "new", OPENBLAS_CORETYPE=kernel).split()
    if other == here.fingerprint:
        pytest.skip(f"this machine's kernels give the bits of {kernel}'s")
    assert same == "True"
    refused = python(OTHER_KERNEL, str(tmp_path), "refuse", OPENBLAS_CORETYPE=kernel)
    assert "expected the arithmetic it was made with" in refused
    assert python(OTHER_KERNEL, str(tmp_path), "accept", OPENBLAS_CORETYPE=kernel).split() == ["False", other]
    # The bits stay in doubt, whoever goes on.
    back = dptrain.train(
        job(LAYERS, train={"steps": 21}, arithmetic={"accept_other": True}), run_dir=tmp_path, resume=True
    )
    assert back.same_bits is False


def test_portable_kernels_are_not_claimed_where_numpy_has_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENBLAS_CORETYPE", raising=False)
    with pytest.raises(ArithmeticMismatch, match="before Python imports numpy"):
        dptrain.train(job(LAYERS, arithmetic={"kernels": "portable"}), run_dir=tmp_path)


def test_every_error_is_one_of_the_family(tmp_path: Path) -> None:
    for change in ({"data": {"source": "nowhere.csv"}}, {"train": {"batch_size": 5000}}, {"loss": {"type": "mse"}}):
        with pytest.raises(DptrainError) as caught:
            dptrain.train(job(LAYERS, change), run_dir=tmp_path / "x")
        assert caught.value.exit_code == 2
    assert not (tmp_path / "x").exists()


def test_large_files_are_read_ahead_and_give_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x = np.random.default_rng(0).standard_normal((200, 64)).astype(np.float32)
    np.savez(tmp_path / "data.npz", x=x, y=(x.sum(axis=1) > 0).astype(np.int64))
    content = {
        **JOBS["momentum"],
        "data": {"source": str(tmp_path / "data.npz"), "validation": 0.1},
        "model": {"layers": [{"type": "linear", "units": 2}]},
        "train": {"batch_size": 20, "steps": 12},
    }
    started: list[bool] = []
    reader = parts.Reader

    class Watched(reader):  # type: ignore[misc, valid-type]
        def __init__(self, *arguments: Any, prefetch: bool, **more: Any) -> None:
            started.append(prefetch)
            super().__init__(*arguments, prefetch=prefetch, **more)

    monkeypatch.setattr(parts, "Reader", Watched)
    at_once = dptrain.train(content, run_dir=tmp_path / "small")
    monkeypatch.setattr(store, "LARGE", 0)
    ahead = dptrain.train(content, run_dir=tmp_path / "large")
    assert started == [False, True]
    assert ahead.weights_sha256 == at_once.weights_sha256
