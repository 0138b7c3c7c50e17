"""``python -m dptrain.crew WORKERS PROCESSES ARGUMENTS``: a parameter server and its workers, on this machine.

Each worker is of so many processes. It is to them what mpirun is to ranks: it starts them, starts a worker that ended
again for as long as the server lives, passes a request to stop on to the server, ends all when the server has ended,
and leaves with its code.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from types import FrameType

from dptrain import supervision

SOCKET = "server.sock"
"""Of the supervisor's folder: where the server listens."""

_QUICK = 1.0
"""A worker that ended sooner than so many seconds after its start is started again only after as long a pause."""


class Crew:
    """Of ``workers`` workers, each of so many ``processes``, and the server that ``arguments`` start."""

    def __init__(self, workers: int, processes: int, address: str, arguments: Sequence[str]) -> None:
        self._workers, self._processes_of_each, self._address = workers, processes, address
        self._dptrain = [sys.executable, "-P", "-m", "dptrain"]
        self._server_line = [*self._dptrain, "param-server", *arguments, "--listen", address]
        self._began: dict[int, float] = {}
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self._asked = False

    def run(self) -> int:
        """From the start of all to the end of all; returns the server's code, 128 + N where signal N ended it."""
        server = self._start(self._server_line)
        signal.signal(signal.SIGUSR1, lambda number, frame: self._ask(server, number, frame))
        try:
            for _ in range(self._workers):
                self._start_worker()
            return self._wait(server)
        finally:
            for pid in (server, *self._began):
                _kill(pid)

    def _wait(self, server: int) -> int:
        code = 0
        ended = False
        while not ended or self._began:
            pid, status = os.wait()
            if pid in self._processes:
                self._processes.pop(pid).returncode = os.waitstatus_to_exitcode(status)
            if pid == server:
                ended, code = True, os.waitstatus_to_exitcode(status)
                if code:
                    for worker in self._began:
                        _kill(worker)
                continue
            began = self._began.pop(pid, None)
            if began is not None and not ended and os.waitstatus_to_exitcode(status) < 0:
                self._start_worker(pause=time.monotonic() - began < _QUICK)
            elif not ended and not self._began:
                # Nobody is left to train with, and each has said why.
                _kill(server)
        return 128 - code if code < 0 else code

    def _start_worker(self, pause: bool = False) -> None:
        if pause:
            time.sleep(_QUICK)
        line = [*self._dptrain, "worker", "--server", self._address, "--processes", str(self._processes_of_each)]
        self._began[self._start(line)] = time.monotonic()

    def _start(self, line: Sequence[str]) -> int:
        ours = os.getpid()
        process = subprocess.Popen(line, stdin=subprocess.DEVNULL, preexec_fn=lambda: supervision.die_with(ours))
        self._processes[process.pid] = process
        return process.pid

    def _ask(self, server: int, number: int, frame: FrameType | None) -> None:
        os.kill(server, number)


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


if __name__ == "__main__":
    folder = os.environ[supervision.FOLDER]
    address = f"unix:{os.path.join(folder, SOCKET)}"
    sys.exit(Crew(int(sys.argv[1]), int(sys.argv[2]), address, sys.argv[3:]).run())
