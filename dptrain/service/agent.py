"""``dptrain agent``: takes part for its machine. It dials out to the server, and nobody dials in.

One stream, made again whenever it breaks, until the agent is asked to stop or the server refuses it for good.
"""

import contextlib
import os
import queue
import random
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, MutableMapping
from importlib.metadata import version
from pathlib import Path
from types import FrameType

import grpc

from dptrain import arithmetic
from dptrain.errors import BusyError, DptrainError, StorageError, UnreachableError, UsageError
from dptrain.service import log
from dptrain.service.daemons import Daemons, interface_of, reached_from
from dptrain.service.model import MOST_WORKERS
from dptrain.service.nodes import mpi
from dptrain.v1 import agent_service_pb2 as pb
from dptrain.v1 import agent_service_pb2_grpc
from dptrain.wire.address import Address
from dptrain.wire.backoff import delays
from dptrain.wire.channel import connect
from dptrain.wire.limits import Patience
from dptrain.wire.security import Calling, ClientTls
from dptrain.wire.statuses import told
from dptrain.wire.version import agree

LEAVING_SECONDS = 2.0
"""In which the server must have ended the stream of an agent that leaves."""

_REQUESTS = (signal.SIGTERM, signal.SIGINT)


def registration(name: str, slots: int, server: Address, address: str = "") -> pb.Registration:
    """What this machine is; others reach it by ``address``, or as the server does. Raises UsageError."""
    if not 1 <= slots <= MOST_WORKERS:
        raise UsageError(
            "--slots", expected=f"1 to {MOST_WORKERS} workers", found=str(slots), cure="one a core is usual"
        )
    arithmetic.choose("native", 1)
    page = os.sysconf("SC_PAGE_SIZE")
    return pb.Registration(
        name=name or socket.gethostname(),
        instance=secrets.token_hex(16),
        slots=slots,
        version=version("dptrain"),
        arithmetic=arithmetic.named(arithmetic.describe("native", 1)),
        fingerprint=arithmetic.kernel_hash(),
        address=address or reached_from(server),
        cores=len(os.sched_getaffinity(0)),
        memory_bytes=page * os.sysconf("SC_PHYS_PAGES"),
        mpi=mpi(),
        python=sys.executable,
        host=socket.gethostname(),
    )


class Agent:
    """Takes part as registered until it is asked to stop; call ``run`` from the main thread.

    A file ``ready`` is there while it takes part. Raises StorageError where it can't be.
    """

    def __init__(
        self, said: pb.Registration, server: Address, calling: Calling, patience: Patience, ready: Path | None = None
    ) -> None:
        self._registration, self._server, self._calling, self._patience = said, server, calling, patience
        self._ready = _Ready(ready)
        self._asked = threading.Event()
        self._stream: _Stream | None = None

    def run(self) -> None:
        """Return when asked to stop by SIGTERM or SIGINT. Raises what the server refuses this node with."""
        before = {number: signal.signal(number, self._ask) for number in _REQUESTS}
        try:
            pauses, complaint = delays(random.Random()), ""
            while not self._asked.is_set():
                try:
                    if self._take_part():
                        pauses, complaint = delays(random.Random()), ""
                    continue
                except (UnreachableError, BusyError) as error:
                    if str(error) != complaint:
                        complaint = str(error)
                        log.tell("no connection, tries again", error=complaint)
                self._asked.wait(next(pauses))
        finally:
            for number, old in before.items():
                signal.signal(number, old)

    def _take_part(self) -> bool:
        """One connection, from its beginning to its end; True where it was cut off without a word."""
        with contextlib.closing(connect(self._server, self._calling, patience=self._patience)) as channel:
            agree(channel, self._server, self._patience)
            tls = self._calling.tls
            self._stream = stream = _Stream(channel, self._registration, self._server, tls, self._ready)
            if self._asked.is_set():
                return False
            try:
                stream.go()
            finally:
                self._stream = None
                self._ready.say(False)
                stream.end()
                # Nobody may write any more who is not led by the server.
                stream.daemons.close()
        return True

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self._asked.set()
        stream = self._stream
        if stream is not None:
            stream.leave()


class _Stream:
    """One stream to the server."""

    def __init__(
        self, channel: grpc.Channel, said: pb.Registration, server: Address, tls: ClientTls | None, ready: "_Ready"
    ) -> None:
        self._stub, self._server = agent_service_pb2_grpc.AgentServiceStub(channel), server
        self._registration, self._ready = said, ready
        self._said: queue.SimpleQueue[pb.ServeRequest | None] = queue.SimpleQueue()
        self._said.put(pb.ServeRequest(registration=said))
        self._ended = threading.Event()
        self._leaves = False
        self._call: grpc.Call | None = None
        self.daemons = Daemons(
            self._said.put, server, said.address, os.environ, self._fetch, self._carry, None if tls is None else tls.ca
        )

    def go(self) -> None:
        """Until the server ends it, or this node leaves. Raises DptrainError."""
        call = self._stub.Serve(self._requests())
        self._call = call
        try:
            with told(self._server):
                for message in call:
                    self._hear(message)
        except DptrainError:
            if not self._leaves:
                raise

    def leave(self) -> None:
        """Say that this node takes no more part; from a signal handler."""
        self._leaves = True
        self._said.put(pb.ServeRequest(leaving=pb.Leaving()))
        self._said.put(None)
        timer = threading.Timer(LEAVING_SECONDS, self.end)
        timer.daemon = True
        timer.start()

    def end(self) -> None:
        """Be done with it."""
        self._ended.set()
        self._said.put(None)
        if self._call is not None:
            self._call.cancel()

    def _fetch(self, digest: str) -> Iterator[bytes]:
        """A file of a job's data. Raises DptrainError."""
        with told(self._server):
            for part in self._stub.FetchFile(pb.FetchFileRequest(sha256=digest)):
                yield part.data

    def _carry(self, asked: Iterator[pb.CarryRequest]) -> Iterator[pb.CarryResponse]:
        """What workers ask of their supervisor. Raises DptrainError."""
        call = self._stub.Carry(asked)
        try:
            with told(self._server):
                yield from call
        finally:
            call.cancel()

    def _requests(self) -> Iterator[pb.ServeRequest]:
        while (message := self._said.get()) is not None:
            yield message

    def _hear(self, message: pb.ServeResponse) -> None:
        kind = message.WhichOneof("told")
        if kind == "welcome":
            name, slots = self._registration.name, self._registration.slots
            log.tell("takes part", node=name, slots=slots, server=str(self._server))
            self._ready.say(True)
            seconds = message.welcome.health_seconds
            threading.Thread(target=self._report, args=(seconds,), name="health", daemon=True).start()
        elif kind == "drain":
            self._registration.drained = message.drain.drained
            log.tell("drained" if message.drain.drained else "takes work again")
        elif kind == "start":
            self.daemons.start(message.start)
        elif kind == "look":
            self.daemons.look(message.look)
        elif kind == "work":
            self.daemons.work(message.work)
        elif kind == "bring":
            self.daemons.bring(message.bring)
        elif kind == "kill":
            self.daemons.kill(message.kill.id)

    def _report(self, seconds: float) -> None:
        """Say how this node is, again and again."""
        while True:
            free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
            health = pb.Health(free_memory_bytes=free, load=os.getloadavg()[0], clock=time.time())
            self._said.put(pb.ServeRequest(health=health))
            if self._ended.wait(seconds):
                return


class _Ready:
    """A file that is there while its agent takes part; none of one before is left."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self.say(False)

    def say(self, ready: bool) -> None:
        """Make it or remove it. Raises StorageError."""
        if self._path is None:
            return
        try:
            if ready:
                self._path.touch()
            else:
                self._path.unlink(missing_ok=True)
        except OSError as error:
            raise StorageError(
                f"--ready {self._path}",
                expected="a file that can be made and removed",
                found=error.strerror or str(error),
                cure="choose another",
            ) from None


def use(address: str, environ: MutableMapping[str, str]) -> None:
    """Have MPI use the network of this address of the machine's own, unless the environment says another.

    Open MPI takes it from the registration. Raises UsageError.
    """
    interface, _ = interface_of(address)
    if not interface:
        raise UsageError(
            "--address", expected="an IPv4 address of this machine", found=address, cure="`ip address` lists them"
        )
    environ.setdefault("UCX_NET_DEVICES", interface)
    environ.setdefault("FI_TCP_IFACE", interface)
