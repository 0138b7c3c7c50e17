"""A run that is begun under MPI, gone on with by parameter servers, and ended under MPI, or the other way round."""

import json
import signal
from pathlib import Path

import pytest

from tests.faults import jobs
from tests.faults.live import step_of, until
from tests.faults.oracle import PROGRAM, Command, Surroundings, undisturbed

JOB = jobs.JOBS[2].of(500).text
TOP_K = '\n[arithmetic]\ngradients = "top_k"\ntop_k = 0.05\n'
"""The shards' residuals have to come along too, to other workers and through the checkpoint."""

MPI = ["-n", "3"]
SERVERS = ["-n", "2", "--exchange", "ps", "--servers", "2"]


@pytest.mark.parametrize(
    "ways",
    [
        pytest.param([MPI, SERVERS, MPI], id="MPI"),
        pytest.param([SERVERS, MPI, SERVERS], id="servers", marks=pytest.mark.long),
    ],
)
@pytest.mark.parametrize(
    "text", [pytest.param(JOB, id="float32"), pytest.param(JOB + TOP_K, id="top_k", marks=pytest.mark.long)]
)
def test_a_run_goes_on_by_another_way_to_the_same_bits(text: str, ways: list[list[str]], tmp_path: Path) -> None:
    place = Surroundings(tmp_path)
    (tmp_path / "job.toml").write_text(text)
    reached = 0
    for number, way in enumerate(ways):
        line = [*PROGRAM, "run", "job.toml", *way, "--run-dir", "run", "--progress", "none"]
        command = place.start(line + ["--resume"] * (number > 0))
        if number < len(ways) - 1:
            assert _reaches(tmp_path, reached + 40, command)
            command.process.send_signal(signal.SIGTERM)
        ended = place.ended(command, 120)
        assert ended.code == 0, ended.said
        result = json.loads((tmp_path / "run" / "result.json").read_text())
        assert result["state"] == ("stopped" if number < len(ways) - 1 else "done")
        assert (result["exchange"] == "ps") == (way is SERVERS)
        reached = result["steps"]
    assert result["weights_sha256"] == undisturbed(text).weights_sha256
    assert place.leftovers() == []


def _reaches(folder: Path, step: int, command: Command) -> bool:
    run = folder / "run"
    return until(lambda: step_of(run) >= step or not command.running, 120, nap=0.01) and command.running
