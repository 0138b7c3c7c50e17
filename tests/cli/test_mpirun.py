import os
import re
import signal
import struct
import subprocess
import termios
from collections.abc import Iterator
from fcntl import ioctl
from pathlib import Path

import pytest

from dptrain import launch
from tests.cli.conftest import PROGRAM, Program, weights

BAR = "\x1b[2K"


def mpirun(env: dict[str, str], workers: int) -> list[str]:
    return [launch.mpirun_for(launch.library(), env), "-n", str(workers)]


@pytest.mark.parametrize(
    ("arguments", "code", "out", "err"),
    [
        (["--help"], 0, "Usage", ""),
        (["--version"], 0, "dptrain ", ""),
        (["check"], 0, "[train]", ""),
        (["run", "none.toml"], 2, "", "rank 0: job file none.toml: expected"),
        (["run", "--bogus"], 2, "", "No such option"),
        (["run", "-n", "2"], 2, "", "rank 0: -n: expected 3, as the launcher says, found 2"),
    ],
)
def test_rank_0_speaks_for_all_and_all_end(
    dptrain: Program, arguments: list[str], code: int, out: str, err: str
) -> None:
    done = dptrain(*arguments, workers=3)
    assert done.returncode == code, done.stderr
    assert done.stdout.count(out) == 1 if out else done.stdout.strip() == ""
    assert done.stderr.count(err) == 1 if err else done.stderr == ""


def test_any_way_to_start_gives_the_same_weights(dptrain: Program) -> None:
    alone = dptrain("run")
    started = dptrain("run", "-n", "2")
    under = dptrain("run", workers=3)
    other = dptrain("run", "--set", "seed=1")
    for done in (alone, started, under, other):
        assert done.returncode == 0, done.stderr
    assert weights(alone.stdout) == weights(started.stdout) == weights(under.stdout)
    assert weights(other.stdout) != weights(alone.stdout)
    assert "workers=2 " in started.stdout
    assert "workers=3 " in under.stdout
    assert "\x1b" not in under.stdout + started.stdout


def test_the_bar_can_be_forced_into_a_pipe(dptrain: Program) -> None:
    done = dptrain("run", "-n", "2", "--progress", "bar")
    assert done.returncode == 0, done.stderr
    assert BAR in done.stdout
    assert weights(done.stdout)


def test_a_launcher_of_another_mpi_is_refused_before_mpi_starts(dptrain: Program) -> None:
    if launch.library() == "Open MPI":
        other = {"PMI_RANK": "0", "PMI_SIZE": "2", "MPI_LOCALRANKID": "0"}
        rank = "PMI_RANK"
    else:
        other = {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2"}
        rank = "OMPI_COMM_WORLD_RANK"
    first = dptrain(**other)
    assert first.returncode == 2
    assert first.stderr.startswith("dptrain: rank 0: mpirun: expected the mpirun of ")
    assert first.stderr.count("\n") == 1
    second = dptrain(**other | {rank: "1"})
    assert (second.returncode, second.stdout, second.stderr) == (2, "", "")


@pytest.mark.skipif(launch.library() == "Open MPI", reason="Open MPI itself refuses srun without PMIx")
def test_a_world_that_is_not_the_announced_one_is_refused(dptrain: Program) -> None:
    done = dptrain(SLURM_STEP_ID="0", SLURM_STEP_NUM_TASKS="4", SLURM_PROCID="0")
    assert done.returncode == 2
    assert "expected a world of 4 workers, as it announced, found one of 1" in done.stderr
    assert "srun --mpi=" in done.stderr


@pytest.fixture
def terminal() -> Iterator[tuple[int, int]]:
    """Both ends of a terminal of 90 columns."""
    ours, theirs = os.openpty()
    ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 90, 0, 0))
    yield ours, theirs
    os.close(ours)


def read_all(ours: int) -> str:
    parts = []
    while True:
        try:
            part = os.read(ours, 1 << 16)
        except OSError:
            break
        if not part:
            break
        parts.append(part)
    return b"".join(parts).decode()


@pytest.mark.parametrize("how", ["alone", "-n", "mpirun"])
def test_the_launchers_terminal_gets_the_bar(
    how: str, terminal: tuple[int, int], tmp_path: Path, env: dict[str, str]
) -> None:
    ours, theirs = terminal
    before = [*mpirun(env, 2), *PROGRAM] if how == "mpirun" else PROGRAM
    after = ["-n", "2"] if how == "-n" else []
    env.pop("COLUMNS")
    with subprocess.Popen(
        [*before, "run", *after], cwd=tmp_path, env=env | {"TERM": "xterm-256color"}, stdout=theirs, stdin=theirs
    ) as process:
        os.close(theirs)
        shown = read_all(ours)
    assert process.returncode == 0, shown
    assert BAR in shown
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown)
    drawn = [line for line in re.split(r"[\r\n]+", plain) if "loss=" in line and "━" in line]
    assert drawn
    assert max(len(line) for line in drawn) == 89
    assert shown.rfind("\x1b[?25h") > shown.rfind("\x1b[?25l") > 0
    assert weights(plain)


def test_a_request_to_stop_reaches_the_workers(dptrain: Program, tmp_path: Path, env: dict[str, str]) -> None:
    # A schedule whose length follows from the training's would make more steps another job.
    keys = ["train.epochs=200", "output.journal_steps=1", "optimizer.schedule.type=constant"]
    job = [*(word for key in keys for word in ("--set", key)), "--run-dir", "cut"]
    with subprocess.Popen(
        [*PROGRAM, "run", "-n", "2", *job],
        cwd=tmp_path,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("step="):
                break
        # As Ctrl-C in a terminal does.
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    told = re.search(r"stopped at step (\d+); to resume: dptrain run .* -n 2 --run-dir cut --resume\n", out)
    assert told, out
    resumed = dptrain("run", *job, "--resume", "--set", f"train.steps={int(told[1]) + 5}")
    assert resumed.returncode == 0, resumed.stderr
    assert f"resumed_at={told[1]}" in resumed.stdout


def test_a_module_of_the_working_folder_shadows_nothing(dptrain: Program, tmp_path: Path) -> None:
    (tmp_path / "numpy.py").write_text("raise SystemExit('shadowed')\n")
    done = dptrain("run", "-n", "2", "--progress", "none")
    assert done.returncode == 0, done.stderr


LARGE = """
[data]
source = "digits"
[model]
layers = [
  { type = "linear", units = 4096 },
  { type = "relu" },
  { type = "linear", units = 2048 },
  { type = "relu" },
  { type = "linear", units = 10 },
]
[train]
steps = 1
shards = 2
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount")
@pytest.mark.parametrize("exchange", ["node", pytest.param("ps", marks=pytest.mark.long)])
def test_what_containers_have_of_dev_shm_is_enough(
    exchange: str, dptrain: Program, env: dict[str, str], tmp_path: Path
) -> None:
    """64 MB, and 35 MB of weights, of which two workers keep several times that: it lies elsewhere."""
    (tmp_path / "job.toml").write_text(LARGE)
    truth = weights(dptrain("run", "job.toml", "--run-dir", "solo").stdout)
    small = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs -o size=64m tmpfs /dev/shm && exec "$@"', "sh"]
    line = [*small, *PROGRAM, "run", "job.toml", "-n", "2", "--exchange", exchange, "--run-dir", "run"]
    done = subprocess.run(line, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert weights(done.stdout) == truth
