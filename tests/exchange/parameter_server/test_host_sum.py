"""Processes of one host that send one sum to a parameter server, held to solo's hash."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from dptrain.board import PID
from dptrain.errors import WorkerCrashed
from dptrain.exchange.parameter_server.several import Several
from dptrain.job.load import check, complete, load_job
from dptrain.processes import process
from dptrain.training import run
from tests.exchange.parameter_server.running import Cluster
from tests.exchange.parameter_server.test_run import CONTENT, job


@pytest.fixture(scope="module")
def solo(tmp_path_factory: pytest.TempPathFactory) -> str:
    return run(job(), run_dir=tmp_path_factory.mktemp("solo") / "run").weights_sha256


@pytest.mark.parametrize("processes", [2, 3])
def test_a_host_of_several_processes_gives_solo_s_hash(processes: int, solo: str, tmp_path: Path) -> None:
    cluster = Cluster(job(), tmp_path)
    result = cluster.train(ready=lambda: cluster.worker(processes=processes))
    assert result.weights_sha256 == solo
    assert cluster.codes == [0]
    assert result.workers == processes
    (member,) = result.per_worker[1:]
    parts = member["processes"]
    assert [part["process"] for part in parts] == list(range(processes))
    assert sum(part["shards_computed"] for part in parts) == member["shards_computed"] == 12 * 8
    assert all(part["shards_computed"] and part["rows_read"] for part in parts)
    assert all(part["starts"] == 1 and part["wait_seconds"] >= 0 for part in parts)


def test_a_process_of_a_host_that_is_killed_is_no_matter_of_the_server_s(
    solo: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = Cluster(job(), tmp_path)
    kills = []
    partials = Several.partials

    def killing(self: Several, step: int, lo: int, hi: int) -> object:
        if step == 4 and not kills:
            kills.append(self._placed.signs[1][PID])
            os.kill(kills[0], signal.SIGKILL)
        return partials(self, step, lo, hi)

    monkeypatch.setattr(Several, "partials", killing)
    result = cluster.train(ready=lambda: cluster.worker(processes=2))
    assert result.weights_sha256 == solo
    assert len(kills) == 1
    assert cluster.codes == [0]
    assert len(result.per_worker) == 2
    assert not process(kills[0])


def test_an_exception_in_a_process_of_a_host_fails_the_job_with_its_line(tmp_path: Path) -> None:
    marker = tmp_path / "now"
    (tmp_path / "own.py").write_text(
        "import os, sys\n"
        "class Model:\n"
        "    def parameters(self, rng):\n"
        "        return {'W': 0.1 * rng.standard_normal((64, 10))}\n"
        "    def forward(self, params, x, rng):\n"
        f"        if sys.argv[0].endswith('companion.py') and os.path.exists({str(marker)!r}):\n"
        "            raise ValueError('no such thing')\n"
        "        return x @ params['W'], lambda dy: {'W': x.T @ dy}\n"
    )
    content = {**CONTENT, "model": {"layers": [], "python": "own.py:Model"}}
    wanted = replace(complete(check(content, "")), directory=str(tmp_path))
    cluster = Cluster(wanted, tmp_path)

    class Marking:
        """Has the model fail from the second step on."""

        def started(self, info: object) -> None: ...

        def progressed(self, line: object) -> None:
            marker.touch()

        def warned(self, text: str) -> None: ...

        def recovered(self, recovery: object) -> None: ...

        def finished(self, result: object) -> None: ...

        def close(self) -> None: ...

    cluster.job = replace(cluster.job, output=replace(cluster.job.output, journal_steps=1))
    with pytest.raises(
        WorkerCrashed, match=r"worker 1, process 1 at step \d+ in forward and backward: .*no such thing"
    ):
        cluster.train(ready=lambda: cluster.worker(processes=2), observer=Marking())


@pytest.mark.parametrize("host_sum", ["true", "false"])
def test_run_adds_up_on_the_host_unless_it_is_told_not_to(host_sum: str, tmp_path: Path) -> None:
    line = [sys.executable, "-P", "-m", "dptrain", "run", "-n", "2", "--exchange", "ps", "--run-dir", "run"]
    sets = ["train.steps=12", f"exchange.host_sum={host_sum}"]
    asked = [*line, *(part for one in sets for part in ("--set", one))]
    done = subprocess.run(asked, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    alone = run(load_job(None, ["train.steps=12"], {}), run_dir=tmp_path / "alone")
    assert result["weights_sha256"] == alone.weights_sha256
    members = [member for member in result["per_worker"] if member["rank"]]
    if host_sum == "true":
        assert result["workers"] == 2
        assert [len(member["processes"]) for member in members] == [2]
    else:
        # The second may have come too late for twelve steps.
        assert members
        assert not any("processes" in member for member in members)
