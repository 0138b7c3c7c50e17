"""A Slurm of one machine: munged, slurmctld and slurmd, in a folder of their own, for as long as it is entered."""

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from dptrain.launch import library
from tests.faults.live import until

PROGRAMS = ("munged", "slurmctld", "slurmd", "srun", "sbatch", "scontrol", "sinfo")
SLOTS = 4


def missing() -> str:
    """Why there can be no Slurm here; "" where there can."""
    if os.geteuid() != 0:
        return "Slurm: its daemons are started by root"
    gone = [name for name in PROGRAMS if shutil.which(name) is None]
    if gone:
        return f"Slurm: no {', '.join(gone)} here: apt-get install slurm-wlm munge"
    return (
        ""
        if library() == "MPICH" or _has_pmix()
        else "Slurm: its plugin finds no libpmix.so: apt-get install libpmix-dev"
    )


def _has_pmix() -> bool:
    """Whether Slurm's plugin, which loads the system's library by this name, would find it."""
    line = [sys.executable, "-c", "import ctypes; ctypes.CDLL('libpmix.so')"]
    return subprocess.run(line, capture_output=True, timeout=60, check=False).returncode == 0


@contextmanager
def slurm(folder: Path) -> Iterator[dict[str, str]]:
    """The environment in which Slurm's commands find it."""
    name, socket_path = socket.gethostname().partition(".")[0], folder / "munge.socket"
    with ExitStack() as held:
        made = [held.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(2)]
        controller, node = (one.getsockname()[1] for one in made)
    key = folder / "munge.key"
    key.touch(0o400)
    key.write_bytes(os.urandom(1024))
    (folder / "state").mkdir()
    (folder / "spool").mkdir()
    (folder / "slurm.conf").write_text(f"""ClusterName=one
SlurmctldHost={name}(127.0.0.1)
SlurmUser=root
SlurmctldPort={controller}
SlurmdPort={node}
AuthType=auth/munge
AuthInfo=socket={socket_path},cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
ReturnToService=2
MpiDefault=none
NodeName={name} NodeAddr=127.0.0.1 CPUs={SLOTS} State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
""")
    environ = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
    munge = ["munged", "--foreground", "--force", f"--key-file={key}", f"--socket={socket_path}"]
    munge += [f"--pid-file={folder}/munge.pid", f"--log-file={folder}/munge.log", f"--seed-file={folder}/munge.seed"]
    with ExitStack() as left:

        def start(*line: str) -> None:
            out = left.enter_context((folder / f"{line[0]}.log").open("wb"))
            process = subprocess.Popen(line, env=environ, stdin=subprocess.DEVNULL, stdout=out, stderr=out)
            left.callback(process.wait, 60)
            left.callback(process.terminate)

        def said(*line: str) -> str:
            return subprocess.run(line, env=environ, capture_output=True, text=True, timeout=60, check=False).stdout

        start(*munge)
        assert until(socket_path.exists, 30, nap=0.05), (folder / "munged.log").read_text()
        start("slurmctld", "-D")
        start("slurmd", "-D", "-N", name)

        def idle() -> bool:
            return said("sinfo", "--noheader", "--format", "%t").strip() == "idle"

        assert until(idle, 60, nap=0.2), (folder / "slurmctld.log").read_text()
        try:
            yield environ
        finally:
            # What runs would outlive the daemons.
            said("scancel", "--full", "--signal=KILL", "--user=root")
            said("scancel", "--user=root")
            until(lambda: not said("squeue", "--noheader").strip(), 60, nap=0.2)
