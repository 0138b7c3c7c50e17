"""The commands of the service, as processes, against a server that is one too."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.service.conftest import end_all
from tests.service.jobs import JOB, LONG, solo_hash

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("DPTRAIN_")}
    return {**kept, "XDG_CONFIG_HOME": str(tmp_path / "config"), "DPTRAIN_SERVER": f"unix:{tmp_path / 's'}"}


@pytest.fixture
def dptrain(tmp_path: Path, environ: dict[str, str]) -> Run:
    def run(*arguments: str, **more: str) -> "subprocess.CompletedProcess[str]":
        line = [sys.executable, "-m", "dptrain", *arguments]
        return subprocess.run(line, cwd=tmp_path, env=environ | more, capture_output=True, text=True, timeout=120)

    (tmp_path / "job.toml").write_text(JOB)
    (tmp_path / "long.toml").write_text(LONG)
    return run


@pytest.fixture
def served(tmp_path: Path, environ: dict[str, str]) -> Iterator[None]:
    line = [sys.executable, "-m", "dptrain", "serve", "--listen", f"unix:{tmp_path / 's'}", "--data", "data"]
    with (
        (tmp_path / "serve.log").open("wb") as log,
        subprocess.Popen(
            [*line, "--slots", "2"], cwd=tmp_path, env=environ, stdout=subprocess.PIPE, stderr=log, text=True
        ) as process,
    ):
        assert process.stdout is not None
        assert process.stdout.readline() == f"dptrain serves at unix:{tmp_path / 's'}\n"
        yield
        process.terminate()
        assert process.wait(60) == 0
    end_all(tmp_path / "data" / "jobs")
    lines = (tmp_path / "serve.log").read_text().splitlines()
    assert {"serving", "asked to stop"} <= {json.loads(line)["event"] for line in lines}


@pytest.mark.usefixtures("served")
def test_submit_follow_and_bring_home(dptrain: Run, tmp_path: Path, environ: dict[str, str]) -> None:
    followed = dptrain("submit", "job.toml", "-n", "1..2", "-f", "--label", "a=b")
    assert followed.returncode == 0, followed.stderr
    job = followed.stdout.split()[0]
    wanted = solo_hash(tmp_path)
    assert wanted in followed.stdout
    assert followed.stderr.endswith(f"job {job} succeeded: done\n")
    assert dptrain("wait", job[:5]).returncode == 0
    line = {"_DPTRAIN_COMPLETE": "complete_bash", "COMP_WORDS": f"dptrain show {job[:3]}", "COMP_CWORD": "2"}
    environ.update(line)
    completed = dptrain()
    assert (completed.returncode, completed.stdout.split()) == (0, [job]), completed.stderr
    for name in line:
        del environ[name]
    shown = json.loads(dptrain("show", "@latest", "-o", "json").stdout)
    assert (shown["id"], shown["result"]["weights_sha256"]) == (job, wanted)
    listed = json.loads(dptrain("jobs", "-a", "-o", "json", "--filter", "label.a=b").stdout)
    assert [entry["id"] for entry in listed] == [job]
    assert job in dptrain("jobs", "-a").stdout
    assert job not in dptrain("jobs").stdout
    lines = [json.loads(line) for line in dptrain("logs", job, "--tail", "1", "-o", "json").stdout.splitlines()]
    assert [("cursor" in line, line.get("state")) for line in lines] == [(True, None), (False, "JOB_STATE_SUCCEEDED")]
    assert "loss" in dptrain("metrics", job).stdout
    for words, found in (
        (f"dptrain compare home {job[:2]}", [job]),
        (f"dptrain show --server unix:{tmp_path / 's'} @", ["@latest"]),
        ("dptrain cancel --server 127.0.0.1:1 ", []),
    ):
        asked = {"COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
        completed = dptrain(_DPTRAIN_COMPLETE="complete_bash", **asked)
        assert completed.stdout.split() == found, completed.stderr
    assert dptrain("download", job, "home").stdout == "home\n"
    assert dptrain("eval", "home").returncode == 0
    compared = json.loads(dptrain("compare", "home", job[:6], "-o", "json").stdout)
    assert [run["run"] for run in compared["runs"]] == ["home", job]
    assert (compared["same_weights"], compared["differences"].keys() <= {"data.max_bytes", "output.runs"}) == (
        True,
        True,
    )
    assert dptrain("export", "@latest", "--format", "safetensors").stdout == "model.safetensors\n"
    assert (tmp_path / "model.safetensors").stat().st_size > 0
    assert json.loads(dptrain("delete", job, "-o", "json").stdout) == {"id": job}
    missing = dptrain("compare", "home", job)
    assert (missing.returncode, "job" in missing.stderr) == (2, True)
    assert "operator (admin)" in dptrain("cluster").stdout


@pytest.mark.usefixtures("served")
def test_ctrl_c_detaches_and_says_how_to_come_back(dptrain: Run, tmp_path: Path, environ: dict[str, str]) -> None:
    line = [sys.executable, "-m", "dptrain", "submit", "long.toml", "-f"]
    with subprocess.Popen(
        line, cwd=tmp_path, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        job = process.stdout.readline().strip()
        assert process.stdout.readline().startswith("name=tiny")
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=240)
    assert process.returncode == 130
    assert f"To come back: dptrain logs -f {job}" in said
    assert json.loads(dptrain("show", job, "-o", "json").stdout)["state"] == "JOB_STATE_RUNNING"
    assert "cancelling" in dptrain("cancel", job, "--grace", "0").stdout
    assert dptrain("wait", job).returncode == 1
    assert dptrain("logs", "-f", job).returncode == 1
    assert dptrain("retry", job).returncode == 0
    assert dptrain("cancel", job, "--grace", "0").returncode == 0


@pytest.mark.usefixtures("served")
def test_bad_input_is_code_2(dptrain: Run, tmp_path: Path) -> None:
    for arguments, said in (
        (["submit", "none.toml"], "no such file"),
        (["submit", "job.toml", "--set", "optimizer.lr=-1"], "optimizer.lr"),
        (["submit", "job.toml", "-n", "3"], "slots"),
        (["submit", "job.toml", "--set", "data.source='/etc/passwd'"], "data.source"),
        (["show", "zzz"], "job 'zzz'"),
        (["show", "\udcff"], "surrogates not allowed"),
        (["jobs", "--filter", "x"], "filter"),
        (["logs", "--since", "yesterday"], "--since"),
        (["logs", "--since", "9" * 40 + "d"], "--since"),
        (["submit", "job.toml", "--priority", "9" * 40], "Value out of range"),
        (["submit", "job.toml", "--max-seconds", "inf"], "--max-seconds"),
    ):
        done = dptrain(*arguments)
        assert (done.returncode, said in done.stderr) == (2, True), (arguments, done.stderr)
    assert dptrain("submit", "job.toml", "--dry-run").returncode == 0
    assert dptrain("jobs", "-a", "-o", "json").stdout.strip() == "[]"


@pytest.mark.usefixtures("served")
def test_health_is_told_to_whoever_has_a_token(dptrain: Run, tmp_path: Path) -> None:
    tokens = ["--tokens", "data/tokens.json", "--out", "node.token"]
    assert dptrain("token", "create", "node", "--role", "worker", *tokens).returncode == 0
    done = dptrain("health", "--token-file", "node.token")
    assert (done.returncode, done.stdout) == (0, f"unix:{tmp_path / 's'} serves\n")
    assert dptrain("health", DPTRAIN_TOKEN="dptrain_no-such").returncode == 2


def test_no_server_has_no_health(dptrain: Run) -> None:
    done = dptrain("health")
    assert done.returncode == 3
    assert "see whether it runs" in done.stderr


def test_no_server_is_code_3(dptrain: Run) -> None:
    done = dptrain("jobs")
    assert done.returncode == 3
    assert "see whether it runs" in done.stderr
