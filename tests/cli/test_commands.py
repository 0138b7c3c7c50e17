import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dptrain.cli.doctor import size
from tests.cli.conftest import PROGRAM, Program, weights

CLOSING = re.compile(
    r"^steps=\d+ epochs=\d\S* loss=\d\S* accuracy=0\.\d+ samples/s=\d+ weights sha256:[0-9a-f]{64}$", re.MULTILINE
)


def test_importing_the_entry_point_loads_nothing_heavy() -> None:
    code = "import sys, dptrain.cli.main; print(*{name.split('.')[0] for name in sys.modules})"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "dptrain" in out
    assert not {"numpy", "typer", "rich", "pydantic", "mpi4py"} & set(out)


def test_version_and_help(dptrain: Program) -> None:
    assert re.fullmatch(r"dptrain \d+\.\d+\.\d+\S*\n", dptrain("--version").stdout)
    shown = dptrain("--help")
    assert shown.returncode == 0
    for command in ("run", "check", "init", "eval", "predict", "doctor"):
        assert f" {command} " in shown.stdout
    assert "mpirun -n 8 dptrain" in shown.stdout


@pytest.mark.parametrize("arguments", [["run", "--bogus"], ["bogus"], ["predict"], ["run", "--progress", "much"]])
def test_a_wrong_command_line_ends_with_2(dptrain: Program, arguments: list[str]) -> None:
    done = dptrain(*arguments)
    assert done.returncode == 2
    assert "Usage" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["run", "none.toml"], "job file none.toml: expected a TOML file, found no such file; "),
        (["--set", "optimizer.lr=nan"], "--set optimizer.lr"),
        (["check", "--set", "train.shardz=2"], "did you mean 'shards'?"),
        (["run", "-n", "0"], "-n: expected at least 1 worker, found 0; "),
        (["eval", "nowhere"], "nowhere"),
        (["predict", "nowhere", "--data", "x.npy", "--out", "y.npy"], "nowhere"),
    ],
)
def test_bad_input_is_one_line_and_code_2(dptrain: Program, arguments: list[str], told: str) -> None:
    done = dptrain(*arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("dptrain: ")
    assert told in done.stderr


def test_a_traceback_is_shown_when_asked_for(dptrain: Program) -> None:
    done = dptrain("run", "none.toml", DPTRAIN_TRACEBACK="1")
    assert done.returncode == 2
    assert "Traceback" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("dptrain: job file")


def test_a_batch_script_that_starts_one_process_is_refused(dptrain: Program) -> None:
    slurm = {"SLURM_JOB_ID": "5", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}
    done = dptrain(**slurm)
    assert done.returncode == 2
    assert "srun" in done.stderr
    assert dptrain("--set", "train.epochs=1", "-n", "1", **slurm).returncode == 0


def test_plain_dptrain_trains_the_embedded_job(dptrain: Program, tmp_path: Path) -> None:
    done = dptrain()
    assert (done.returncode, done.stderr) == (0, "")
    assert CLOSING.search(done.stdout), done.stdout
    assert re.search(r"^step=\d+ epoch=\S+ loss=\S+ lr=\S+ samples/s=\d+ validation", done.stdout, re.MULTILINE)
    (run,) = (tmp_path / "runs").iterdir()
    result = json.loads((run / "result.json").read_text())
    assert result["weights_sha256"] == "sha256:" + weights(done.stdout)
    assert result["state"] == "done"
    assert f"try: dptrain eval runs/{run.name}" in done.stdout


def test_plain_dptrain_takes_the_job_of_its_folder(dptrain: Program, tmp_path: Path) -> None:
    assert dptrain("init").returncode == 0
    text = (tmp_path / "dptrain.toml").read_text()
    (tmp_path / "dptrain.toml").write_text(text.replace('name = "digits"', 'name = "mine"'))
    done = dptrain("--progress", "none")
    assert done.returncode == 0, done.stderr
    assert [run.name.startswith("mine-") for run in (tmp_path / "runs").iterdir()] == [True]
    assert done.stdout.count("\n") == 2
    again = dptrain("init")
    assert again.returncode == 2
    assert "--force" in again.stderr


def test_the_command_line_is_over_the_environment(dptrain: Program, tmp_path: Path) -> None:
    done = dptrain("run", "--set", "train.steps=3", "--run-dir", "a", DPTRAIN_TRAIN__EPOCHS="1")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "a/result.json").read_text())["steps"] == 3
    taken = dptrain("run", "--run-dir", "a")
    assert taken.returncode == 2
    assert "--resume" in taken.stderr


def test_a_run_is_measured_and_applied(dptrain: Program, tmp_path: Path) -> None:
    assert dptrain("run", "--run-dir", "a", "--progress", "none", DPTRAIN_TRAIN__EPOCHS="15").returncode == 0
    measured = dptrain("eval", "a", "--json")
    assert measured.returncode == 0, measured.stderr
    figures = json.loads(measured.stdout)
    assert figures["accuracy"] == json.loads((tmp_path / "a/result.json").read_text())["metrics"]["test"]["accuracy"]
    assert f"accuracy={figures['accuracy']:.4g}" in dptrain("eval", "a").stdout

    with np.load(Path(sys.modules["dptrain"].__file__ or "").parent / "data/embedded/digits.npz") as digits:
        images, labels = digits["images"].reshape(-1, 64), digits["labels"]
    np.save(tmp_path / "x.npy", images[:200])
    done = dptrain("predict", "a", "--data", "x.npy", "--out", "y.npy", "--classes")
    assert done.returncode == 0, done.stderr
    classes = np.load(tmp_path / "y.npy")
    assert classes.shape == (200,)
    assert (classes.astype(np.int64) == labels[:200]).mean() > 0.9
    assert dptrain("predict", "a", "--data", "x.npy", "--out", "z.npy").returncode == 0
    outputs = np.load(tmp_path / "z.npy")
    assert outputs.shape == (200, 10)
    assert (outputs.argmax(axis=1) == classes.astype(np.int64)).all()
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_file_that_is_no_npy_is_refused(dptrain: Program, tmp_path: Path) -> None:
    assert dptrain("run", "--run-dir", "a", "--set", "train.steps=1").returncode == 0
    for content in (b"", b"x,y\n1,2\n", b"\x93NUMPY\x01\x00v\x00{'descr': '<f8', 'fort"):
        (tmp_path / "x.npy").write_bytes(content)
        done = dptrain("predict", "a", "--data", "x.npy", "--out", "y.npy")
        assert done.returncode == 2, content
        assert done.stderr.startswith("dptrain: x.npy: expected ")
        assert done.stderr.count("\n") == 1
        assert not (tmp_path / "y.npy").exists()


def test_check_shows_the_job_and_trains_nothing(dptrain: Program, tmp_path: Path) -> None:
    done = dptrain("check", "--set", "train.shards=4", "--set", "train.batch_size=64")
    assert done.returncode == 0, done.stderr
    assert "shards = 4" in done.stdout
    # 64*256+256, 256*128+128, 128*10+10, and their sum.
    for count in ("16,640", "32,896", "1,290", "50,826"):
        assert count in done.stdout
    assert re.search(r"^memory: \d\S* MiB for one worker alone \(", done.stdout, re.MULTILINE)
    assert re.search(r"^shards: 4 of 16 rows: [\d,]+ rows/s in one worker, \d+% of what", done.stdout, re.MULTILINE)
    assert not (tmp_path / "runs").exists()


def test_check_plans_for_more_workers_than_shards(dptrain: Program) -> None:
    done = dptrain("check", "--set", "train.shards=4", "-n", "6")
    assert done.returncode == 0, done.stderr
    assert "for each of 6 workers" in done.stdout
    assert "of 6 workers 2 would stand by, train.shards changes that" in done.stdout


def test_doctor_reports_and_its_code_says_whether_a_run_can_start(dptrain: Program, tmp_path: Path) -> None:
    good = dptrain("doctor", "--json", PATH=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    report = json.loads(good.stdout)
    assert good.returncode == int(any(problem["stops"] for problem in report["problems"]))
    assert report["facts"]["numpy"] == np.__version__
    assert "mpi library" in report["facts"]

    # An mpirun of nobody's first on PATH stops `mpirun -n 8 dptrain`.
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/mpirun").write_text("#!/bin/sh\necho none\n")
    (tmp_path / "bin/mpirun").chmod(0o755)
    bad = dptrain("doctor", PATH=f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    assert bad.returncode == 1
    assert re.search(r"^STOP  mpirun on PATH .*\n.*does not belong to.*\n.*cure: ", bad.stdout, re.MULTILINE)


def test_a_run_goes_on_when_its_reader_leaves(tmp_path: Path, env: dict[str, str]) -> None:
    with subprocess.Popen(
        [*PROGRAM, "run", "--run-dir", "a"],
        cwd=tmp_path,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        told = process.stderr.read()
    assert (process.returncode, told) == (0, "")
    assert json.loads((tmp_path / "a/result.json").read_text())["state"] == "done"


def test_a_stopped_run_goes_on_to_the_same_weights(dptrain: Program, tmp_path: Path, env: dict[str, str]) -> None:
    job = ["--set", "train.epochs=15", "--progress", "plain", "--set", "output.journal_steps=1"]
    whole = dptrain("run", *job, "--run-dir", "whole")
    with subprocess.Popen(
        [*PROGRAM, "run", *job, "--run-dir", "cut"], cwd=tmp_path, env=env, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("step="):
                break
        process.send_signal(signal.SIGTERM)
        rest = process.stdout.read()
    assert process.returncode == 0
    told = re.search(r"stopped at step \d+; to resume: dptrain (run .* --run-dir cut --resume)\n", rest)
    assert told, rest
    resumed = dptrain(*told[1].split())
    assert resumed.returncode == 0, resumed.stderr
    assert weights(resumed.stdout) == weights(whole.stdout)


@pytest.mark.parametrize(("count", "text"), [(0, "0 B"), (1536, "1.5 KiB"), (1 << 20, "1 MiB"), (3 << 40, "3 TiB")])
def test_sizes(count: int, text: str) -> None:
    assert size(count) == text
