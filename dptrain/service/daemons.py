"""What runs on an agent's node, each in a session of its own, and nothing else: daemons of launchers, and workers."""

import contextlib
import ipaddress
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import MappingProxyType
from typing import BinaryIO

from dptrain import afar, scratch
from dptrain.data import cache
from dptrain.errors import DptrainError
from dptrain.processes import end_session
from dptrain.rsh import PROGRAMS
from dptrain.service import log, started
from dptrain.service.carrier import Carrier, Carry, brought
from dptrain.service.shipping import received
from dptrain.v1 import agent_service_pb2 as pb
from dptrain.wire.address import Address
from dptrain.wire.tokens import VARIABLE

REFUSED = 126
"""The code of what is not started, as a shell has it."""

UNSEEN = 42
"""The code of a look at a mark that is not seen."""

LEAVING_SECONDS = 3.0
"""In which what is asked to end must have ended, before it is killed."""

GONE_SECONDS = 10.0
"""In which processes that were killed must be gone."""

_KEPT = "nodes"
"""Of this user's cache: where the files of jobs are kept."""

_PIECE = 1 << 16
_MARK = ".dptrain-seen-"
_CONTROL = re.compile(r"(?P<host>.+):(?P<port>\d+)")


class Daemons:
    """What was started over one stream. ``say`` sends a message over it.

    ``address`` is this node's, ``fetch`` gives a file of the server's by its SHA-256, ``carry`` the answers to
    what workers ask of their supervisor, ``ca`` signed the server's certificate.
    """

    def __init__(
        self,
        say: Callable[[pb.ServeRequest], None],
        server: Address,
        address: str,
        environ: Mapping[str, str],
        fetch: Callable[[str], Iterable[bytes]],
        carry: Carry,
        ca: Path | None = None,
    ) -> None:
        self._fetch, self._carry = fetch, carry
        self._say, self._server, self._ca = say, server, ca
        self._environ = environment(environ, address, reached_from(server))
        self._lock = threading.Lock()
        self._wanted: set[int] = set()
        self._workers: set[int] = set()
        self._running: dict[int, subprocess.Popen[bytes]] = {}
        self._threads: list[threading.Thread] = []

    def start(self, asked: pb.Start) -> None:
        """Start a daemon, or say why not."""
        path = Path(sys.executable).parent / asked.program
        if asked.program not in PROGRAMS or not os.access(path, os.X_OK):
            found = asked.program[:80] if asked.program not in PROGRAMS else f"no {path}"
            why = f"expected one of {', '.join(PROGRAMS)} of this installation, found {found!r}; it is not started"
            log.tell("refused", error=why)
            self._say(pb.ServeRequest(exited=pb.Exited(id=asked.id, code=REFUSED, refused=why)))
            return
        arguments = list(asked.arguments)
        if asked.program == "hydra_pmi_proxy" and not self._server.path:
            arguments = _called_back(arguments, self._server.host)
        self._begin(asked.id, asked.program, [str(path), *arguments], ticket=asked.ticket)

    def bring(self, asked: pb.Bring) -> None:
        """Have the files of a launch here before it begins, and say when they are."""
        threading.Thread(target=self._bring, args=(asked,), name="bring", daemon=True).start()

    def _bring(self, asked: pb.Bring) -> None:
        why = ""
        try:
            brought(asked.ticket, self._carry, self._fetch, cache.locate() / _KEPT)
        except (OSError, DptrainError) as error:
            why = str(error)
            log.tell("not brought", error=why)
        self._say(pb.ServeRequest(exited=pb.Exited(id=asked.id, code=REFUSED if why else 0, refused=why)))

    def work(self, asked: pb.Work) -> None:
        """Start a worker of a parameter server."""
        if not 1 <= asked.port < 1 << 16 or asked.processes < 1:
            why = f"expected a port and at least 1 process, found port {asked.port}, {asked.processes} processes"
            self._say(pb.ServeRequest(exited=pb.Exited(id=asked.id, code=REFUSED, refused=why)))
            return
        line = [sys.executable, "-P", "-m", "dptrain", "worker", "--processes", str(asked.processes)]
        line += ["--server", str(Address(self._server.host or "127.0.0.1", asked.port))]
        line += [] if self._ca is None else ["--tls-ca", str(self._ca.resolve())]
        self._workers.add(asked.id)
        self._begin(asked.id, "worker", line, {VARIABLE: asked.token}, asked.files)

    def _begin(
        self,
        number: int,
        name: str,
        line: Sequence[str],
        added: Mapping[str, str] = MappingProxyType({}),
        files: Sequence[pb.DataFile] = (),
        ticket: str = "",
    ) -> None:
        """Have a program run in a thread of its own, which lives as long: the kernel ends the program with it."""
        with self._lock:
            self._wanted.add(number)
        thread = threading.Thread(
            target=self._run, args=(number, name, list(line), added, files, ticket), name="daemon", daemon=True
        )
        self._threads.append(thread)
        thread.start()

    def _run(
        self,
        number: int,
        name: str,
        line: list[str],
        added: Mapping[str, str],
        files: Sequence[pb.DataFile],
        ticket: str,
    ) -> None:
        left = ExitStack()
        try:
            if files:
                line += ["--data", str(received(files, self._fetch, cache.locate() / _KEPT))]
            lent = brought(ticket, self._carry, self._fetch, cache.locate() / _KEPT) if ticket else None
            folder, memory = left.enter_context(scratch.folders())
            environ = {**self._environ, **added, "TMPDIR": str(folder)}
            if memory is not None:
                environ["OMPI_MCA_btl_sm_backing_directory"] = str(memory)
            if lent is not None:
                left.enter_context(Carrier(folder, ticket, self._carry, *lent))
                environ[afar.FOLDER] = str(folder)
            with self._lock:
                # Whoever asked for it may have gone meanwhile.
                process = None if number not in self._wanted else self._popen(line, folder, environ)
                if process is not None:
                    self._running[number] = process
        except (OSError, DptrainError) as error:
            left.close()
            why = f"expected {name} to start, found {getattr(error, 'strerror', None) or error}"
            log.tell("not started", error=why)
            self._say(pb.ServeRequest(exited=pb.Exited(id=number, code=REFUSED, refused=why)))
            return
        if process is None:
            left.close()
            return
        log.tell("started", program=name, id=number, pid=process.pid)
        self._attend(number, process, left)

    def _popen(self, line: Sequence[str], folder: Path, environ: Mapping[str, str]) -> "subprocess.Popen[bytes]":
        return subprocess.Popen(
            [sys.executable, "-P", "-m", started.__name__, str(os.getpid()), *line],
            cwd=folder,
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )

    def look(self, asked: pb.Look) -> None:
        """Say whether a mark is seen here."""
        path = Path(asked.path)
        if not path.name.startswith(_MARK):
            why = f"expected the path of a mark, found {asked.path[:80]!r}"
            log.tell("refused", error=why)
            answer = pb.Exited(id=asked.id, code=REFUSED, refused=why)
        else:
            answer = pb.Exited(id=asked.id, code=0 if path.exists() else UNSEEN)
        self._say(pb.ServeRequest(exited=answer))

    def kill(self, number: int) -> None:
        """End a daemon and all of its session."""
        with self._lock:
            self._wanted.discard(number)
            process = self._running.get(number)
        if process is not None:
            # What it started in its session is ended by who attends it.
            if number in self._workers:
                process.terminate()
                timer = threading.Timer(LEAVING_SECONDS, process.kill)
                timer.daemon = True
                timer.start()
            else:
                process.kill()

    def close(self) -> None:
        """End all, and return when all is gone."""
        with self._lock:
            self._wanted.clear()
            running = list(self._running.items())
        # A worker tells its parameter server before it goes.
        for number, process in running:
            if number in self._workers:
                process.terminate()
            else:
                process.kill()
        until = time.monotonic() + LEAVING_SECONDS
        for _, process in running:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, until - time.monotonic()))
            process.kill()
        for thread in self._threads:
            thread.join(2 * GONE_SECONDS)

    def _attend(self, number: int, process: "subprocess.Popen[bytes]", left: ExitStack) -> None:
        """Pass on what a daemon prints, and clean up after it."""
        assert process.stdout is not None
        assert process.stderr is not None
        readers = [
            threading.Thread(target=self._read, args=(number, stream, stderr), name="output", daemon=True)
            for stream, stderr in ((process.stdout, False), (process.stderr, True))
        ]
        for reader in readers:
            reader.start()
        code = process.wait()
        end_session(process.pid, GONE_SECONDS)
        for reader in readers:
            reader.join(GONE_SECONDS)
        with contextlib.suppress(OSError):
            left.close()
        with self._lock:
            del self._running[number]
            self._wanted.discard(number)
            self._workers.discard(number)
        log.tell("ended", id=number, code=code)
        self._say(pb.ServeRequest(exited=pb.Exited(id=number, code=128 - code if code < 0 else code)))

    def _read(self, number: int, stream: BinaryIO, stderr: bool) -> None:
        with stream:
            while data := os.read(stream.fileno(), _PIECE):
                self._say(pb.ServeRequest(output=pb.Output(id=number, stderr=stderr, data=data)))


def environment(environ: Mapping[str, str], address: str, reached: str) -> dict[str, str]:
    """What daemons are given: this agent's own environment without tokens and keys, and where its MPI is.

    Of several networks workers under Open MPI are to use that of ``address``, and its daemon, which calls the launcher
    beside the server, that of ``reached``, by which the server is; unless the environment says others.
    """
    prefix = sys.prefix
    kept = {name: value for name, value in environ.items() if name == "DPTRAIN_CACHE"}
    found = {name: value for name, value in environ.items() if not name.startswith("DPTRAIN_")} | kept
    found["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{found.get('PATH', os.defpath)}"
    libraries = [f"{prefix}/lib", found.get("LD_LIBRARY_PATH", "")]
    found["LD_LIBRARY_PATH"] = os.pathsep.join(filter(None, libraries))
    defaults = {"PRTE_PREFIX": prefix, "PMIX_PREFIX": prefix}
    for name, own in (("OMPI_MCA_btl_tcp_if_include", address), ("PRTE_MCA_prte_if_include", reached)):
        if network := network_of(own):
            defaults[name] = network
    return {**defaults, **found}


def reached_from(server: Address) -> str:
    """The address of this machine by which it reaches the server; nothing is sent."""
    if server.path:
        return "127.0.0.1"
    with contextlib.suppress(OSError):
        family, kind, protocol, _, place = socket.getaddrinfo(server.host, server.port or 1, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(place)
            found = str(probe.getsockname()[0])
            return str(ipaddress.ip_address(found.partition("%")[0]))
    return ""


def network_of(address: str) -> str:
    """The network, as ADDRESS/BITS, of an IPv4 address's interface; "" for loopback, and where there is none."""
    return interface_of(address)[1]


def interface_of(address: str) -> tuple[str, str]:
    """The name and the network, as ADDRESS/BITS, of an IPv4 address's interface; "" where there is none.

    Loopback's network is "", as Open MPI's launcher does not listen there.
    """
    import fcntl
    import struct

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            try:
                own = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)[20:24]
                mask = fcntl.ioctl(probe.fileno(), _SIOCGIFNETMASK, request)[20:24]
            except OSError:
                continue
            if socket.inet_ntoa(own) == address:
                found = ipaddress.ip_interface(f"{address}/{socket.inet_ntoa(mask)}")
                return name, "" if found.is_loopback else str(found.network)
    return "", ""


_SIOCGIFADDR, _SIOCGIFNETMASK = 0x8915, 0x891B
"""Of netdevice(7)."""


def _called_back(arguments: list[str], host: str) -> list[str]:
    """A proxy's arguments with the launcher's address as this node knows it: the launcher runs beside the server."""
    changed = list(arguments)
    for i, word in enumerate(changed[:-1]):
        port = _CONTROL.fullmatch(changed[i + 1])
        if word == "--control-port" and port is not None:
            changed[i + 1] = f"{host}:{port['port']}"
    return changed
