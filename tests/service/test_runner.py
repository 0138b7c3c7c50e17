"""What reaches a job's processes, and what is told of them."""

import os
from dataclasses import replace
from pathlib import Path

import pytest

from dptrain.service import keeper, runner
from dptrain.service.model import Job, Spec
from dptrain.service.runner import Alive, Ended, Limits, Lost, NeverBegun, Runner


@pytest.mark.parametrize(
    "name",
    [
        *(
            "OMPI_MCA_plm_ssh_agent",
            "PMIX_X",
            "PMI_RANK",
            "PRTE_MCA_x",
            "MPICH_X",
            "MPIR_CVAR_X",
            "HYDRA_LAUNCHER_EXEC",
        ),
        *("LD_PRELOAD", "LD_LIBRARY_PATH", "PYTHONPATH", "PYTHONSTARTUP", "PATH", "DPTRAIN_TOKEN", "GRPC_TRACE"),
        *("SLURM_JOB_ID", "ompi_x", "", "A=B", "A B", "1A", "A\0", "Ä"),
    ],
)
def test_what_no_job_may_set(name: str) -> None:
    assert not runner.permitted(name)
    assert runner.permitted("OPENBLAS_NUM_THREADS")
    assert runner.permitted("MY_OMPI_X")


def test_what_has_become_of_a_launch(tmp_path: Path) -> None:
    environ = {**os.environ, "DPTRAIN_TOKEN": "secret", "DPTRAIN_CACHE": str(tmp_path)}
    run = Runner(tmp_path / "jobs", Limits(), environ)
    assert "secret" not in run._environment.values()
    assert run._environment["DPTRAIN_CACHE"] == str(tmp_path)
    assert run.look("none", 1) == NeverBegun()
    # A job file that is none: its launch ends at once, with the code of a bad job.
    job = Job(id="a", owner="b", spec=Spec(job_toml="", run_toml="bad", name="c"), launch=1)
    sight = run.start(job, 1, 1)
    assert isinstance(sight, Alive)
    runner.reap(wait=True)
    os.close(sight.handle)
    assert run.look("a", 1) == Ended(2, 0)
    assert run.look("a", 2) == NeverBegun()
    assert [line["launch"] for line in keeper.begun(run.folder("a"))] == [1]
    assert (run.done("a"), run.trains("a", 1), run.newest_step("a"), run.placed("a")) == (False, False, 0, {})
    assert "valid TOML" in (run.folder("a") / keeper.LOG).read_text()
    # The same number again: nobody takes it up, and what is known stays.
    again = run.start(job, 1, 1)
    assert isinstance(again, Alive)
    runner.reap(wait=True)
    os.close(again.handle)
    assert run.look("a", 1) == Ended(2, 0)
    assert [line["launch"] for line in keeper.begun(run.folder("a"))] == [1]
    # As if it had been killed before it wrote down how it ended.
    last = run.start(replace(job, launch=2), 2, 1)
    assert isinstance(last, Alive)
    runner.reap(wait=True)
    os.close(last.handle)
    run.folder("a").joinpath(keeper.EXIT).unlink()
    assert run.look("a", 2) == Lost()
    run.remove("a")
    run.remove("a")
    assert run.look("a", 2) == NeverBegun()


def test_only_whole_checkpoints_count(tmp_path: Path) -> None:
    for name in ("step-7", "step-30", "step-x", ".part-9", "step-99"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        if name != "step-99":
            (tmp_path / "checkpoints" / name / "manifest.json").touch()
    assert [step for step, _ in runner.checkpoints(tmp_path)] == [7, 30]
    assert runner.checkpoints(tmp_path / "none") == []
