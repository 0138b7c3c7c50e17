"""Workers on machines of their own, one each, behind limited links: dptrain over MPI, and PyTorch DDP over gloo."""

import contextlib
import json
import os
import shlex
import tempfile
from collections.abc import Sequence
from pathlib import Path

import tomli_w

from bench import links, spawn
from bench.contestants import ours
from bench.contestants.running import interpreter
from bench.spawn import Found
from bench.workload import Workload
from dptrain import journal
from dptrain.hosts import AGENTS
from dptrain.rundir import JOURNAL
from dptrain.supervision import RESULT


def train(work: Workload, rate: str, *, shards: int, gradients: str = "auto", variable: str = "") -> Found:
    """Train with ``dptrain run --hostfile``, started on the first machine. Raises NotRun.

    ``variable``: what may name the Python, and with it the MPI.
    """
    with tempfile.TemporaryDirectory() as name, links.nodes([rate] * work.workers) as machines:
        folder = Path(name)
        hosts = [links.address(node) for node in range(work.workers)]
        (folder / "hosts").write_text("".join(f"{host} slots=1\n" for host in hosts))
        shell = _shell(folder / "shell", hosts, machines)
        content = ours.content(work, shards, "segments")
        content["arithmetic"]["gradients"] = gradients
        content["output"]["journal_steps"] = 1
        (folder / "job.toml").write_text(tomli_w.dumps(content))
        line = [*machines[0], interpreter(variable), "-P", "-m", "dptrain", "run", f"{folder}/job.toml"]
        line += ["--hostfile", f"{folder}/hosts", "--run-dir", f"{folder}/run", "--progress", "none"]
        environ = {
            **spawn.environment(),
            **dict.fromkeys(AGENTS, str(shell)),
            "HYDRA_IFACE": "eth0",
            # It would find out that they share a kernel, and go past their links.
            "UCX_TLS": "tcp",
            # All machines share this one's cores, which no MPI can know.
            "OMPI_MCA_mpi_yield_when_idle": "1",
        }
        with spawn.started([*line, "--max-restarts", "0"], environ) as process:
            spawn.finish(process)
        result = json.loads((folder / "run" / RESULT).read_text())
        found: Found = ours.measured(work, journal.read_steps(folder / "run" / JOURNAL))
        return {**found, "weights_sha256": result["weights_sha256"]}


def ddp(work: Workload, rate: str) -> Found:
    """Train with DDP, a process on each machine. Raises NotRun."""
    with tempfile.TemporaryDirectory() as folder, links.nodes([rate] * work.workers) as machines:
        line = [interpreter("BENCH_TORCH"), "-m", "bench.contestants.torch_ddp", work.text()]
        environ = {**spawn.environment(), "MEETING": f"{folder}/meeting", "GLOO_SOCKET_IFNAME": "eth0"}
        with contextlib.ExitStack() as running:
            first, *_ = [
                running.enter_context(spawn.started([*machine, *line], {**environ, "RANK": str(rank)}))
                for rank, machine in enumerate(machines)
            ]
            found: Found = json.loads(spawn.finish(first).strip().splitlines()[-1])
            return found


def _shell(path: Path, hosts: Sequence[str], machines: Sequence[Sequence[str]]) -> Path:
    """A program that does what ssh does: it runs a line on the machine that is named."""
    cases = "\n".join(
        f'    {host}) exec {shlex.join(machine)} unshare --uts sh -c \'hostname "$1" && eval "$2"\' sh node{i} "$*" ;;'
        for i, (host, machine) in enumerate(zip(hosts, machines, strict=True))
    )
    path.write_text(f"""#!/bin/sh
[ "$1" = -x ] && shift
host=$1
shift
TMPDIR=$(mktemp -d {path.parent}/XXXXXX) || exit 1
export TMPDIR OMPI_MCA_btl_sm_backing_directory="$TMPDIR"
case $host in
{cases}
esac
echo "no machine $host" >&2
exit 1
""")
    os.chmod(path, 0o755)
    return path
