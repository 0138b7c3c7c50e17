"""Nodes that fail, and the links between them: network namespaces on a bridge, with a worker or two in each.

The first node has the launcher alone, the others the workers. Each fault makes its own nodes and removes them.
"""

import contextlib
import functools
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from dptrain.board import RANK
from dptrain.launch import library
from tests.faults import jobs
from tests.faults.fault import Fault, Outcome
from tests.faults.live import Job, pace, signalled, until
from tests.faults.oracle import MARKER, PROGRAM, Command, Surroundings, judge, undisturbed

KIND = "network"

STEPS = 160
SLOTS = (0, 2, 1, 1)
"""Workers of each node."""

DEADLINE = 15.0
"""Seconds that workers wait for others, and an eighth of what a run may take."""

SURVIVED = ("worker", "all workers of a node", "worker stopped", "link cut for a moment", "slow link")
RESTARTED = ("daemon", "node", "chief's node", "link cut for good", "launcher")
WHAT = (*SURVIVED, *RESTARTED)
"""What fails: the first is survived within the step, or not even noticed; after the others the job starts again."""


@functools.cache
def missing() -> str:
    """Why there can be no nodes here; "" where there can."""
    if os.geteuid() != 0:
        return "network namespaces are made by root"
    if gone := [name for name in ("ip", "tc", "unshare") if shutil.which(name) is None]:
        return f"no {', '.join(gone)} here: install iproute2 and util-linux"
    name = f"dptrain-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, timeout=10)
    if made.returncode == 0:
        _ip("netns", "delete", name)
    return made.stderr.strip()


def faults(seed: int) -> Iterator[Fault]:
    """Faults without end, each thing in turn; none where there can be no nodes."""
    if missing():
        print(f"no faults of the network: {missing()}", file=sys.stderr)
        return
    number = 0
    while True:
        for what in WHAT:
            one = seed * 1_000_003 + number
            yield Fault(KIND, f"{what}, seed {one}", partial(fail, seed=one, what=what))
            number += 1


def fail(folder: Path, *, seed: int, what: str) -> Outcome:
    """Let something of a cluster fail on which a job trains, and see what becomes of it."""
    rng = random.Random(seed)
    job = jobs.choose(rng).of(STEPS)
    truth = undisturbed(job.text)
    place = Surroundings(folder)
    with Cluster(place) as cluster:
        (folder / "job.toml").write_text(job.text)
        command = cluster.start("job.toml", "--run-dir", "run", "--set", f"exchange.deadline={DEADLINE}")
        begun = cluster.joined(command)
        said = ""
        if begun:
            pace(begun[1], rng.randrange(5, STEPS // 4))
            said = _strike(cluster, begun, rng, what)
        ended = place.ended(command, 16 * DEADLINE)
        outcome = judge(place, ended, folder / "run", truth, phase=what if begun else "before training", said=said)
    if not outcome.good or not begun:
        return outcome
    wanted = "survived" if what in SURVIVED and (library() == "Open MPI" or "link" in what) else "restarted"
    if outcome.verdict != wanted:
        return Outcome("wrong error", what, note=f"{outcome.verdict} instead of {wanted}\n{ended.said}")
    return outcome


def _strike(cluster: "Cluster", begun: dict[int, Job], rng: random.Random, what: str) -> str:
    """Let it fail; a pattern of what is to be said of it."""
    node = rng.choice((2, 3))
    worker = rng.choice(begun[node].cells)
    if what == "worker":
        signalled(worker, signal.SIGKILL)
    elif what == "all workers of a node":
        for cell in begun[1].cells:
            signalled(cell, signal.SIGKILL)
    elif what == "worker stopped":
        signalled(worker, signal.SIGSTOP)
        return "" if library() != "Open MPI" else rf"rank {worker[RANK]} at step \d+ in \w+ was stopped for"
    elif what == "daemon":
        for pid in cluster.named(node, ("prted", "hydra_pmi_proxy")):
            os.kill(pid, signal.SIGKILL)
    elif what in ("node", "chief's node"):
        lost = 1 if what == "chief's node" else node
        cluster.cut(lost)
        cluster.kill(lost)
        return rf"host {cluster.address(lost)} is left out: "
    elif what == "link cut for good":
        cluster.cut(node)
        return rf"host {cluster.address(node)} is left out: no answer within"
    elif what == "link cut for a moment":
        cluster.cut(node)
        time.sleep(rng.uniform(0.2, 0.2 * DEADLINE))
        cluster.mend(node)
    elif what == "slow link":
        cluster.slow(node, rng.choice(("10mbit", "50mbit")))
    elif what == "launcher":
        for pid in cluster.named(0, ("mpirun", "prterun", "mpiexec.hydra", "mpiexec")):
            os.kill(pid, signal.SIGKILL)
    else:
        raise AssertionError(what)
    return ""


class Cluster:
    """Nodes of one fault, while it is entered; the host name of each is ``node-I``, its files are in ``node-I``."""

    def __init__(self, place: Surroundings) -> None:
        self.place = place
        self._prefix = f"dptrain-{place.mark[:8]}"
        self.hosts = place.folder / "hosts"
        self._agent = place.folder / "agent"

    def __enter__(self) -> "Cluster":
        with contextlib.ExitStack() as made:
            made.callback(self._remove)
            switch = f"{self._prefix}-switch"
            _ip("netns", "add", switch)
            _ip("-n", switch, "link", "add", "bridge", "type", "bridge")
            _ip("-n", switch, "link", "set", "bridge", "up")
            for node in range(len(SLOTS)):
                self._add(node, switch)
            self._write_agent()
            lines = [f"{self.address(node)} slots={slots}\n" for node, slots in enumerate(SLOTS) if slots]
            self.hosts.write_text("".join(lines))
            made.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._remove()

    def space(self, node: int) -> str:
        """The name of a node's network namespace."""
        return f"{self._prefix}-{node}"

    def address(self, node: int) -> str:
        """The address by which the others know it."""
        return f"10.99.0.{node + 1}"

    def start(self, *arguments: str, **environ: str) -> Command:
        """Start ``dptrain run`` on the first node, with workers on all others."""
        line = [*PROGRAM, "run", "--hostfile", str(self.hosts), "--progress", "none", *arguments]
        own = {
            "PRTE_MCA_plm_ssh_agent": str(self._agent),
            "HYDRA_LAUNCHER_EXEC": str(self._agent),
            "HYDRA_IFACE": "eth0",
            # All nodes share this machine's cores, which no MPI can know.
            "OMPI_MCA_mpi_yield_when_idle": "1",
        }
        return self.place.start([*self.inside(0), *line], **own, **environ)

    def joined(self, command: Command) -> dict[int, Job]:
        """Each node's job as soon as all its workers train; {} where it ends before."""
        found: dict[int, Job] = {}
        while command.running and len(found) < len(SLOTS) - 1:
            for node, slots in enumerate(SLOTS):
                if slots and node not in found and (job := Job.among(self.processes(node), slots)) is not None:
                    found[node] = job
            time.sleep(0.02)
        return found if command.running else {}

    def processes(self, node: int) -> list[int]:
        """All processes of a node."""
        told = subprocess.run(
            ["ip", "netns", "pids", self.space(node)], capture_output=True, text=True, timeout=10, check=False
        )
        return [int(pid) for pid in told.stdout.split()]

    def named(self, node: int, names: Sequence[str]) -> list[int]:
        """A node's processes that run one of these programs."""
        found = []
        for pid in self.processes(node):
            with contextlib.suppress(OSError):
                if Path(os.readlink(f"/proc/{pid}/exe")).name in names:
                    found.append(pid)
        assert found, f"no {names} on node {node}"
        return found

    def kill(self, node: int) -> None:
        """End every process of a node, at once as far as may be."""
        for number in (signal.SIGSTOP, signal.SIGKILL):
            for pid in self.processes(node):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
        until(lambda: not self.processes(node), 5, nap=0.01)

    def cut(self, node: int) -> None:
        """Cut a node's link."""
        _ip("-n", f"{self._prefix}-switch", "link", "set", f"port{node}", "down")

    def mend(self, node: int) -> None:
        """Mend a link that was cut."""
        _ip("-n", f"{self._prefix}-switch", "link", "set", f"port{node}", "up")

    def slow(self, node: int, rate: str) -> None:
        """Limit what comes to a node and what goes from it."""
        for space, device in ((self.space(node), "eth0"), (f"{self._prefix}-switch", f"port{node}")):
            limit = ["tbf", "rate", rate, "burst", "64kb", "latency", "50ms"]
            _run("tc", "-n", space, "qdisc", "add", "dev", device, "root", *limit)

    def inside(self, node: int) -> list[str]:
        """What a command is put behind to run on a node."""
        named = f'hostname node-{node} && exec "$@"'
        return ["ip", "netns", "exec", self.space(node), "unshare", "--uts", "sh", "-c", named, "sh"]

    def _add(self, node: int, switch: str) -> None:
        space, port = self.space(node), f"port{node}"
        (self.place.folder / f"node-{node}").mkdir()
        _ip("netns", "add", space)
        _ip("link", "add", "eth0", "netns", space, "type", "veth", "peer", "name", port, "netns", switch)
        _ip("-n", switch, "link", "set", port, "master", "bridge", "up")
        _ip("-n", space, "addr", "add", f"{self.address(node)}/24", "dev", "eth0")
        _ip("-n", space, "link", "set", "eth0", "up")
        _ip("-n", space, "link", "set", "lo", "up")

    def _write_agent(self) -> None:
        """A program that does what ssh does: it runs a line on a node, in that node's environment and no other.

        A node whose link is cut is not reached, which takes for ever.
        """
        self._agent.write_text(f"""#!/bin/sh
[ "$1" = -x ] && shift
node=$((${{1##*.}} - 1))
shift
ip -n {self._prefix}-switch link show "port$node" | grep -q "state DOWN" && exec sleep 1000
own=$(mktemp -d {self.place.folder}/node-$node/XXXXXX) || exit 1
exec env -i PATH="$PATH" HOME="$HOME" {MARKER}={self.place.mark} TMPDIR="$own" \\
    OMPI_MCA_btl_sm_backing_directory="$own" ip netns exec "{self._prefix}-$node" unshare --uts \\
    sh -c 'hostname "$1" && eval "$2"' sh "node-$node" "$*"
""")
        self._agent.chmod(0o755)

    def _remove(self) -> None:
        told = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, timeout=10, check=True).stdout
        spaces = [line.split()[0] for line in told.splitlines() if line.startswith(f"{self._prefix}-")]
        for node in range(len(SLOTS)):
            if self.space(node) in spaces:
                self.kill(node)
        for space in spaces:
            _ip("netns", "delete", space)


def _ip(*arguments: str) -> None:
    _run("ip", *arguments)


def _run(*line: str) -> None:
    done = subprocess.run(line, capture_output=True, text=True, timeout=10, check=False)
    assert done.returncode == 0, f"{' '.join(line)}: {done.stderr}"
