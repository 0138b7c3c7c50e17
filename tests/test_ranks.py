"""Several workers: who says what when a run ends badly, and that nobody is left hanging."""

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from dptrain.exchange.communicator import Alone
from dptrain.job.load import check, complete, load_job, to_toml
from dptrain.launch import Announced, command, library
from dptrain.ranks import Leader, follow
from tests import mpirun
from tests.softmax import job
from tests.test_training import first_drawn

Seen = list[dict[str, Any]]
"""By rank, by case."""


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    folder = tmp_path_factory.mktemp("ranks")
    done = mpirun.ranks(3, "tests.ranks_suite", str(folder), timeout=240)
    assert done.returncode == 0, done.stderr
    found: Seen = json.loads((folder / "found.json").read_text())
    return found


@pytest.mark.parametrize("name", ["softmax", "batched"])
def test_a_model_of_ones_own_has_the_same_hash_among_three(seen: Seen, name: str) -> None:
    truth = seen[0]["softmax alone"]
    for rank in range(3):
        for figure in ("weights_sha256", "metrics", "loss", "fingerprint", "job_sha256"):
            assert seen[rank][name][figure] == truth[figure] or (name, figure) == ("batched", "job_sha256")
        assert seen[rank][name] == seen[0][name]
    assert sum(worker["shards_computed"] for worker in seen[0][name]["per_worker"]) == 100


def test_merged_shards_are_taken_one_at_a_time_by_all(seen: Seen) -> None:
    assert seen[0]["merging"]["weights_sha256"] == seen[0]["single alone"]["weights_sha256"]
    assert seen[0]["merging"]["metrics"] == seen[0]["single alone"]["metrics"]
    assert seen[0]["merging"]["weights_sha256"] != seen[0]["softmax"]["weights_sha256"]


def test_a_model_that_is_not_repeatable_trains_and_promises_nothing(seen: Seen) -> None:
    assert seen[0]["noisy"]["state"] == "done"
    assert seen[0]["noisy"]["same_bits"] is False
    assert seen[0]["softmax"]["same_bits"] is True


@pytest.mark.parametrize(
    ("name", "culprit", "code", "where", "why"),
    [
        ("raises", 1, 1, "rank 1 at step 3 in forward and backward", "RuntimeError: no more of this"),
        ("leaves", 2, 1, "rank 2 at step 3 in forward and backward", "SystemExit: 3"),
        ("raises while evaluating", 0, 1, "rank 0 at step 5 in evaluation", "RuntimeError"),
        ("raises while probing", 1, 1, "rank 1 at step 0 in probing the arithmetic", "RuntimeError"),
        ("observer", 0, 1, "rank 0 at step 1 in forward and backward", "BrokenPipeError: gone"),
        ("other job", 0, 2, "checkpoint", "another job's"),
        ("no data", 0, 2, "nowhere.csv", ""),
    ],
)
def test_one_tells_why_and_the_others_leave_with_its_code(
    seen: Seen, name: str, culprit: int, code: int, where: str, why: str
) -> None:
    for rank in range(3):
        outcome = seen[rank][name]
        assert outcome["agreed"]
        assert outcome["code"] == code
        assert (outcome["error"] == "PeerFailed") == (rank != culprit)
    assert where in seen[culprit][name]["text"]
    assert why in seen[culprit][name]["text"]


@pytest.mark.parametrize("name", ["nan", "huge rate"])
def test_a_gradient_that_is_not_finite_is_named_alike_by_all(seen: Seen, name: str) -> None:
    assert {seen[rank][name]["error"] for rank in range(3)} == {"NonFiniteError"}
    assert len({seen[rank][name]["text"] for rank in range(3)}) == 1
    assert seen[0][name]["agreed"]
    if name == "nan":
        step, shard = first_drawn(0.03)
        owner = next(rank for rank in range(3) if 5 * rank // 3 <= shard < 5 * (rank + 1) // 3)
        assert seen[0][name]["text"].startswith(f"rank {owner} at step {step}, shard {shard}, gradient of W: ")


def test_skipping_is_the_same_for_one_and_three(seen: Seen) -> None:
    three, one = seen[0]["nan skipped"], seen[0]["nan skipped alone"]
    assert three["state"] == "done"
    for figure in ("weights_sha256", "metrics", "loss"):
        assert three[figure] == one[figure]
    assert one["weights_sha256"] != seen[0]["softmax alone"]["weights_sha256"]


@pytest.mark.parametrize(
    "name",
    [f"{number} to {which}" for number in ("SIGTERM", "SIGINT", "SIGUSR1") for which in (0, 2)] + ["SIGTERM to all"],
)
def test_a_signal_to_any_stops_all_and_the_run_goes_on(seen: Seen, name: str) -> None:
    truth = seen[0]["counting alone"]
    assert truth["weights_sha256"] == seen[0]["softmax alone"]["weights_sha256"]
    for rank in range(3):
        assert seen[rank][name]["state"] == "stopped"
        assert 0 < seen[rank][name]["steps"] < 10
    assert seen[0][name]["weights_sha256"] != truth["weights_sha256"]
    resumed = seen[0][f"{name}, resumed"]
    assert resumed["state"] == "done"
    for figure in ("weights_sha256", "metrics", "loss"):
        assert resumed[figure] == truth[figure]


def test_a_worker_with_another_model_is_refused(seen: Seen) -> None:
    """Its probe gives the same bits, so only the source can tell."""
    for rank in range(3):
        assert seen[rank]["other source"]["error"] == "LaunchError"
        assert seen[rank]["other source"]["text"].startswith("rank 1 on ")
        assert seen[rank]["other source"]["agreed"]


@pytest.mark.parametrize(("name", "found"), [("solo of three", "found 3"), ("too many coordinators", "found 4")])
def test_an_exchange_that_cannot_be_is_refused(seen: Seen, name: str, found: str) -> None:
    errors = [seen[rank][name] for rank in range(3)]
    assert {error["code"] for error in errors} == {2}
    assert [error["error"] for error in errors].count("LaunchError") == 1
    assert any(found in error["text"] for error in errors)


def job_file(folder: Path, model: str, **sections: Any) -> Path:
    """A job over a model of one's own that is written beside it."""
    (folder / "own.py").write_text(model)
    content = job({"model": {"python": "own.py:build"}}, **sections)
    path = folder / "job.toml"
    path.write_text(to_toml(complete(check(content, "x"))))
    return path


RAISING = """
import numpy as np
class Model:
    def parameters(self, rng):
        return {"W": rng.standard_normal((64, 10)) * 0.1}
    def forward(self, params, x, rng):
        if rng is not None and rng.random() < 0.03:
            raise ArithmeticError("this shard is too much")
        return x @ params["W"], lambda dz: {"W": x.T @ dz}
def build():
    return Model()
"""


def test_an_exception_in_one_rank_ends_the_launch_with_its_message_last(tmp_path: Path) -> None:
    step, shard = first_drawn(0.03)
    rank = next(rank for rank in range(3) if 5 * rank // 3 <= shard < 5 * (rank + 1) // 3)
    path = job_file(tmp_path, RAISING, train={"epochs": 400})
    done = mpirun.dptrain("run", str(path), "--run-dir", str(tmp_path / "run"), n=3, timeout=240)
    assert done.returncode == 1, done.stderr
    told = [line for line in done.stderr.splitlines() if line.startswith("dptrain: ") and "take turns" not in line]
    assert told == [
        f"dptrain: rank {rank} at step {step} in forward and backward: expected no exception, "
        "found ArithmeticError: this shard is too much; its traceback tells where"
    ]
    said = [line for line in done.stderr.splitlines() if "dptrain" in line or "Traceback" in line]
    assert said[-1] == told[0]


@pytest.mark.skipif(library() != "Open MPI", reason="with MPICH nobody is interrupted")
@pytest.mark.parametrize(
    ("case", "code", "told"),
    [
        ("raises", 1, r"rank 1 at step 3 in forward and backward: .*RuntimeError: no more of this.*"),
        ("raises while probing", 1, r"rank 1 at step 0 in probing the arithmetic: .*RuntimeError: no more of this.*"),
        ("raises while evaluating", 1, r"rank 1 at step 5 in evaluation: .*RuntimeError: no more of this.*"),
        ("nan", 2, r"rank \d at step 10, shard \d, gradient of W: .*"),
    ],
)
def test_a_worker_says_why_it_failed_though_those_who_heard_of_it_left_before(
    tmp_path: Path, case: str, code: int, told: str
) -> None:
    done = mpirun.ranks(3, "tests.interrupted_suite", case, str(tmp_path / "run"), timeout=240)
    assert done.returncode == code, done.stderr
    said = [line for line in done.stderr.splitlines() if line.startswith("dptrain: ")]
    assert len(said) == 1, done.stderr
    assert re.fullmatch(f"dptrain: {told}", said[0])


SCRIPT = """
import os
import sys
from pathlib import Path
import dptrain
from tests.softmax import Softmax, job
result = dptrain.train(job(), model=Softmax(), run_dir=sys.argv[1])
Path(f"{sys.argv[1]}.{os.getpid()}").write_text(f"{result.workers} {result.weights_sha256}")
again = dptrain.train(job(), model=Softmax(), run_dir=sys.argv[1] + "-2")
assert again.weights_sha256 == result.weights_sha256
"""


def test_a_program_of_ones_own_trains_under_mpirun(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(SCRIPT)
    line, environ = command(2, [], os.environ)
    line = [*line[: line.index(sys.executable) + 1], str(tmp_path / "mine.py")]
    root = Path(__file__).resolve().parent.parent
    runs = []
    for prefix, folder in ((line, "two"), (line[-2:], "one")):
        full = {**environ, "PYTHONPATH": str(root), "OPENBLAS_NUM_THREADS": "1"}
        done = mpirun.run([*prefix, str(tmp_path / folder)], full, 60, tmp_path)
        assert done.returncode == 0, done.stderr
        runs.append([path.read_text().split() for path in tmp_path.glob(f"{folder}.*")])
    assert [[workers for workers, _ in run] for run in runs] == [["2", "2"], ["1"]]
    assert len({weights for run in runs for _, weights in run}) == 1


BROKEN = """
import sys
import dptrain
from tests.softmax import Counting, fail, job
from dptrain.exchange.mpi import connect
rank = connect().rank
dptrain.train(job(), model=Counting(30 if rank == 1 else 0, fail), run_dir=sys.argv[1])
"""


def test_a_program_of_ones_own_ends_on_all_ranks(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(BROKEN)
    line, environ = command(2, [], os.environ)
    line = [*line[: line.index(sys.executable) + 1], str(tmp_path / "mine.py"), str(tmp_path / "run")]
    root = Path(__file__).resolve().parent.parent
    done = mpirun.run(line, {**environ, "PYTHONPATH": str(root), "OPENBLAS_NUM_THREADS": "1"}, 60, tmp_path)
    assert done.returncode == 1
    assert re.search(r"WorkerCrashed: rank 1 at step \d+ in forward and backward: .*no more of this", done.stderr)


def test_a_run_that_is_done_lacks_nothing_where_its_checkpoints_could_not_be_written(seen: Seen) -> None:
    for rank in range(3):
        assert seen[rank]["full disk"]["state"] == "done"
        assert seen[rank]["full disk"]["weights_sha256"] == seen[rank]["softmax"]["weights_sha256"]


class Told(Alone):
    """A communicator that remembers what rank 0 says, or says it."""

    def __init__(self, word: Any = None) -> None:
        self.word = word
        self.said: list[Any] = []

    def broadcast_json(self, content: Any, phase: str) -> Any:
        self.said.append(content)
        return self.word or content


def test_a_leader_that_leaves_tells_the_others_its_code(monkeypatch: pytest.MonkeyPatch) -> None:
    told = Told()
    monkeypatch.setattr("dptrain.ranks._connect", lambda place: told)
    place = Announced(0, 2, "hydra")
    with Leader(place):
        pass
    with pytest.raises(SystemExit), Leader(place):
        raise SystemExit(5)
    with pytest.raises(SystemExit), Leader(place):
        raise SystemExit("words")
    with pytest.raises(ValueError, match="x"), Leader(place):
        raise ValueError("x")
    assert told.said == [{"code": 0}, {"code": 5}, {"code": 1}, {"code": 1}]


def test_a_follower_does_what_it_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from dptrain.job.spec import plain

    place = Announced(1, 2, "hydra")
    monkeypatch.setattr("dptrain.ranks._connect", lambda place: Told({"code": 7}))
    assert follow(place) == 7
    it = plain(load_job(None, ["train.steps=2"]))
    options = {"run_dir": str(tmp_path / "run"), "resume": False, "trace": str(tmp_path / "t.json")}
    word = {"job": it, "options": options}
    seen = []

    def train(communicator: Any, found: Any, **options: Any) -> None:
        seen.append((plain(found), options))

    monkeypatch.setattr("dptrain.ranks._connect", lambda place: Told(word))
    monkeypatch.setattr("dptrain.ranks.train", train)
    assert follow(place) == 0
    assert seen == [(it, {**options, "observer": None, "successor": None})]


def test_a_follower_that_becomes_the_chief_shows_what_the_first_one_did(monkeypatch: pytest.MonkeyPatch) -> None:
    from dptrain.job.spec import plain

    place = Announced(1, 2, "openmpi")
    word = {"job": plain(load_job(None)), "options": {}, "shown": {"mode": "plain"}}
    monkeypatch.setattr("dptrain.ranks._connect", lambda place: Told(word))
    made: list[Any] = []
    monkeypatch.setattr("dptrain.ranks.train", lambda communicator, job, **options: made.append(options["successor"]()))
    assert follow(place, lambda shown: ("made of", shown)) == 0  # type: ignore[return-value, arg-type]
    assert made == [("made of", {"mode": "plain"})]
