"""Whole jobs that die: the supervisor starts them again, knows faults from errors, and leaves nothing behind."""

import contextlib
import json
import os
import random
import re
import shlex
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from fcntl import ioctl
from pathlib import Path
from typing import Any

import pytest

from dptrain import checkpoint, launch, launcher, rundir, supervise, supervision
from dptrain.cli.terminal import LAUNCHERS
from dptrain.errors import WorkerLost
from dptrain.launcher import Launcher, Outcome, Start
from dptrain.processes import children, pids
from tests.cli.conftest import PROGRAM, environment

MARK = "TEST_OF_SUPERVISION"
PATIENCE = 240.0

MORTAL = {"DPTRAIN_FT": "off"}
"""Among workers that survive a death there would be nothing to do."""

HIDE, SHOW = b"\x1b[?25l", b"\x1b[?25h"
"""The cursor, on a terminal."""

JOB = """
name = "long"
seed = 5

[data]
source = "digits"
validation = 0.1
test = 0.1

[model]
layers = [{ type = "linear", units = 256 }, { type = "dropout", rate = 0.2 }, { type = "linear", units = 10 }]

[optimizer]
lr = 0.05
momentum = 0.9

[train]
batch_size = 120
shards = 6
steps = 3000
evaluate_steps = 500

[output]
journal_steps = 10
checkpoint_steps = 50
checkpoint_seconds = 0
"""

MODEL = '''
import os
import signal

from dptrain.cli.terminal import launcher_process


class Softmax:
    """Does what ACT says after so many forward passes of training, or dies once, where a run directory is named."""

    left = int(os.environ.get("PASSES", "0"))

    def parameters(self, rng):
        claimed = os.environ.get("CLAIMED")
        if claimed and not os.path.exists(claimed):
            # As if the chief had died before it could say that this directory is the run's.
            os.makedirs(os.path.dirname(claimed), exist_ok=True)
            open(claimed, "w").close()
            self.act("kill the launcher")
        return {"W": rng.standard_normal((64, 10)) * 0.1}

    def forward(self, params, x, rng):
        if rng is not None and self.left:
            self.left -= 1
            if not self.left:
                self.act(os.environ["ACT"])
        return x @ params["W"], lambda dz: {"W": x.T @ dz}

    def act(self, what):
        if what == "raise":
            raise RuntimeError("no more of this")
        os.kill(launcher_process(), signal.SIGKILL)
        while True:
            signal.pause()
'''

OWN = """
name = "own"
seed = 3

[data]
source = "digits"
validation = 0.1
test = 0.1

[model]
python = "model.py:Softmax"

[train]
batch_size = 60
shards = 4
steps = 90

[output]
journal_steps = 1
checkpoint_steps = 5
checkpoint_seconds = 0
"""


def until(condition: Callable[[], Any], what: str) -> Any:
    """What a condition gives as soon as it gives something."""
    deadline = time.monotonic() + PATIENCE
    while not (found := condition()):
        assert time.monotonic() < deadline, what
        time.sleep(0.002)
    return found


class Place:
    """A folder with jobs, and the processes that were started in it."""

    def __init__(self, path: Path) -> None:
        self.path, self.temporary = path, path / "tmp"
        self.temporary.mkdir()
        (path / "long.toml").write_text(JOB)
        (path / "own.toml").write_text(OWN)
        (path / "model.py").write_text(MODEL)
        self.env = environment() | {MARK: str(path), "TMPDIR": str(self.temporary)}
        self.env |= {"DPTRAIN_CACHE": os.environ["DPTRAIN_CACHE"]}
        self.env.pop("DPTRAIN_TRAIN__EPOCHS")
        self.mapped: set[str] = set()

    def start(self, *arguments: str, **environ: str) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [*PROGRAM, "run", *arguments],
            cwd=self.path,
            env=self.env | environ,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *arguments: str, **environ: str) -> "subprocess.CompletedProcess[str]":
        with self.start(*arguments, **environ) as process:
            out, err = process.communicate(timeout=PATIENCE)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def processes(self) -> dict[int, dict[str, str]]:
        """What was started here and lives, with its environment."""
        found = {}
        for pid in pids():
            try:
                text = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace")
                state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
            except OSError:
                continue
            environ = dict(line.partition("=")[::2] for line in text.split("\0"))
            if environ.get(MARK) == str(self.path) and state not in "ZX":
                found[pid] = environ
        return found

    def ranks(self) -> dict[int, int]:
        """The process id of each rank; what they share is remembered."""
        ranks = {}
        for pid, environ in self.processes().items():
            rank = launch.announced(environ).rank
            # Launchers' own processes may hold variables of a worker, and so does what a worker starts.
            if rank is not None and _command(pid)[1:4] == PROGRAM[1:]:
                ranks[rank] = pid
                self.mapped |= _shared(pid)
        return ranks

    def launchers(self) -> list[int]:
        return [pid for pid in self.processes() if os.path.basename(_command(pid)[0]) in LAUNCHERS]

    def step(self, run: str) -> int:
        """The newest checkpoint's."""
        found = checkpoint.generations(self.path / run / rundir.CHECKPOINTS)
        return int(found[0].name.removeprefix("step-").removesuffix(".old")) if found else 0

    def result(self, run: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.path / run / rundir.RESULT).read_text())
        return found

    def left(self) -> list[str]:
        """Everything that should be gone."""
        files = [str(path) for path in self.temporary.iterdir()]
        return [*map(str, self.processes()), *files, *(path for path in self.mapped if os.path.exists(path))]


def read_all(handle: int, into: bytearray) -> None:
    """What is written to a terminal until nobody has it open."""
    with contextlib.suppress(OSError):
        while part := os.read(handle, 1 << 16):
            into += part


def _command(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace").split("\0")
    except OSError:
        return [""]


def _shared(pid: int) -> set[str]:
    try:
        maps = Path(f"/proc/{pid}/maps").read_text()
    except OSError:
        return set()
    return set(re.findall(r" (/dev/shm/\S+)$", maps, re.MULTILINE))


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    made = Place(tmp_path)
    yield made
    for pid in made.processes():
        os.kill(pid, signal.SIGKILL)
    for path in made.mapped:
        # What a launcher that nobody supervised left behind.
        Path(path).unlink(missing_ok=True)


@pytest.fixture(scope="module")
def truth(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The weights of the undisturbed jobs, trained by one worker each."""
    place = Place(tmp_path_factory.mktemp("truth"))
    for name in ("long", "own"):
        done = place.run(f"{name}.toml", "--run-dir", name)
        assert done.returncode == 0, done.stderr
    return {name: place.result(name)["weights_sha256"] for name in ("long", "own")}


def _kill_rank(place: Place, rng: random.Random) -> None:
    ranks = until(lambda: len(place.ranks()) == 2 and place.ranks(), "two workers")
    os.kill(ranks[rng.randrange(2)], signal.SIGKILL)


def _kill_launcher(place: Place, rng: random.Random) -> None:
    place.ranks()
    os.kill(place.launchers()[0], signal.SIGKILL)


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.long)])
@pytest.mark.parametrize("kill", [_kill_rank, _kill_launcher], ids=["rank", "launcher"])
def test_a_job_that_dies_is_started_again_with_the_same_weights(
    place: Place, truth: dict[str, str], kill: Callable[[Place, random.Random], None], seed: int
) -> None:
    rng = random.Random(seed)
    at = rng.randrange(50, 1500)
    with place.start("long.toml", "-n", "2", "--run-dir", "run", "--trace", "trace.json", **MORTAL) as process:
        until(lambda: place.step("run") >= at, f"a checkpoint of step {at}")
        # An edit meanwhile belongs to the next job.
        (place.path / "long.toml").write_text(JOB.replace("lr = 0.05", "lr = 0.5"))
        kill(place, rng)
        out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, err
    told = re.search(r"ended by SIGKILL: starting again from step (\d+) in 1 s \(restart 1 of 3\)\n", err)
    assert told, err
    assert int(told[1]) >= at - at % 50
    assert f"resumed_at={told[1]}" in out
    if kill is _kill_rank:
        assert re.search(r"dptrain: (rank [01]|a worker) was ended by SIGKILL", err), err
    result = place.result("run")
    assert (result["state"], result["attempt"]) == ("done", 2)
    assert result["weights_sha256"] == truth["long"]
    assert (place.path / "trace.json").exists()
    assert place.left() == []


def test_a_worker_that_dies_at_the_start_holds_nobody_up(place: Place, truth: dict[str, str]) -> None:
    with place.start("own.toml", "-n", "2", "--run-dir", "run") as process:
        _kill_rank(place, random.Random(1))
        _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, err
    assert place.result("run")["weights_sha256"] == truth["own"]
    assert place.left() == []


def test_a_supervisor_that_dies_takes_all_with_it(place: Place, truth: dict[str, str]) -> None:
    with place.start("long.toml", "-n", "2", "--run-dir", "run") as process:
        until(lambda: place.step("run") >= 100, "a checkpoint")
        assert len(place.ranks()) == 2
        process.kill()
        until(lambda: not place.processes(), "the end of all processes")
    # Nobody was left to remove its folder; the next to come does.
    assert place.left() != []
    done = place.run("long.toml", "-n", "2", "--run-dir", "run", "--resume")
    assert done.returncode == 0, done.stderr
    assert place.result("run")["weights_sha256"] == truth["long"]
    assert place.left() == []


@pytest.mark.parametrize("restarts", [0, 1])
def test_restarts_that_get_nowhere_are_counted(place: Place, restarts: int) -> None:
    job = ["own.toml", "--set", "output.checkpoint_steps=60", "-n", "2", "--max-restarts", str(restarts)]
    done = place.run(*job, "--run-dir", "run", PASSES="40", ACT="kill the launcher")
    assert done.returncode == 3, done.stderr
    assert done.stderr.count("starting again") == restarts
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"dptrain: run run: expected a result, or a newer checkpoint within {restarts} restart")
    assert last.count("mpirun was ended by SIGKILL") == restarts + 1
    # What it says is what goes on.
    by_hand = shlex.split(last.split("`")[1])
    assert by_hand[:2] == ["dptrain", "run"]
    assert place.left() == []
    assert place.run(*by_hand[2:]).returncode == 0


def test_progress_begins_the_count_anew(place: Place, truth: dict[str, str]) -> None:
    done = place.run(
        "own.toml", "-n", "2", "--run-dir", "run", "--max-restarts", "1", PASSES="60", ACT="kill the launcher"
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("restart 1 of 1") >= 2, done.stderr
    assert place.result("run")["attempt"] >= 3
    assert place.result("run")["weights_sha256"] == truth["own"]
    assert place.left() == []


def test_a_directory_that_a_dead_worker_claimed_is_the_runs(place: Place, truth: dict[str, str]) -> None:
    done = place.run("own.toml", "-n", "2", "--run-dir", "run", CLAIMED="run/journal.jsonl")
    assert done.returncode == 0, done.stderr
    assert "starting again from the beginning" in done.stderr
    assert place.result("run")["weights_sha256"] == truth["own"]
    # What was there before is not.
    again = place.run("own.toml", "-n", "2", "--run-dir", "run", CLAIMED="elsewhere/journal.jsonl")
    assert again.returncode == 2, again.stderr
    assert "starting again from the beginning" in again.stderr
    assert "expected no run in it yet" in again.stderr
    assert place.left() == []


def test_a_worker_that_hangs_is_named(place: Place, truth: dict[str, str]) -> None:
    hurry = ["--set", "exchange.hang_seconds=2"]
    with place.start("long.toml", "-n", "2", "--run-dir", "run", *hurry, **MORTAL) as process:
        until(lambda: place.step("run") >= 100, "a checkpoint")
        os.kill(place.ranks()[1], signal.SIGSTOP)
        _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, err
    assert re.search(
        r"rank 1 \(.+\) at step \d+ in .* was stopped for .* s; ended: starting again from step \d+", err
    ), err
    assert place.result("run")["weights_sha256"] == truth["long"]
    assert place.left() == []


def test_without_a_supervisor_workers_end_with_their_launcher(place: Place) -> None:
    line, env = launch.command(2, ["run", "long.toml", "--run-dir", "run", "--set", "train.steps=1000000"], place.env)
    with subprocess.Popen(line, cwd=place.path, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        until(lambda: place.step("run") >= 50, "a checkpoint")
        assert len(place.ranks()) == 2
        os.kill(place.launchers()[0], signal.SIGKILL)
        until(lambda: not place.processes(), "the end of all processes")
        assert process.stdout is not None
        process.stdout.read()


def test_a_terminal_is_left_in_order(place: Place) -> None:
    ours, theirs = os.openpty()
    ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 90, 0, 0))
    env = place.env | {"TERM": "xterm-256color"}
    line = [*PROGRAM, "run", "long.toml", "-n", "2", "--run-dir", "run", "--max-restarts", "0"]
    env.pop("COLUMNS")
    with subprocess.Popen(line, cwd=place.path, env=env, stdin=theirs, stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        shown = bytearray()
        reader = threading.Thread(target=read_all, args=(ours, shown))
        reader.start()
        until(lambda: HIDE in shown and place.step("run") >= 100, "a bar and a checkpoint")
        os.kill(place.launchers()[0], signal.SIGKILL)
        process.wait(PATIENCE)
        reader.join(PATIENCE)
    os.close(ours)
    assert process.returncode == 3
    assert shown.rfind(SHOW) > shown.rfind(HIDE)
    assert b"\n" + SHOW + b"dptrain: run run: expected a result" in shown
    assert place.left() == []


def test_an_exception_is_no_fault(place: Place) -> None:
    done = place.run("own.toml", "-n", "2", "--run-dir", "run", PASSES="40", ACT="raise")
    assert done.returncode == 1, done.stderr
    assert "RuntimeError: no more of this" in done.stderr
    assert "starting again" not in done.stderr
    assert place.left() == []


def test_bad_input_is_no_fault(place: Place) -> None:
    (place.path / "data.npz").write_bytes(b"no archive")
    job = ["long.toml", "--set", "data.source='data.npz'", "-n", "2"]
    done = place.run(*job, "--run-dir", "run")
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("data.npz") == 1
    assert "starting again" not in done.stderr
    assert place.left() == []


def test_a_request_to_stop_is_no_fault(place: Place, truth: dict[str, str]) -> None:
    (place.path / "hosts").write_text("localhost slots=2\n")
    with place.start("long.toml", "--hostfile", "hosts", "--run-dir", "run") as process:
        until(lambda: place.step("run") >= 100, "a checkpoint")
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, err
    assert "to resume: dptrain run long.toml -n 2 --hostfile hosts --run-dir run --resume" in out
    result = place.result("run")
    assert result["state"] == "stopped"
    assert place.left() == []
    # Its result is not taken for that of another launch, which dies.
    with place.start("long.toml", "-n", "2", "--run-dir", "run", "--resume", "--max-restarts", "0") as process:
        until(lambda: place.step("run") > result["steps"], "a newer checkpoint")
        os.kill(place.launchers()[0], signal.SIGKILL)
        _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 3, err
    assert place.result("run") == result


def test_a_second_request_ends_all_at_once(place: Place) -> None:
    with place.start("long.toml", "-n", "2", "--run-dir", "run", "--set", "train.steps=1000000") as process:
        until(lambda: place.step("run") >= 50, "a checkpoint")
        pids = place.ranks()
        for pid in pids.values():
            os.kill(pid, signal.SIGSTOP)
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 128 + signal.SIGKILL, err
    assert "starting again" not in err
    until(lambda: not place.processes(), "the end of all processes")
    assert place.left() == []


def test_a_request_to_stop_ends_the_pause(place: Place) -> None:
    with place.start("own.toml", "-n", "2", "--run-dir", "run", PASSES="40", ACT="kill the launcher") as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "starting again" in line:
                break
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1, err
    assert "not started again; to go on: dptrain run own.toml --run-dir run --resume -n 2" in err
    assert place.left() == []


def test_max_restarts_needs_somebody_who_restarts(place: Place) -> None:
    done = place.run("own.toml", "--max-restarts", "2")
    assert done.returncode == 2
    assert "--max-restarts: expected -n N" in done.stderr


# The decisions, with a shell in the launcher's place.


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """No pauses; gives what a person is told."""
    monkeypatch.setattr(supervise, "PAUSE", 0.0)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    return []


def shell(script: str) -> Start:
    return Start(["sh", "-c", script], os.environ, 0)


def opened(run_dir: Path, step: int) -> str:
    """A shell's command that says so."""
    python = (
        f"from pathlib import Path; from dptrain.supervision import opened; opened(Path({str(run_dir)!r}), 1, {step})"
    )
    return shlex.join([sys.executable, "-c", python])


def by_hand(run_dir: Path | None) -> str:
    return f"by hand {run_dir}"


def test_what_never_begins_is_not_tried_for_long(short: list[str]) -> None:
    with pytest.raises(
        WorkerLost, match=r"the job: .* found none: \(1\) mpirun ended with code 200 .* \(2\) mpirun .*doctor"
    ):
        supervise.supervise(lambda run_dir: shell("exit 200"), by_hand, short.append, 9)
    assert len(short) == 1
    assert "starting again from the beginning in 0 s (restart 1 of 9)" in short[0]


def test_a_result_counts_only_if_this_launch_wrote_it(short: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    result = shlex.quote(str(run / "result.json"))
    old = f"""printf '{{"state": "done"}}' > {result}"""
    with pytest.raises(WorkerLost):
        supervise.supervise(lambda _: shell(f"{old}; {opened(run, 0)}"), by_hand, short.append, 0)
    new = f"{old}.new; mv {result}.new {result}"
    assert (
        supervise.supervise(lambda _: shell(f"{old}; {opened(run, 0)}; {new}; exit 9"), by_hand, short.append, 0) == 0
    )


def test_where_the_terminals_end_is_ignored_it_is_no_request(short: list[str]) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Launcher(short.append) as starter:
            os.kill(os.getpid(), signal.SIGHUP)
            assert starter.requests == 0
            signal.signal(signal.SIGHUP, signal.SIG_DFL)
        with Launcher(short.append) as starter:
            os.kill(os.getpid(), signal.SIGHUP)
            assert starter.requests == 1
    finally:
        signal.signal(signal.SIGHUP, before)


BEGIN = shlex.join([sys.executable, "-c", "from dptrain.supervision import die_with_launcher; die_with_launcher()"])
LIVE = shlex.join(
    [sys.executable, "-c", "import signal; from dptrain import supervision as s; s.die_with_launcher(); signal.pause()"]
)
"""Workers that begin and end, and that begin and wait."""


@pytest.mark.parametrize(
    ("workers", "grace", "script", "stuck"),
    [
        # The second must begin within the grace.
        (2, 5.0, f"{BEGIN}; {LIVE}", "a worker ended before training, and the others waited"),
        (2, 0.5, f"(exit 1) & {LIVE}", "only 1 of 2 workers began, and waited for the others"),
        (1, 0.5, f"{BEGIN}; sleep 1000", "all workers had ended, and mpirun had not"),
        (2, 0.5, f"{{opened}}; {BEGIN}; {LIVE} & sleep 1.5; kill $!", ""),
    ],
)
def test_a_launcher_that_waits_for_nothing_is_ended(
    short: list[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    workers: int,
    grace: float,
    script: str,
    stuck: str,
) -> None:
    monkeypatch.setattr(launcher, "GRACE", grace)
    monkeypatch.setattr(launcher, "_LOOK", 0.1)
    line = ["sh", "-c", script.replace("{opened}", opened(tmp_path, 0))]
    with Launcher(short.append) as starter:
        outcome = starter.launch(Start(line, os.environ, workers))
    assert re.sub(r"rank \d", "a worker", outcome.stuck) == stuck
    assert supervise.cause_of(outcome) == outcome.stuck or not stuck
    assert (outcome.code == -signal.SIGKILL) == bool(stuck)


def test_an_error_that_was_told_keeps_its_code(short: list[str]) -> None:
    python = "from dptrain.supervision import failed; failed(2, 'bad')"
    line = [sys.executable, "-c", python]
    assert supervise.supervise(lambda _: Start(line, os.environ, 0), by_hand, short.append, 3) == 2
    assert short == []


def test_orphans_are_ended_and_other_children_are_not(short: list[str]) -> None:
    before = set(children(os.getpid()))
    with subprocess.Popen(["sleep", "1000"]) as other:
        try:
            with Launcher(short.append) as starter:
                script = "setsid sh -c 'sleep 1000 & sleep 1000 & echo; wait' | read line"
                outcome = starter.launch(shell(f"bash -c {shlex.quote(script)} & exec sleep 0.2"))
                assert outcome.code == 0
                assert set(children(os.getpid())) == {*before, other.pid}
            assert other.poll() is None
        finally:
            other.kill()
    assert short == []


@pytest.mark.parametrize(
    ("code", "first", "ended", "cause"),
    [
        (-9, (), (), "mpirun was ended by SIGKILL"),
        (9, (1,), (), "rank 1 was ended by SIGKILL"),
        (139, (), (), "a worker was ended by SIGSEGV"),
        (139, (0, 1), (), "a worker was ended by SIGSEGV"),
        (3, (2,), (), "mpirun ended with code 3 and no result; the first to end was rank 2"),
        (0, (), (), "mpirun ended with code 0 and no result"),
        (250, (), (), "mpirun ended with code 250 and no result"),
        (9, (1,), (0.0,), "rank 1 (here) at step 4 in forward gave no sign of life; ended"),
        (9, (1,), (3600.0,), "rank 1 was ended by SIGKILL"),
    ],
)
def test_a_cause_is_named(code: int, first: tuple[int, ...], ended: tuple[float, ...], cause: str) -> None:
    line = {"rank": 1, "host": "here", "step": 4, "phase": "forward", "why": "gave no sign of life"}
    lines = [line | {"time": time.time() - ago} for ago in ended]
    assert supervise.cause_of(Outcome(code, first, "", None, None, lines)) == cause


def test_what_hosts_tell_has_the_time_at_which_it_came(short: list[str]) -> None:
    # Of a host whose clock is hours behind.
    tell = f'echo \'{{"rank": 1, "time": 5}}\' >>"${supervision.FOLDER}/{supervision.ENDED}"; exit 3'
    with Launcher(short.append) as starter:
        outcome = starter.launch(Start(["sh", "-c", tell], os.environ, 2, far=True))
    assert [line["rank"] for line in outcome.ended] == [1]
    assert abs(outcome.ended[0]["time"] - time.time()) < 60


# What workers say.


def test_without_a_supervisor_nobody_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(supervision.FOLDER, raising=False)
    monkeypatch.chdir(tmp_path)
    supervision.opened(tmp_path, 1, 0)
    supervision.failed(2, "bad")
    supervision.ended(0, "here", 1, 2, "forward", "why")
    monkeypatch.setenv(supervision.FOLDER, str(tmp_path / "gone"))
    supervision.opened(tmp_path, 1, 0)
    supervision.failed(2, "bad")
    supervision.ended(0, "here", 1, 2, "forward", "why")
    assert list(tmp_path.iterdir()) == []


def test_the_first_word_on_the_run_directory_holds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(supervision.FOLDER, str(tmp_path))
    supervision.opened(tmp_path / "run", 1, 40)
    supervision.opened(tmp_path / "run", 1, 45)
    assert json.loads((tmp_path / supervision.RUN).read_text())["step"] == 40


def test_the_name_of_the_result_is_the_run_directorys() -> None:
    assert supervision.RESULT == rundir.RESULT


WORKER = """
import os, sys
from dptrain import supervision

supervision.die_with_launcher()
print(os.getpid(), flush=True)
os.read(0, 1)
"""


def worker(parent: str, folder: Path, script: str = WORKER) -> "subprocess.Popen[str]":
    """A shell, ``parent``'s, that starts a worker and says its process id."""
    line = shlex.join([sys.executable, "-c", script])
    env = dict(os.environ) | {supervision.FOLDER: str(folder)}
    return subprocess.Popen(
        ["bash", "-c", parent.format(line)], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def test_a_worker_ends_with_its_launcher(tmp_path: Path) -> None:
    with worker("{} <&0 & wait", tmp_path) as process:
        assert process.stdout is not None
        handle = os.pidfd_open(int(process.stdout.readline()))
        process.kill()
        assert process.stdout.read() == ""
    os.close(handle)


def test_a_worker_whose_launcher_is_gone_already_ends_at_once(short: list[str]) -> None:
    line = [sys.executable, "-c", WORKER]
    with Launcher(short.append) as starter:
        # An orphan's parent is the supervisor.
        assert starter.launch(Start(line, os.environ, 0)).code == -signal.SIGKILL
        assert starter.launch(shell(f"{shlex.join(line)}; exit $?")).code == 0
