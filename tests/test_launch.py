import os
import stat
import sys
from pathlib import Path

import pytest

from dptrain import launch
from dptrain.errors import LaunchError, UsageError
from dptrain.launch import Announced

HYDRA = {"PMI_RANK": "3", "PMI_SIZE": "8", "PMI_FD": "9", "HYDI_CONTROL_FD": "7", "MPI_LOCALRANKID": "3"}
PRRTE = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "4", "PMIX_RANK": "1"}
BATCH = {"SLURM_JOB_ID": "77", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}
STEP = BATCH | {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "3", "SLURM_PROCID": "2"}


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, Announced(None, None, "")),
        (HYDRA, Announced(3, 8, "hydra")),
        (PRRTE, Announced(1, 4, "openmpi")),
        ({"PMI_RANK": "0", "PMI_SIZE": "2"}, Announced(0, 2, "pmi")),
        ({"PMIX_RANK": "5"}, Announced(5, None, "pmix")),
        (STEP | {"PMIX_RANK": "2"}, Announced(2, 3, "pmix")),
        (STEP, Announced(2, 3, "srun")),
        ({**STEP, "SLURM_STEP_NUM_TASKS": ""}, Announced(2, 4, "srun")),
        (BATCH, Announced(None, None, "")),
        (BATCH | {"SLURM_STEP_ID": "4294967291", "SLURM_STEP_NUM_TASKS": "1"}, Announced(None, None, "")),
        (STEP | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, Announced(None, None, "")),
        (STEP | HYDRA, Announced(3, 8, "hydra")),
        (STEP | PRRTE, Announced(1, 4, "openmpi")),
        ({"PMI_RANK": "-1"}, Announced(None, None, "")),
        ({"PMI_RANK": "²"}, Announced(None, None, "")),
    ],
)
def test_what_a_launcher_announces(environ: dict[str, str], expected: Announced) -> None:
    assert launch.announced(environ) == expected


@pytest.mark.parametrize("environ", [HYDRA, PRRTE, BATCH, STEP])
def test_a_program_started_by_a_worker_is_none_itself(environ: dict[str, str]) -> None:
    assert launch.without_launcher(environ | {"PATH": "/bin", "OMPI_MCA_osc": "mine"}) == {
        "PATH": "/bin",
        "OMPI_MCA_osc": "mine",
    }


def test_alone_is_nobody_to_talk_to() -> None:
    assert Announced(None, None, "").alone
    assert Announced(0, 1, "hydra").alone
    assert not Announced(0, 2, "hydra").alone
    assert not Announced(0, None, "pmix").alone


@pytest.mark.parametrize(("launcher", "library"), [("hydra", "Open MPI"), ("openmpi", "MPICH")])
def test_the_launcher_of_another_mpi_is_refused(launcher: str, library: str) -> None:
    with pytest.raises(LaunchError, match=r"expected the mpirun of .* found the mpirun of .*dptrain run -n 8"):
        launch.refuse_mismatch(Announced(0, 8, launcher), library)


@pytest.mark.parametrize(
    ("launcher", "library"),
    [("hydra", "MPICH"), ("hydra", "Intel MPI"), ("openmpi", "Open MPI"), ("srun", "MPICH"), ("pmix", "Open MPI")],
)
def test_a_launcher_that_can_fit_is_not_refused(launcher: str, library: str) -> None:
    launch.refuse_mismatch(Announced(0, 8, launcher), library)


def test_a_world_of_another_size_is_refused() -> None:
    with pytest.raises(LaunchError, match="expected a world of 4 workers, as it announced, found one of 1; use `srun"):
        launch.refuse_size(Announced(0, 4, "srun"), 1)
    with pytest.raises(LaunchError, match="dptrain run -n 4"):
        launch.refuse_size(Announced(0, 4, "hydra"), 1)
    launch.refuse_size(Announced(0, 4, "hydra"), 4)
    launch.refuse_size(Announced(0, None, "pmix"), 4)


def test_a_batch_script_is_not_a_task() -> None:
    with pytest.raises(LaunchError, match=r"Slurm job 77: expected 4 workers.*srun dptrain"):
        launch.refuse_batch_shell(BATCH)
    launch.refuse_batch_shell(STEP)
    launch.refuse_batch_shell(BATCH | {"SLURM_NTASKS": "1"})
    launch.refuse_batch_shell({})


@pytest.mark.parametrize("n", [0, -1])
def test_a_count_below_one_is_refused(n: int) -> None:
    with pytest.raises(UsageError, match=f"expected at least 1 worker, found {n}"):
        launch.refuse_count(n, Announced(None, None, ""))


def test_a_count_that_contradicts_the_launcher_is_refused() -> None:
    with pytest.raises(UsageError, match="expected 8, as the launcher says, found 2"):
        launch.refuse_count(2, Announced(0, 8, "hydra"))
    launch.refuse_count(8, Announced(0, 8, "hydra"))


def fake_mpirun(folder: Path, says: str) -> str:
    folder.mkdir()
    path = folder / "mpirun"
    path.write_text(f"#!/bin/sh\necho '{says}'\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No mpirun beside Python, so that PATH alone decides."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bin" / "python"))
    return tmp_path


def test_the_mpirun_that_belongs_to_the_library_is_chosen(elsewhere: Path) -> None:
    mpich = fake_mpirun(elsewhere / "a", "HYDRA build details:")
    openmpi = fake_mpirun(elsewhere / "b", "mpirun (Open MPI) 5.0.11")
    environ = {"PATH": f"{elsewhere / 'a'}{os.pathsep}{elsewhere / 'b'}{os.pathsep}{elsewhere / 'none'}"}
    assert launch.mpirun_for("MPICH", environ) == mpich
    assert launch.mpirun_for("Open MPI", environ) == openmpi


def test_no_mpirun_names_what_to_install(elsewhere: Path) -> None:
    with pytest.raises(LaunchError, match=r"found none; pip install 'dptrain\[mpich\]'"):
        launch.mpirun_for("MPICH", {"PATH": ""})
    fake_mpirun(elsewhere / "a", "something else")
    with pytest.raises(LaunchError, match=r"a/mpirun \(unknown\)"):
        launch.mpirun_for("MPICH", {"PATH": str(elsewhere / "a")})


def test_what_each_mpi_needs_is_set_unless_the_environment_says_otherwise(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_mpirun(elsewhere / "a", "mpirun (Open MPI) 5.0.11")
    monkeypatch.setattr(launch, "library_version", lambda: ("Open MPI", "5.0.11"))
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    environ = {"PATH": str(elsewhere / "a"), "OMPI_MCA_osc": "mine"}
    argv, env = launch.command(3, ["run", "job.toml"], environ)
    assert argv == [
        str(elsewhere / "a" / "mpirun"),
        "--with-ft",
        "ulfm",
        "-n",
        "3",
        sys.executable,
        "-P",
        "-m",
        "dptrain",
        "run",
        "job.toml",
    ]
    assert env["OMPI_ALLOW_RUN_AS_ROOT"] == env["OMPI_ALLOW_RUN_AS_ROOT_CONFIRM"] == "1"
    assert env["PRTE_MCA_rmaps_default_mapping_policy"] == ":oversubscribe"
    assert env["OMPI_MCA_osc"] == "mine"
    assert env["OMPI_MCA_mpi_yield_when_idle"] == "1"
    assert "--with-ft" not in launch.command(3, ["run"], environ | {"DPTRAIN_FT": "off"})[0]
    assert launch.command(3, ["run"], environ, live=True)[0][1:5] == ["--with-ft", "ulfm", "--output", ":raw"]

    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    _, env = launch.command(2, ["run"], environ)
    assert "OMPI_ALLOW_RUN_AS_ROOT" not in env
    assert "OMPI_MCA_mpi_yield_when_idle" not in env


def test_an_open_mpi_of_before_has_other_options(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_mpirun(elsewhere / "a", "mpirun (Open MPI) 4.1.4")
    monkeypatch.setattr(launch, "library_version", lambda: ("Open MPI", "4.1.4"))
    assert launch.command(3, ["run"], {"PATH": str(elsewhere / "a")}, live=True)[0][1:3] == ["-n", "3"]


def test_mpich_needs_nothing(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_mpirun(elsewhere / "a", "HYDRA build details:")
    monkeypatch.setattr(launch, "library_version", lambda: ("MPICH", "5.0.2"))
    environ = {"PATH": str(elsewhere / "a")}
    argv, env = launch.command(2, ["run"], environ, live=True)
    assert argv[1:3] == ["-n", "2"]
    assert env == environ


def test_the_library_is_the_one_mpi4py_reports() -> None:
    import mpi4py

    # Open MPI would leave a file in /dev/shm.
    mpi4py.rc.initialize = False
    from mpi4py import MPI

    name, version = launch.library_version()
    assert (name, version) == (MPI.get_vendor()[0], ".".join(map(str, MPI.get_vendor()[1])))
