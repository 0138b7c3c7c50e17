"""`mpirun --hostfile` over ssh, on nodes that are network namespaces with an sshd each."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dptrain import rundir
from dptrain.launch import library
from tests.faults.live import until
from tests.faults.network import SLOTS, Cluster
from tests.faults.network import missing as no_nodes
from tests.faults.oracle import Surroundings
from tests.service.jobs import JOB, solo_hash

EXAMPLE = Path(__file__).resolve().parents[2] / "launch" / "hostfile.example"
SSHD = "/usr/sbin/sshd"


def missing() -> str:
    """Why there can be no hosts with sshd here; "" where there can."""
    gone = [name for name in (SSHD, "ssh", "ssh-keygen") if shutil.which(name) is None]
    return no_nodes() or (f"ssh: no {', '.join(gone)} here: apt-get install openssh-server" if gone else "")


@pytest.mark.skipif(missing() != "", reason=missing() or "sshd can be started")
@pytest.mark.parametrize("by", ["mpirun", "dptrain run"])
def test_a_hostfile_as_the_example_trains_over_ssh(by: str, tmp_path: Path) -> None:
    place = Surroundings(tmp_path / "place")
    with Cluster(place) as cluster:
        own = place.folder / "ssh"
        own.mkdir(mode=0o700)
        for name in ("host", "user"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", own / name], check=True, timeout=30)
        config = own / "config"
        config.write_text(
            f"Host *\n  IdentityFile {own}/user\n  UserKnownHostsFile /dev/null\n  StrictHostKeyChecking no\n"
            "  LogLevel ERROR\n  BatchMode yes\n"
        )
        # In place of a user's ~/.ssh/config.
        (own / "bin").mkdir()
        (own / "bin" / "ssh").write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {config} "$@"\n')
        (own / "bin" / "ssh").chmod(0o755)
        options = ["PidFile=none", "UsePAM=no", "StrictModes=no", f"AuthorizedKeysFile={own}/user.pub"]
        options += ["PermitRootLogin=yes", "PasswordAuthentication=no"]
        words = [word for option in options for word in ("-o", option)]
        Path("/run/sshd").mkdir(exist_ok=True)
        daemons = [
            place.start([*cluster.inside(node), SSHD, "-D", "-e", "-f", "/dev/null", "-h", str(own / "host"), *words])
            for node, slots in enumerate(SLOTS)
            if slots
        ]
        try:
            assert until(lambda: all("listening" in daemon.err for daemon in daemons), 30, nap=0.05)
            lines = [line for line in EXAMPLE.read_text().splitlines() if not line.startswith("#")]
            text = "\n".join(lines).replace("slots=4", "slots=1").replace("slots=2", "slots=1") + "\n"
            if by == "mpirun" and library() == "MPICH":
                text = text.replace(" slots=", ":")
            for number in (1, 2, 3):
                text = text.replace(f"node-{number}", cluster.address(number))
            (place.folder / "hosts").write_text(text)
            (place.folder / "job.toml").write_text(JOB)
            path = f"{own}/bin:{Path(sys.executable).parent}:{os.environ['PATH']}"
            environ = {"PATH": path, "OMPI_MCA_mpi_yield_when_idle": "1", "HYDRA_IFACE": "eth0"}
            environ |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
            python = [sys.executable, "-P", "-m", "dptrain", "run"]
            started = [*python, "--hostfile", "hosts"]
            if by == "mpirun":
                started = [str(Path(sys.executable).parent / "mpirun"), "--hostfile", "hosts", "-n", "3", *python]
                environ |= {"OMPI_MCA_osc": "^ucx"} if library() == "Open MPI" else {}
            line = [*cluster.inside(0), *started, "job.toml", "--run-dir", "run", "--progress", "none"]
            ended = place.ended(place.start(line, **environ), 120)
            assert ended.code == 0, ended.said
            result = json.loads((place.folder / "run" / rundir.RESULT).read_text())
            assert (result["workers"], result["weights_sha256"]) == (3, solo_hash(tmp_path, JOB))
        finally:
            place.kill()
            # They write over their environment, by which others are found.
            for daemon in daemons:
                daemon.process.kill()
                daemon.process.wait(10)
