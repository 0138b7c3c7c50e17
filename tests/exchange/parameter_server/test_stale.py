"""Gradients that may be late: how late is measured and bounded; the order in which they came replays to the bits."""

import json
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from dptrain.cli.main import main
from dptrain.errors import LaunchError, ReplayError, StorageError, UsageError
from dptrain.job.load import load_job
from dptrain.replay import replay
from dptrain.training import run
from tests.exchange.parameter_server.running import Cluster
from tests.exchange.parameter_server.test_elastic import Run, folder

__all__ = ["folder"]

SETS = ("train.steps=60", "train.evaluate_steps=20", "optimizer.momentum=0.0", "exchange.type=ps")


def cluster(path: Path, *sets: str, servers: int = 1) -> Cluster:
    return Cluster(load_job(None, [*SETS, *sets], {}), path, servers)


def logged(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "arrivals.jsonl").read_text().splitlines()]


def test_no_staleness_is_sync_bit_for_bit(tmp_path: Path) -> None:
    solo = run(load_job(None, [*SETS, "exchange.type=solo"], {}), run_dir=tmp_path / "solo")
    none = cluster(tmp_path, "exchange.mode=ssp", "exchange.staleness=0", "exchange.staleness_lr=inverse").train(2)
    assert none.weights_sha256 == solo.weights_sha256
    assert none.same_bits
    assert none.staleness is None
    assert not (tmp_path / "run" / "arrivals.jsonl").exists()
    with pytest.raises(UsageError, match="decided nothing"):
        replay(tmp_path / "run")


@pytest.mark.parametrize(
    ("sets", "servers"),
    [
        (("exchange.mode=async",), 1),
        (("exchange.mode=ssp", "exchange.staleness=1", "optimizer.clip_norm=1.0", "train.result=best"), 1),
        (("exchange.mode=async", "exchange.staleness_lr=inverse", "arithmetic.gradients=bfloat16"), 2),
    ],
)
def test_the_order_of_arrival_replays_to_the_same_weights(sets: tuple[str, ...], servers: int, tmp_path: Path) -> None:
    result = cluster(tmp_path, *sets, servers=servers).train(3)
    assert replay(tmp_path / "run")["weights_sha256"] == result.weights_sha256
    assert not result.same_bits
    late = result.staleness
    assert late is not None
    # Every update is in the log, in the journal and in the result, with the same staleness.
    log = logged(tmp_path / "run")
    assert [line["step"] for line in log] == list(range(1, 61))
    assert sorted(line["batch"] for line in log) == list(range(60))
    counted: dict[str, int] = {}
    for line in map(json.loads, (tmp_path / "run" / "journal.jsonl").read_text().splitlines()):
        for age, count in line.get("staleness", {}).items():
            counted[age] = counted.get(age, 0) + count
    ages = [line["staleness"] for line in log]
    assert counted == late["updates"] == {str(age): ages.count(age) for age in sorted(set(ages))}
    assert late["max"] == max(ages) > 0
    assert late["bound"] is None or late["max"] <= late["bound"]
    assert sum(one["shards_computed"] > 0 for one in result.per_worker) > 1


def test_a_spoilt_log_does_not_pass(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cluster(tmp_path, "exchange.mode=async", "train.steps=12", "train.evaluate_steps=0").train(2)
    path = tmp_path / "run" / "arrivals.jsonl"
    log = logged(tmp_path / "run")
    # As a log it could be true, but it is not this run's.
    log[3]["batch"], log[4]["batch"] = log[4]["batch"], log[3]["batch"]
    path.write_text("".join(json.dumps(line) + "\n" for line in log))
    with pytest.raises(ReplayError, match=r"after 12 steps, found sha256:.* after 12; the log"):
        replay(tmp_path / "run")
    path.write_text("".join(json.dumps(line) + "\n" for line in log[:-1]))
    with pytest.raises(StorageError, match=r"arrivals.jsonl, step 12: .*no line of it"):
        replay(tmp_path / "run")
    with pytest.raises(SystemExit) as left:
        main(["replay", str(tmp_path / "run")])
    assert left.value.code == 2
    assert "no line of it" in capsys.readouterr().err


def test_without_a_parameter_server_there_is_no_such_mode(tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match="a parameter server"):
        run(load_job(None, ["exchange.mode=async"], {}), run_dir=tmp_path / "run")


@pytest.mark.long
def test_workers_stopped_killed_and_added_and_a_run_gone_on_with(folder: Path) -> None:
    sets = ("exchange.mode=ssp", "exchange.staleness=2", "exchange.lease_seconds=2", "train.steps=1000000")
    options = [word for each in sets for word in ("--set", each)]
    run = Run(folder, "-n", "3", *options)
    _take_part(run, 3)
    stopped, killed, _ = run.children("worker")
    stopped.send_signal(signal.SIGSTOP)
    with suppress(psutil.Error):
        killed.kill()
    # Those that were started instead of it.
    _take_part(run, 4)
    with suppress(psutil.Error):
        stopped.send_signal(signal.SIGCONT)
    first = _stopped(run)
    again = Run(folder, "-n", "2", "--standby", "--resume", *options)
    again.reach(first["steps"] + 100)
    next(server for server in again.children("param-server") if "--standby-of" not in server.cmdline()).kill()
    again.reach(again.step + 100)
    result = _stopped(again)
    assert result["steps"] > first["steps"] + 100
    assert result["staleness"]["max"] <= 2
    assert sum(result["staleness"]["updates"].values()) == result["steps"]
    log = logged(run.dir)
    assert max(line["staleness"] for line in log) <= 2
    # Those that run ahead wait for who is stopped, until it is taken for dead: no batch is left far behind.
    assert max(line["step"] - line["batch"] for line in log) <= 10


def _stopped(run: Run) -> dict[str, Any]:
    """The result of a run that is told to stop, and whose log replays."""
    run.process.send_signal(signal.SIGTERM)
    code, said = run.end()
    assert code == 0, said
    assert run.result["state"] == "stopped"
    replay(run.dir)
    return run.result


def _take_part(run: Run, count: int) -> None:
    """Return when so many workers have brought something."""
    while run.process.poll() is None:
        with suppress(OSError, ValueError):
            if len({part[3] for line in logged(run.dir) for part in line["parts"]}) >= count:
                return
        time.sleep(0.1)
