"""``python -m dptrain.crew WORKERS PROCESSES SERVERS ARGUMENTS``: servers and workers of this machine, without MPI.

Each worker is of so many processes. It is to them what mpirun is to ranks: it starts them, starts a worker that was
killed again for as long as a server lives, passes a request to stop on to the servers, and leaves with the last one's
code. Of two servers the second stands by.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from types import FrameType

from dptrain import supervision
from dptrain.wire.address import LONGEST_PATH

SOCKETS = ("server.sock", "standby.sock")
"""Of the supervisor's folder: where the servers listen."""

_QUICK = 1.0
"""A worker that ended sooner than so many seconds after its start is started again only after as long a pause."""


class Crew:
    """Of ``workers`` workers, each of so many ``processes``, and the server that ``arguments`` start."""

    def __init__(self, workers: int, processes: int, addresses: Sequence[str], arguments: Sequence[str]) -> None:
        self._workers, self._processes_of_each, self._addresses = workers, processes, addresses
        self._dptrain = [sys.executable, "-P", "-m", "dptrain"]
        self._server_line = [*self._dptrain, "param-server", *arguments]
        self._began: dict[int, float] = {}
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self._servers: list[int] = []

    def run(self) -> int:
        """From the start of all to the end of all; returns the last server's code, 128 + N where signal N ended it."""
        self._servers = self._start_servers()
        signal.signal(signal.SIGUSR1, self._ask)
        try:
            for _ in range(self._workers):
                self._start_worker()
            return self._wait()
        finally:
            for pid in (*self._servers, *self._began):
                _kill(pid)

    def _start_servers(self) -> list[int]:
        """The chief first, then its standby if there is one."""
        chief, *standby = self._addresses
        lines = [[*self._server_line, "--listen", chief, *(["--standby"] if standby else [])]]
        lines += [[*self._server_line, "--listen", address, "--standby-of", chief] for address in standby]
        return [self._start(line) for line in lines]

    def _wait(self) -> int:
        code = 0
        while self._servers or self._began:
            pid, status = os.wait()
            ended = os.waitstatus_to_exitcode(status)
            if pid in self._processes:
                self._processes.pop(pid).returncode = ended
            if pid in self._servers:
                self._servers.remove(pid)
                code = ended
                if not self._servers:
                    # They were told. One that is stopped would never hear of it.
                    for worker in self._began:
                        _kill(worker)
                continue
            began = self._began.pop(pid, None)
            if began is not None and self._servers and ended < 0:
                self._start_worker(pause=time.monotonic() - began < _QUICK)
            elif self._servers and not self._began and ended > 0:
                # Nobody is left to train with, and each has said why.
                for server in self._servers:
                    _kill(server)
        return 128 - code if code < 0 else code

    def _start_worker(self, pause: bool = False) -> None:
        if pause:
            time.sleep(_QUICK)
        addresses = ",".join(self._addresses)
        line = [*self._dptrain, "worker", "--server", addresses, "--processes", str(self._processes_of_each)]
        self._began[self._start(line)] = time.monotonic()

    def _start(self, line: Sequence[str]) -> int:
        ours = os.getpid()
        process = subprocess.Popen(line, stdin=subprocess.DEVNULL, preexec_fn=lambda: supervision.die_with(ours))
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
    if len(os.fsencode(folder)) + 1 + max(map(len, SOCKETS)) > LONGEST_PATH:
        folder = f"/proc/{os.getpid()}/fd/{os.open(folder, os.O_PATH | os.O_DIRECTORY)}"
    return [f"unix:{folder}/{name}" for name in SOCKETS[:count]]


if __name__ == "__main__":
    places = addresses(os.environ[supervision.FOLDER], int(sys.argv[3]))
    sys.exit(Crew(int(sys.argv[1]), int(sys.argv[2]), places, sys.argv[4:]).run())
