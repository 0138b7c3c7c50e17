"""launch/slurm.sbatch under a Slurm of this machine alone."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dptrain import rundir
from dptrain.errors import StorageError
from dptrain.launch import library
from tests.cluster.slurm import missing, slurm
from tests.faults.live import until
from tests.service.jobs import JOB, solo_hash

SCRIPT = Path(__file__).resolve().parents[2] / "launch" / "slurm.sbatch"
LONG = JOB.replace("steps = 30", "steps = 3000")

pytestmark = pytest.mark.skipif(missing() != "", reason=missing() or "Slurm can be started")


@pytest.fixture
def environ(tmp_path: Path) -> Iterator[dict[str, str]]:
    (tmp_path / "slurm").mkdir()
    with slurm(tmp_path / "slurm") as found:
        kept = {name: value for name, value in found.items() if not name.startswith("DPTRAIN_")}
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        ours = {"MPI": "pmix" if library() == "Open MPI" else "pmi2", "RUN": "run", "PATH": path}
        yield kept | ours | {"OMPI_MCA_mpi_yield_when_idle": "1"}


def said(environ: dict[str, str], folder: Path, *line: str) -> str:
    done = subprocess.run(line, cwd=folder, env=environ, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def begin(environ: dict[str, str], folder: Path, text: str) -> str:
    (folder / "job.toml").write_text(text)
    words = ["--parsable", "--ntasks", "3", "--output", "said", str(SCRIPT), "job.toml"]
    return said(environ, folder, "sbatch", *words).strip()


def state(environ: dict[str, str], folder: Path, job: str) -> str:
    return said(environ, folder, "scontrol", "--oneliner", "show", "job", job)


def test_syntax() -> None:
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True, timeout=10)


@pytest.mark.long
def test_a_run_that_is_asked_writes_a_checkpoint_and_queues_again(environ: dict[str, str], tmp_path: Path) -> None:
    job = begin(environ, tmp_path, LONG)
    journal = tmp_path / "run" / rundir.JOURNAL
    assert until(lambda: journal.exists() and journal.stat().st_size > 2000, 180, nap=0.05), (
        tmp_path / "said"
    ).read_text()
    said(environ, tmp_path, "scancel", "--signal=USR1", job)
    printed = tmp_path / "said"
    assert until(lambda: "it queues again (start 1)" in printed.read_text(), 180, nap=0.1), printed.read_text()

    # It begins when Slurm's credential of the first start is over, and not before: it would be refused.
    def done() -> bool:
        try:
            return bool(rundir.read_json(tmp_path / "run" / rundir.RESULT)["state"] == "done")
        except StorageError:
            return False

    assert until(done, 180, nap=0.2), printed.read_text()
    result = json.loads((tmp_path / "run" / rundir.RESULT).read_text())
    assert (result["workers"], result["weights_sha256"]) == (3, solo_hash(tmp_path, LONG))


def test_workers_that_each_believe_to_be_alone_are_refused(environ: dict[str, str], tmp_path: Path) -> None:
    job = begin({**environ, "MPI": "none"}, tmp_path, JOB)

    assert until(lambda: "JobState=FAILED" in state(environ, tmp_path, job), 180, nap=0.2)
    assert "expected a world of 3 workers, as it announced, found one of 1" in (tmp_path / "said").read_text()
    assert not (tmp_path / "run" / rundir.RESULT).exists()
