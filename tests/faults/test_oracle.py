"""That the oracle can fail: what must not happen is made to happen, and has to be seen."""

import os
import re
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from dptrain import checkpoint
from tests.faults import __main__ as campaign
from tests.faults import jobs, storage
from tests.faults.fault import Fault, Outcome, Tally, mixed, perform
from tests.faults.oracle import SHARED, Ended, Surroundings, Truth, judge, marked, undisturbed
from tests.faults.storage import Run

JOB = jobs.JOBS[0]
NONE = Truth("", None, {}, None)
MAIN = "\nfrom dptrain.cli.main import main\nmain()\n"

FORGETS_MOMENTUM = """
from dptrain import checkpoint
read = checkpoint.read

def forgetful(*arguments):
    snapshot = read(*arguments)
    snapshot.groups["momentum"][:] = 0
    return snapshot

checkpoint.read = forgetful
"""

COUNTS_A_SHARD_TWICE = """
from dptrain.data.batches import Batches
file_rows = Batches.file_rows

def twice(batches, step, lo, hi):
    rows = file_rows(batches, step, lo, hi)
    b = batches.rows_per_shard
    if step == 50 and lo == 0 and hi > 1:
        rows = rows.copy()
        rows[b : 2 * b] = rows[:b]
    return rows

Batches.file_rows = twice
"""


def dptrain(before: str) -> list[str]:
    return [sys.executable, "-P", "-c", before + MAIN]


@pytest.mark.parametrize(("before", "verdict"), [("", "restarted"), (FORGETS_MOMENTUM, "wrong hash")])
def test_momentum_dropped_on_resume_is_seen(tmp_path: Path, before: str, verdict: str) -> None:
    run = Run(tmp_path, JOB)
    run.until(100)
    ended = run.place.run([*dptrain(before), *run.line(resume=True)], storage.DEADLINE)
    outcome = judge(run.place, ended, run.run_dir, undisturbed(JOB.text), phase="")
    assert outcome.verdict == verdict, outcome.note


@pytest.mark.parametrize(("before", "verdict"), [("", "survived"), (COUNTS_A_SHARD_TWICE, "wrong hash")])
def test_a_shard_counted_twice_in_one_step_is_seen(tmp_path: Path, before: str, verdict: str) -> None:
    run = Run(tmp_path, JOB)
    ended = run.place.run([*dptrain(before), *run.line()], storage.DEADLINE)
    outcome = judge(run.place, ended, run.run_dir, undisturbed(JOB.text), phase="")
    assert outcome.verdict == verdict, outcome.note


def test_a_hang_is_seen_and_everything_of_it_killed(tmp_path: Path) -> None:
    place = Surroundings(tmp_path)
    # The grandchild has a session of its own, as a daemon would.
    ended = place.run(["sh", "-c", "setsid sleep 1000 & sleep 1000"], 0.5)
    assert ended.code is None
    assert judge(place, ended, tmp_path, NONE, phase="").verdict == "hung"
    assert marked(place.mark) == []


def _left(folder: Path, line: str) -> Outcome:
    place = Surroundings(folder)
    ended = place.run(["sh", "-c", line], 20)
    try:
        return judge(place, ended, folder, NONE, phase="")
    finally:
        assert marked(place.mark) == []


def test_what_is_left_behind_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.faults.oracle._GRACE", 0.5)
    process = _left(tmp_path / "process", "setsid sleep 1000 > /dev/null 2>&1 &")
    assert process.verdict == "leftover"
    assert "sleep 1000" in process.note
    file = _left(tmp_path / "file", "touch $TMPDIR/forgotten")
    assert file.verdict == "leftover"
    assert "temporary forgotten" in file.note
    name = f"faults-{os.getpid()}"
    try:
        shared = _left(tmp_path / "shared", f"touch {SHARED}/{name}")
    finally:
        (SHARED / name).unlink()
    assert shared.verdict == "leftover"
    assert name in shared.note
    assert _left(tmp_path / "nothing", "true").verdict == "wrong code"


@pytest.mark.parametrize(("whose", "verdict"), [("$$", "leftover"), ("1", "wrong code")])
def test_the_folder_of_a_killed_supervisor_is_seen_and_anothers_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whose: str, verdict: str
) -> None:
    monkeypatch.setattr("tests.faults.oracle._GRACE", 0.5)
    with tempfile.TemporaryDirectory(prefix="dptrain-run-", dir=SHARED) as folder:
        os.rmdir(folder)
        outcome = _left(tmp_path, f"mkdir {folder} && echo {whose} > {folder}/supervisor")
    assert outcome.verdict == verdict


@pytest.mark.parametrize(
    ("code", "err", "verdict"),
    [
        (2, "dptrain: x: expected y, found z; w", "refused"),
        (1, "dptrain: x: expected y, found z; w", "wrong code"),
        (-9, "", "wrong code"),
        (2, "dptrain: something else", "wrong error"),
        (2, "Traceback (most recent call last)\nx: expected y", "wrong error"),
        (0, "", "wrong code"),
    ],
)
def test_only_the_specified_error_is_a_refusal(tmp_path: Path, code: int, err: str, verdict: str) -> None:
    place = Surroundings(tmp_path)
    ended = Ended(code, "", err, 0.1)
    assert judge(place, ended, tmp_path / "run", NONE, phase="", refusal="x: expected y").verdict == verdict


def test_a_success_without_the_wanted_words_or_where_none_may_be_is_seen(tmp_path: Path) -> None:
    run = Run(tmp_path, JOB)
    ended = run.place.run([*storage.PROGRAM, *run.line()], storage.DEADLINE)
    truth = undisturbed(JOB.text)
    assert judge(run.place, ended, run.run_dir, truth, phase="", refusal="x").verdict == "survived"
    assert judge(run.place, ended, run.run_dir, truth, phase="", said="passed over").verdict == "wrong error"
    assert judge(run.place, ended, run.run_dir, truth, phase="", refusal="x", must_fail=True).verdict == "wrong code"
    (run.checkpoints / ".writing-x").mkdir()
    assert judge(run.place, ended, run.run_dir, truth, phase="").verdict == "leftover"


def test_checkpoints_that_are_not_checked_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flipped(folder: str, name: str) -> Outcome:
        return storage.flipped(tmp_path / folder, name=name, lo=20, hi=84)

    assert flipped("a", checkpoint.MANIFEST).verdict == flipped("b", checkpoint.STATE).verdict == "survived"
    monkeypatch.setattr(checkpoint, "_sha256_of_json", lambda content: "")
    assert not flipped("c", checkpoint.MANIFEST).good
    monkeypatch.setattr(checkpoint, "_sha256_of_all", lambda head, tensors: "")
    assert not flipped("d", checkpoint.STATE).good


@pytest.mark.skipif(storage.strace_missing() != "", reason=storage.strace_missing())
def test_a_save_under_its_last_name_is_seen_to_leave_broken_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = storage.calls(4)
    names = [call for call, _ in calls]
    assert names.count("fsync") == 4
    assert {"openat", "fallocate", "write", "rename", "close"} <= set(names)
    assert storage.crashed(tmp_path / "good", step=4, index=names.index("fsync")).verdict == "survived"
    # Written in place: the name is the last one from the beginning.
    in_place = "from dptrain import checkpoint\ncheckpoint._unfinished = lambda path: path\n"
    monkeypatch.setattr(storage, "SAVER", in_place + storage.SAVER)
    monkeypatch.setattr(storage, "calls", lambda step: [call for call in calls if call[0] == "fsync"])
    assert not storage.crashed(tmp_path / "bad", step=4, index=0).good


def test_a_second_fsync_of_the_same_file_is_seen(tmp_path: Path) -> None:
    again = "import os\nreal = os.fsync\ndef twice(handle):\n    try:\n        real(handle)\n    except OSError:\n"
    again += "        real(handle)\n"
    program = storage.FAILING.replace("from dptrain.cli", again + "os.fsync = twice\nfrom dptrain.cli")
    run = Run(tmp_path, JOB)
    for code, told in ((program, True), (storage.FAILING, False)):
        line = [sys.executable, "-P", "-c", code, "fsync", "5", "20", "60", *run.line()]
        ended = run.place.run(line, storage.DEADLINE)
        assert ("fsync again: " in ended.err) is told, ended.said
        storage.shutil.rmtree(run.run_dir)


def _some(kind: str, verdicts: list[str]) -> Iterator[Fault]:
    for number, verdict in enumerate(verdicts):
        yield Fault(kind, f"{kind} {number}", lambda folder, verdict=verdict: Outcome(verdict, "a phase", 0.25))


def test_the_table_counts_what_became_of_faults(tmp_path: Path) -> None:
    sources = {"process": _some("process", ["survived"] * 3 + ["hung"]), "data": _some("data", ["refused"])}
    tally = Tally()
    for number, fault in enumerate(mixed(sources, {"process": 3, "data": 1}, 1)):
        tally.add(fault, perform(fault, tmp_path / str(number)))
    assert tally.bad == 1
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in tally.table().splitlines()]
    assert rows[2] == ["data", "a phase", "1", "0", "0", "1", "0", "0", "0", "0.250", "0.250", "0.250"]
    assert rows[3] == ["process", "a phase", "4", "3", "0", "0", "1", "0", "0", "0.250", "0.250", "0.250"]
    assert rows[4][:8] == ["all", "", "5", "3", "0", "1", "1", "0"]


def test_runs_differ_in_anything_that_they_come_to(tmp_path: Path) -> None:
    truth = Truth("sha256:1", 0.5, {"test": {"loss": 1.0}}, {"weights/a": "sha256:2"})
    assert truth.differs(truth) == ""
    assert truth.differs(replace(truth, state=None)) == ""
    for changed in (
        replace(truth, weights_sha256="sha256:3"),
        replace(truth, loss=0.25),
        replace(truth, metrics={"test": {"loss": 2.0}}),
        replace(truth, state={"weights/a": "sha256:3"}),
    ):
        assert " instead of " in truth.differs(changed)


def test_a_fault_that_fails_itself_is_bad(tmp_path: Path) -> None:
    def broken(folder: Path) -> Outcome:
        raise RuntimeError("never got there")

    outcome = perform(Fault("data", "x", broken), tmp_path / "x")
    assert outcome.verdict == "no verdict"
    assert not outcome.good
    assert "never got there" in outcome.note


def test_the_command_tells_of_a_bad_end_and_exits_with_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tests.faults.data.faults", lambda seed: _some("data", ["survived", "hung"]))
    assert campaign.main(["--kinds", "data", "--seed", "7", "--runs", "2"]) == 1
    said = capsys.readouterr().out
    assert "hung: data: data 1 [a phase]" in said
    assert "again: python -m tests.faults --kinds data --seed 7 --name 'data 1'" in said
    assert re.search(r"^\| all \|.*\| 2 \| 1 \|", said, re.MULTILINE)
    assert campaign.main(["--kinds", "data", "--seed", "7", "--name", "data 0"]) == 0
    assert "1 faults, 0 bad" in capsys.readouterr().out
    assert campaign.main(["--kinds", "data", "--seed", "7", "--name", "none such"]) == 1


def test_a_seed_is_a_campaign() -> None:
    def names(seed: int) -> list[str]:
        return [fault.name for fault, _ in zip(campaign.chosen(["data"], seed, ""), range(20), strict=False)]

    assert names(3) == names(3) != names(4)
    assert len(set(names(3))) == 20
