"""Silent corruption: real flips of bits in real runs, who is named, and what the others come to."""

import itertools
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dptrain import corruption
from dptrain.checkpoint import MANIFEST
from dptrain.corruption import Auditor, Finding, chosen, contradicted, outvoted
from dptrain.job.spec import Exchange
from dptrain.journal import read_all
from dptrain.launch import command, library
from dptrain.membership import Membership
from tests.faults.oracle import PROGRAM, Ended, Surroundings, undisturbed

SURVIVES = library() == "Open MPI"
survived_within_a_step = pytest.mark.skipif(not SURVIVES, reason="with MPICH the job is started again")

SEED, SHARDS, STEPS = 11, 8, 60

MODEL = """
import ctypes, os
import numpy as np

RANK = os.environ.get("OMPI_COMM_WORLD_RANK", os.environ.get("PMI_RANK"))

seen = {}

def faulty(what, step, shard):
    "Whether the worker's hardware fails now: at one step, once or twice for each shard, or from then on."
    if os.environ.get("FAULT") != what or RANK not in os.environ["FAULT_RANKS"].split():
        return False
    if os.environ["FAULT_WHEN"] == "always":
        return step >= int(os.environ["FAULT_STEP"])
    if step != int(os.environ["FAULT_STEP"]):
        return False
    if os.environ["FAULT_WHEN"] == "twice":
        seen[shard] = seen.get(shard, 0) + 1
        return seen[shard] <= 2
    try:
        open(f"hit-{RANK}-{shard}", "x").close()
    except FileExistsError:
        return False
    return True

class Linear:
    def parameters(self, rng):
        return {"W": rng.normal(size=(64, 5)) * 0.1, "b": np.zeros(5)}

    def forward(self, params, x, rng):
        step, shard = -1, -1
        if rng is not None:
            step, shard = map(int, rng.bit_generator.state["state"]["counter"][1:3])
        if faulty("state", step, shard):
            place = params["W"].ctypes.data + 4 * 7
            ctypes.c_uint32.from_address(place).value += 1 << 16

        def backward(dy):
            gradient = {"W": x.T @ dy, "b": dy.sum(axis=0)}
            if faulty("gradient", step, shard):
                gradient["W"].view(np.uint32)[3, 2] ^= 1 << 15 + shard
            return gradient

        return x @ params["W"] + params["b"], backward

build = Linear
"""

JOB = f"""
seed = {SEED}
[data]
source = "synthetic"
synthetic = {{ rows = 2000, shape = [64], classes = 5 }}
[model]
python = "model.py:build"
[optimizer]
lr = 0.05
momentum = 0.9
[train]
batch_size = 120
shards = {SHARDS}
steps = {STEPS}
evaluate_steps = 8
result = "best"
[output]
checkpoint_steps = 5
checkpoint_seconds = 0
"""

COMPARED = ["exchange.type=segments", "exchange.compare_steps=10"]
RECHECKED = ["exchange.compare_steps=0", "exchange.recheck_steps=1"]


def prepare(folder: Path) -> None:
    (folder / "model.py").write_text(MODEL)


def truth() -> str:
    return undisturbed(JOB, prepare).weights_sha256


def fault(what: str, *ranks: int, step: int, when: str = "once") -> dict[str, str]:
    """A fault, as the model finds it in its environment. Steps count from 0 there."""
    return {
        "FAULT": what,
        "FAULT_RANKS": " ".join(map(str, ranks)),
        "FAULT_STEP": str(step - 1),
        "FAULT_WHEN": when,
    }


def train(place: Surroundings, workers: int, settings: list[str], **environ: str) -> Ended:
    """A supervised job to its end."""
    (place.folder / "job.toml").write_text(JOB)
    prepare(place.folder)
    line = [*PROGRAM, "run", "job.toml", "-n", str(workers), "--run-dir", "run", "--progress", "none"]
    return place.run([*line, *(part for setting in settings for part in ("--set", setting))], 90, **environ)


def result(place: Surroundings) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((place.folder / "run" / "result.json").read_text())
    return content


def findings(place: Surroundings) -> list[dict[str, Any]]:
    lines = read_all(place.folder / "run" / "journal.jsonl")
    return [line for line in lines if line.get("event") == "corruption"]


def ranks_of(workers: list[dict[str, Any]]) -> list[int]:
    assert {worker["host"] for worker in workers} <= {os.uname().nodename}
    return [worker["rank"] for worker in workers]


def rechecked(owner: int, workers: int, first: int) -> int:
    """The first step from ``first`` on at which something of the owner's is rechecked, where every step is."""
    nodes = Membership(0, workers, SHARDS).nodes
    return next(step for step in itertools.count(first) if chosen(SEED, step, nodes).owner == owner)


@survived_within_a_step
@pytest.mark.parametrize("wrong", [0, 2])
def test_who_holds_other_bits_is_named_and_left_behind(tmp_path: Path, wrong: int) -> None:
    place = Surroundings(tmp_path)
    # More checkpoints since the last comparison than are kept.
    ended = train(place, 3, [*COMPARED, "output.checkpoint_steps=3"], **fault("state", wrong, step=33))
    assert ended.code == 0, ended.said
    found = result(place)
    assert found["weights_sha256"] == truth()
    assert found["attempt"] == 1
    assert ranks_of(found["per_worker"]) == [rank for rank in range(3) if rank != wrong]
    (event,) = findings(place)
    assert ranks_of(event["wrong"]) == [wrong]
    assert event["found_at"] == 40
    assert event["what"].startswith("weights")
    assert event["back_to"] == 30
    assert f"rank {wrong} ({os.uname().nodename}) at step 40 has wrong bits in weights" in ended.err
    assert "the workers go back to step 30 and go on without it" in ended.err
    broken = place.folder / "run" / "checkpoints" / "broken-step-0000000036"
    assert (broken / MANIFEST).exists()
    assert place.leftovers() == []


@survived_within_a_step
@pytest.mark.parametrize("when", ["once", "always"])
def test_who_computes_other_bits_is_named_and_left_behind(tmp_path: Path, when: str) -> None:
    place = Surroundings(tmp_path)
    step = rechecked(1, 3, 30)
    ended = train(place, 3, RECHECKED, **fault("gradient", 1, step=step, when=when))
    assert ended.code == 0, ended.said
    found = result(place)
    assert found["weights_sha256"] == truth()
    assert found["attempt"] == 1
    assert ranks_of(found["per_worker"]) == [0, 2]
    (event,) = findings(place)
    assert ranks_of(event["wrong"]) == [1]
    assert event["found_at"] == step
    assert event["what"].startswith("the gradient of shard")
    assert 0 < event["back_to"] < step
    assert place.leftovers() == []


@pytest.mark.parametrize(
    ("what", "settings", "when", "where"),
    [("state", COMPARED, "once", "weights"), ("gradient", RECHECKED, "twice", "the gradient of shard")],
)
def test_of_two_nobody_is_wrong_and_both_go_back_once(
    tmp_path: Path, what: str, settings: list[str], when: str, where: str
) -> None:
    place = Surroundings(tmp_path)
    ended = train(place, 2, settings, **fault(what, 1, step=rechecked(1, 2, 30), when=when))
    assert ended.code == 0, ended.said
    assert result(place)["weights_sha256"] == truth()
    assert result(place)["attempt"] == 1
    assert len(result(place)["per_worker"]) == 2
    (event,) = findings(place)
    assert event["wrong"] == []
    assert event["back_to"] >= 20
    assert ranks_of(event["among"]) == [0, 1]
    assert f"disagree on {where}" in ended.err
    assert place.leftovers() == []


@pytest.mark.parametrize("survive", ["auto", "off"])
@pytest.mark.parametrize(("what", "settings"), [("state", COMPARED), ("gradient", RECHECKED)])
def test_two_that_disagree_again_fail_the_job(tmp_path: Path, what: str, settings: list[str], survive: str) -> None:
    place = Surroundings(tmp_path)
    ended = train(place, 2, settings, DPTRAIN_FT=survive, **fault(what, 1, step=33, when="always"))
    assert ended.code == 1, ended.said
    host = os.uname().nodename
    assert f"ranks 0 ({host}) and 1 ({host}) at step" in ended.err
    if survive == "off":
        assert "found others, for the second time" in ended.err
    assert [event["back_to"] is None for event in findings(place)] == [False, True]
    assert not (place.folder / "run" / "result.json").exists()
    assert place.leftovers() == []


@pytest.mark.parametrize(("what", "settings"), [("state", COMPARED), ("gradient", RECHECKED)])
def test_where_nothing_is_survived_the_job_is_started_again(tmp_path: Path, what: str, settings: list[str]) -> None:
    place = Surroundings(tmp_path)
    step = rechecked(1, 3, 33)
    ended = train(place, 3, settings, DPTRAIN_FT="off", **fault(what, 1, step=step))
    assert ended.code == 0, ended.said
    assert result(place)["weights_sha256"] == truth()
    assert result(place)["attempt"] == 2
    (event,) = findings(place)
    assert ranks_of(event["wrong"]) == [1]
    assert place.leftovers() == []


def test_a_launch_of_ones_own_fails_and_says_who(tmp_path: Path) -> None:
    place = Surroundings(tmp_path)
    (tmp_path / "job.toml").write_text(JOB)
    prepare(tmp_path)
    settings = [part for setting in COMPARED for part in ("--set", setting)]
    environ = {**place.environ, "DPTRAIN_FT": "off"}
    line, environ = command(3, ["run", "job.toml", "--run-dir", "run", *settings], environ)
    ended = place.run(line, 60, **environ, **fault("state", 1, step=33))
    assert ended.code == 3, ended.said
    said = f"rank 1 ({os.uname().nodename}) at step 40: expected weights"
    assert said in " ".join(ended.err.split())
    again = place.run([*PROGRAM, "run", "job.toml", "--run-dir", "run", "--resume"], 240)
    assert again.code == 0, again.said
    assert result(place)["weights_sha256"] == truth()
    assert place.leftovers() == []


@pytest.mark.parametrize("what", ["state", "gradient"])
def test_unwatched_the_same_flip_goes_unnoticed(tmp_path: Path, what: str) -> None:
    """The negative control: without the two keys the fault is in the result."""
    place = Surroundings(tmp_path)
    settings = ["exchange.type=segments", "exchange.compare_steps=0", "exchange.recheck_steps=0"]
    ended = train(place, 3, settings, **fault(what, 1, step=rechecked(1, 3, 33)))
    assert ended.code == 0, ended.said
    assert findings(place) == []
    assert result(place)["weights_sha256"] != truth()


@pytest.mark.parametrize(("kind", "workers"), [("segments", 3), ("node", 3), ("allreduce", 2)])
def test_undisturbed_nothing_is_found(tmp_path: Path, kind: str, workers: int) -> None:
    place = Surroundings(tmp_path)
    settings = [f"exchange.type={kind}", "exchange.compare_steps=7", "exchange.recheck_steps=3"]
    ended = train(place, workers, settings)
    assert ended.code == 0, ended.said
    assert findings(place) == []
    found = result(place)
    assert found["weights_sha256"] == truth() or kind == "allreduce"
    # Every third step a node is computed a second time.
    assert sum(worker["shards_computed"] for worker in found["per_worker"]) > STEPS * SHARDS


@pytest.mark.parametrize(
    ("digests", "wrong", "among"),
    [
        ("aaa", "", ""),
        ("a", "", ""),
        ("", "", ""),
        ("aba", "1", "1"),
        ("baa", "0", "0"),
        ("abcaa", "12", "12"),
        ("ab", "", "01"),
        ("aabb", "", "0123"),
        ("abc", "", "012"),
        ("aabc", "", "0123"),
    ],
)
def test_a_strict_majority_is_right(digests: str, wrong: str, among: str) -> None:
    assert outvoted(dict(enumerate(digests))) == (set(map(int, wrong)), set(map(int, among)))


@pytest.mark.parametrize(
    ("owner", "checker", "third", "wrong"),
    [
        ("ab", "bb", "", (True, False)),
        ("aa", "ba", "", (False, True)),
        ("aa", "bb", "", (False, False)),
        ("aa", "bb", "a", (False, True)),
        ("aa", "bb", "b", (True, False)),
        ("aa", "bb", "c", (False, False)),
        ("ac", "bb", "", (True, False)),
        ("ab", "ba", "", (True, True)),
    ],
)
def test_who_contradicts_is_wrong(owner: str, checker: str, third: str, wrong: tuple[bool, bool]) -> None:
    assert contradicted((owner[0], owner[1]), (checker[0], checker[1]), third) == wrong


@pytest.mark.parametrize("workers", [2, 3, 5, 8, 11])
def test_every_node_has_its_turn(workers: int) -> None:
    nodes = Membership(0, workers, SHARDS).nodes
    count = sum(map(len, nodes))
    for cycle in range(3):
        turns = [chosen(SEED, turn, nodes) for turn in range(cycle * count, (cycle + 1) * count)]
        assert {(turn.owner, turn.row) for turn in turns} == {
            (r, i) for r in range(workers) for i in range(len(nodes[r]))
        }
        assert all(turn.node == nodes[turn.owner][turn.row] and turn.checker != turn.owner for turn in turns)
    assert {chosen(SEED, turn, nodes).checker for turn in range(200)} == set(range(workers))


def test_only_later_checkpoints_are_set_aside(tmp_path: Path) -> None:
    for step in (5, 10, 15):
        (tmp_path / f"step-{step:010d}").mkdir()
    corruption.set_aside(tmp_path, 10)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "broken-step-0000000015",
        "step-0000000005",
        "step-0000000010",
    ]
    assert [path.name for path in corruption.checkpoints_up_to(tmp_path, 9)] == ["step-0000000005"]


def test_after_a_death_all_know_what_any_knew() -> None:
    def auditor() -> Auditor:
        communicator = SimpleNamespace(rank=0, size=2, members=(0, 2))
        meeting: Any = SimpleNamespace(communicator=communicator, kind="segments")
        worker: Any = SimpleNamespace(state=SimpleNamespace(step=0), best=None)
        chronicle: Any = SimpleNamespace(trusted=None)
        return Auditor(
            worker,
            meeting,
            chronicle,
            {},
            Exchange(recheck_steps=1),
            seed=0,
            repeatable=True,
            go_back=lambda step: worker.state,
            distrust=lambda step: None,
        )

    some = [auditor(), auditor()]
    words = [auditor.word() for auditor in some]
    words[0] |= {"agreed": 20, "cleared": [[0, 17], [2, 12]], "doubts": {"state": 4, "gradient": 3}}
    words[1] |= {"agreed": 10, "cleared": [[2, 13]], "doubts": {"gradient": 3}}
    words[1]["finding"] = Finding("state", 30, "weights", [1], [1], 20)._asdict()
    for one in some:
        one.heard(json.loads(json.dumps(words)))
    first, second = (one.word() for one in some)
    assert first == second
    assert first["finding"]["wrong"] == [1]
    assert first["agreed"] == 20
    assert dict(first["cleared"]) == {0: 17, 2: 13}
    assert first["doubts"] == {"gradient": 3}
    assert [one.chronicle.trusted for one in some] == [13, 13]
