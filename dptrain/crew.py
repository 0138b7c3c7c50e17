"""``python -m dptrain.crew WORKERS PROCESSES SERVERS STANDBYS ARGUMENTS``: servers and workers without MPI.

Each worker is of so many processes. It is to them what mpirun is to ranks: it starts them, starts a worker that was
killed again for as long as a server lives, passes a request to stop on to the servers, and leaves with the code of the
last that did not succeed. So many servers have a segment each, and so many more stand by. With ``--nodes
NAME:PROCESSES,... DATA`` in place of the numbers there is one server here, and a worker on each of these nodes of
``dptrain serve --agents``.
"""

import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType

from dptrain import supervision
from dptrain.rsh import NODES, UNREACHED, access
from dptrain.wire.address import LONGEST_PATH

_QUICK = 1.0
"""A worker that ended sooner than so many seconds after its start is started again only after as long a pause."""


_GRACE = 10.0
"""Seconds in which the other servers must end after one has ended with the run's end or its failure."""

_ENDS = (0, 1, 2)
"""The codes of such an end; a server that is left behind by the others leaves with another."""

_DPTRAIN = (sys.executable, "-P", "-m", "dptrain")


class Crew:
    """What the command lines of servers, the chief's first, and of workers start.

    ``added`` is of the workers' environment alone.
    """

    def __init__(
        self,
        servers: Sequence[Sequence[str]],
        workers: Sequence[Sequence[str]],
        added: Mapping[str, str] | None = None,
    ) -> None:
        self._server_lines, self._worker_lines, self._added = servers, workers, added or {}
        self._began: dict[int, tuple[float, Sequence[str]]] = {}
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self._servers: list[int] = []

    def run(self) -> int:
        """From the start of all to the end of all; returns 0 or a server's code, 128 + N where signal N ended it."""
        self._servers = [self._start(line) for line in self._server_lines]
        signal.signal(signal.SIGUSR1, self._ask)
        try:
            for line in self._worker_lines:
                self._start_worker(line)
            return self._wait()
        finally:
            for pid in (*self._servers, *self._began):
                _kill(pid)

    def _wait(self) -> int:
        codes: list[int] = []
        timer: threading.Timer | None = None
        while self._servers or self._began:
            pid, status = os.wait()
            ended = os.waitstatus_to_exitcode(status)
            if pid in self._processes:
                self._processes.pop(pid).returncode = ended
            if pid in self._servers:
                self._servers.remove(pid)
                codes.append(ended)
                if not self._servers:
                    # They were told. One that is stopped would never hear of it.
                    for worker in self._began:
                        _kill(worker)
                elif ended in _ENDS and timer is None:
                    # So it is with servers.
                    timer = threading.Timer(_GRACE, self._kill_servers)
                    timer.daemon = True
                    timer.start()
                continue
            began = self._began.pop(pid, None)
            if began is not None and self._servers and (ended < 0 or ended == UNREACHED):
                self._start_worker(began[1], pause=time.monotonic() - began[0] < _QUICK)
            elif self._servers and not self._began and ended > 0:
                # Nobody is left to train with, and each has said why.
                self._kill_servers()
        if timer is not None:
            timer.cancel()
        code = 0 if 0 in codes else codes[-1]
        return 128 - code if code < 0 else code

    def _kill_servers(self) -> None:
        for server in list(self._servers):
            _kill(server)

    def _start_worker(self, line: Sequence[str], pause: bool = False) -> None:
        if pause:
            time.sleep(_QUICK)
        self._began[self._start(line, {**os.environ, **self._added})] = (time.monotonic(), line)

    def _start(self, line: Sequence[str], environ: Mapping[str, str] | None = None) -> int:
        ours = os.getpid()
        process = subprocess.Popen(
            line, stdin=subprocess.DEVNULL, env=environ, preexec_fn=lambda: supervision.die_with(ours)
        )
        self._processes[process.pid] = process
        return process.pid

    def _ask(self, number: int, frame: FrameType | None) -> None:
        for server in self._servers:
            os.kill(server, number)


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def addresses(folder: str, count: int) -> list[str]:
    """Where so many servers listen. A folder with a long path is named by a file that this process has open."""
    names = [f"server-{number}.sock" for number in range(count)]
    if len(os.fsencode(folder)) + 1 + max(map(len, names)) > LONGEST_PATH:
        folder = f"/proc/{os.getpid()}/fd/{os.open(folder, os.O_PATH | os.O_DIRECTORY)}"
    return [f"unix:{folder}/{name}" for name in names]


def here(workers: int, processes: int, servers: int, standbys: int, arguments: Sequence[str]) -> Crew:
    """A crew of this machine alone."""
    places = addresses(os.environ[supervision.FOLDER], servers + standbys)
    lines = []
    for number, address in enumerate(places):
        line = [*_DPTRAIN, "param-server", *arguments, "--listen", address]
        if number < servers > 1:
            line += ["--segment", f"{number + 1}/{servers}"]
        if number == 0:
            line += ["--standby"] * standbys
        else:
            line += ["--chief" if number < servers else "--standby-of", places[0]]
        lines.append(line)
    worker = [*_DPTRAIN, "worker", "--server", ",".join(places), "--processes", str(processes)]
    return Crew(lines, [worker] * workers)


def over_nodes(nodes: str, data: str, arguments: Sequence[str]) -> Crew:
    """A server here that only workers of this crew's may join, and a worker on each node, which is sent the data."""
    from dptrain.wire.tokens import Role, TokenFile

    folder = Path(os.environ[supervision.FOLDER])
    place = access(os.environ[NODES])
    token = TokenFile(folder / "tokens.json").create("nodes", Role.worker)
    with socket.create_server((place["host"], 0), family=_family(place["host"])) as found:
        # Free now; should another take it meanwhile, the server says so and all is started again.
        port = int(found.getsockname()[1])
    host = f"[{place['host']}]" if ":" in place["host"] else place["host"]
    line = [
        *_DPTRAIN,
        "param-server",
        *arguments,
        "--listen",
        f"{host}:{port}",
        "--tokens",
        str(folder / "tokens.json"),
    ]
    if place["certificate"]:
        line += ["--tls-cert", place["certificate"], "--tls-key", place["key"]]
    program = str(Path(sys.executable).parent / "dptrain-rsh")
    workers = []
    for node in nodes.split(","):
        name, _, processes = node.rpartition(":")
        workers.append([program, name, "dptrain", "worker", "--port", str(port), "--processes", processes])
        workers[-1] += ["--data", shlex.quote(data)] if data else []
    return Crew([line], workers, {"DPTRAIN_TOKEN": token})


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


if __name__ == "__main__":
    if sys.argv[1] == "--nodes":
        crew = over_nodes(sys.argv[2], sys.argv[3], sys.argv[4:])
    else:
        workers, processes, servers, standbys = map(int, sys.argv[1:5])
        crew = here(workers, processes, servers, standbys, sys.argv[5:])
    sys.exit(crew.run())
