"""``python -m dptrain.crew HOW FILE WORKERS SERVERS STANDBYS ARGUMENTS``: servers and workers without MPI.

HOW is --together, where all workers of a host are one of several processes, or --apart. It is to them what mpirun is
to ranks: it starts them, starts a worker that was killed again for as long as a server lives, passes a request to stop
on to the servers, and leaves with the code of the last that did not succeed. So many servers have a segment each, and
so many more stand by. With ``--nodes FILE NAME:PROCESSES,... DATA`` there is one server here, and a worker on each of
these nodes of ``dptrain serve --agents``. FILE, "" for none, says later how many workers there are to be.
"""

import contextlib
import math
import os
import select
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType

from dptrain import supervision
from dptrain.rsh import NODES, UNREACHED, access
from dptrain.wanted import HERE, Group, Watch, Workers
from dptrain.wire.address import LONGEST_PATH

_QUICK = 1.0
"""A worker that ended sooner than so many seconds after its start is started again only after as long a pause."""


_GRACE = 10.0
"""Seconds in which the other servers must end after one has ended with the run's end or its failure."""

_LOOK, _SOON = 0.25, 0.05
"""Seconds between looks whether other workers are wanted, and whether they have come."""

_ENDS = (0, 1, 2)
"""The codes of such an end; a server that is left behind by the others leaves with another."""

_DPTRAIN = (sys.executable, "-P", "-m", "dptrain")


class Crew:
    """What the command lines of servers, the chief's first, and ``line`` of each group of workers start.

    ``added`` is of the workers' environment alone. With ``watch`` other workers come, and some of these leave, whenever
    it says so: who is to leave does it when those that come have joined, so that no step waits for them.
    """

    def __init__(
        self,
        servers: Sequence[Sequence[str]],
        workers: Sequence[Group],
        line: Callable[[Group], Sequence[str]],
        added: Mapping[str, str] | None = None,
        watch: Watch | None = None,
    ) -> None:
        self._server_lines, self._wanted, self._line = servers, list(workers), line
        self._added, self._watch = added or {}, watch
        self._began: dict[int, tuple[float, Group]] = {}
        self._leaving: dict[int, float | None] = {}
        """Of those that began, who is to leave, and until when it must have, as soon as it was asked to."""
        self._changes = False
        self._told = 0
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self._servers: list[int] = []
        self._codes: list[int] = []
        self._until = math.inf
        self._wakes, self._wake = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)

    def run(self) -> int:
        """From the start of all to the end of all; returns 0 or a server's code, 128 + N where signal N ended it."""
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        signal.set_wakeup_fd(self._wake, warn_on_full_buffer=False)
        self._servers = [self._start(line) for line in self._server_lines]
        signal.signal(signal.SIGUSR1, self._ask)
        try:
            if self._watch is not None:
                self._wanted = list(self._watch.look() or self._wanted)
                self._changes = True
            self._told = sum(group.processes for group in self._wanted)
            for group in self._wanted:
                self._start_worker(group)
            return self._wait()
        finally:
            for pid in (*self._servers, *self._began):
                _kill(pid)

    def _wait(self) -> int:
        while self._servers or self._began:
            for pid, code in self._ended():
                self._note(pid, code)
            if self._watch is not None and self._servers:
                self._look(self._watch)
            if time.monotonic() > self._until:
                self._kill_servers()
            self._rest()
        code = 0 if 0 in self._codes else self._codes[-1]
        return 128 - code if code < 0 else code

    def _rest(self) -> None:
        """Until something happens, or is due."""
        seconds = [max(0.0, self._until - time.monotonic())] if self._until < math.inf else []
        if self._watch is not None and self._servers:
            seconds.append(_SOON if self._changes else _LOOK)
        if self._servers or self._began:
            select.select([self._wakes], [], [], min(seconds, default=None))
            with contextlib.suppress(BlockingIOError):
                os.read(self._wakes, 1 << 12)

    def _ended(self) -> Iterator[tuple[int, int]]:
        """Who has ended, with which code."""
        while self._servers or self._began:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                return
            code = os.waitstatus_to_exitcode(status)
            if pid in self._processes:
                self._processes.pop(pid).returncode = code
            yield pid, code

    def _note(self, pid: int, code: int) -> None:
        """One has ended."""
        if pid in self._servers:
            self._servers.remove(pid)
            self._codes.append(code)
            if not self._servers:
                # They were told. One that is stopped would never hear of it.
                for worker in self._began:
                    _kill(worker)
            elif code in _ENDS:
                # So it is with servers.
                self._until = min(self._until, time.monotonic() + _GRACE)
            return
        if pid not in self._began:
            return
        began, group = self._began.pop(pid)
        if pid in self._leaving:
            del self._leaving[pid]
        elif self._servers and (code < 0 or code == UNREACHED):
            self._start_worker(group, pause=time.monotonic() - began < _QUICK)
        elif self._servers and code > 0:
            self._wanted.remove(group)
            # Where those that were to come can't, those that are there stay.
            for other in [other for other, until in self._leaving.items() if until is None]:
                del self._leaving[other]
                self._wanted.append(self._began[other][1])
            if not self._began:
                # Nobody is left to train with, and each has said why.
                self._kill_servers()

    def _look(self, watch: Watch) -> None:
        """See whether others are wanted, and go on with what is under way."""
        complaint = watch.complaint
        groups = watch.look()
        if groups is not None:
            self._want(groups)
        elif watch.complaint and watch.complaint != complaint:
            print(f"dptrain: {watch.complaint}: nothing is changed", file=sys.stderr, flush=True)
        if not self._changes:
            return
        now = time.monotonic()
        every = sum(group.processes for _, group in self._began.values())
        come = supervision.present() >= every
        for pid, until in list(self._leaving.items()):
            if until is None and come:
                os.kill(pid, signal.SIGTERM)
                self._leaving[pid] = now + _GRACE
            elif until is not None and now > until:
                _kill(pid)
        if come and not self._leaving:
            self._changes = False
            watch.settle(self._wanted)
            there = sum(group.processes for group in self._wanted)
            if there != self._told:
                print(f"now {there} worker{'s' if there > 1 else ''}", flush=True)
                self._told = there

    def _want(self, groups: Sequence[Group]) -> None:
        """From now on these are wanted, and no others."""
        self._changes = True
        missing = Counter(groups)
        for pid, (_, group) in self._began.items():
            # Who was asked to leave does.
            if self._leaving.get(pid) is None:
                self._leaving.pop(pid, None)
                if missing[group]:
                    missing[group] -= 1
                else:
                    self._leaving[pid] = None
        self._wanted = list(groups)
        for group in missing.elements():
            self._start_worker(group)

    def _kill_servers(self) -> None:
        for server in list(self._servers):
            _kill(server)

    def _start_worker(self, group: Group, pause: bool = False) -> None:
        if pause:
            time.sleep(_QUICK)
        self._began[self._start(self._line(group), {**os.environ, **self._added})] = (time.monotonic(), group)

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


def here(
    workers: int, servers: int, standbys: int, arguments: Sequence[str], *, together: bool, watched: Path | None = None
) -> Crew:
    """A crew of this machine alone, whose workers are ``together`` one of several processes, or of one each."""
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

    def cut(asked: Workers) -> list[Group]:
        return [Group(HERE, asked[HERE])] if together else [Group(HERE, 1)] * asked[HERE]

    def line_of(group: Group) -> list[str]:
        return [*_DPTRAIN, "worker", "--server", ",".join(places), "--processes", str(group.processes)]

    asked = {HERE: workers}
    return Crew(lines, cut(asked), line_of, watch=None if watched is None else Watch(watched, asked, cut))


def over_nodes(nodes: str, data: str, arguments: Sequence[str], watched: Path | None = None) -> Crew:
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

    def cut(asked: Workers) -> list[Group]:
        return [Group(name, processes) for name, processes in asked.items()]

    def line_of(group: Group) -> list[str]:
        words = [program, group.node, "dptrain", "worker", "--port", str(port), "--processes", str(group.processes)]
        return words + (["--data", shlex.quote(data)] if data else [])

    pairs = (node.rpartition(":") for node in nodes.split(","))
    asked = {name: int(processes) for name, _, processes in pairs}
    watch = None if watched is None else Watch(watched, asked, cut)
    return Crew([line], cut(asked), line_of, {"DPTRAIN_TOKEN": token}, watch)


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def main(words: Sequence[str]) -> int:
    """Run a crew as a command line asks for it, and return its code."""
    what, watched, *rest = words
    file = Path(watched) if watched else None
    if what == "--nodes":
        nodes, data, *arguments = rest
        return over_nodes(nodes, data, arguments, file).run()
    workers, servers, standbys = map(int, rest[:3])
    return here(workers, servers, standbys, rest[3:], together=what == "--together", watched=file).run()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
