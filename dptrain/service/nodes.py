"""The machines that agents take part for: who they are, where they stand, and what is to be told to them.

Kept in memory alone: an agent comes back by itself, and says what it was told before.
"""

import queue
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum
from importlib.metadata import version
from typing import NamedTuple

from dptrain import launch
from dptrain.errors import (
    ArithmeticMismatch,
    BusyError,
    DptrainError,
    LaunchError,
    NotFoundError,
    UnreachableError,
    UsageError,
)
from dptrain.rsh import UNREACHED
from dptrain.service.model import MOST_WORKERS
from dptrain.v1 import agent_service_pb2 as pb

HEALTH_SECONDS = 3.0
"""How often an agent says how its node is."""

SILENT_SECONDS = 4 * HEALTH_SECONDS
"""Without a word from its agent for so long a node is lost."""

REMEMBERED_SECONDS = 3600.0
"""For which a lost node is still told of."""

APART_SECONDS = 60.0
"""By which a node's clock may differ from the server's before that is told."""

MOST_NODES = 512

_MOST_OUTPUT = 256
"""Pieces of output of a start that wait for whoever asked for it; more are dropped: a node must not wait for that."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}", re.ASCII)


class NodeState(IntEnum):
    """Where a node stands; numbers are those of the protos."""

    READY = 1
    DRAINED = 2
    LOST = 3


@dataclass(eq=False)
class Start:
    """What a node was asked for, and what comes of it: pieces of output, and at last how it ended."""

    id: int
    events: "queue.SimpleQueue[pb.Output | pb.Exited]" = field(default_factory=queue.SimpleQueue)


@dataclass(eq=False)
class Node:
    """A node from an agent's registration on. ``told`` is what its stream is to send; None ends it."""

    registration: pb.Registration
    heard: float
    drained: bool = False
    lost: str = ""
    health: pb.Health = field(default_factory=pb.Health)
    apart: float = 0.0
    """Seconds by which its clock is ahead of the server's, where that is worth telling."""
    starts: dict[int, Start] = field(default_factory=dict)
    told: "queue.SimpleQueue[pb.ServeResponse | None]" = field(default_factory=queue.SimpleQueue)

    @property
    def state(self) -> NodeState:
        """Where it stands."""
        return NodeState.LOST if self.lost else NodeState.DRAINED if self.drained else NodeState.READY


class View(NamedTuple):
    """A node at one moment; ``silent`` are the seconds since its agent last spoke."""

    registration: pb.Registration
    health: pb.Health
    state: NodeState
    message: str
    silent: float


class Here(NamedTuple):
    """What nodes are compared with: the server's machine, its MPI with the version, and the path of its Python.

    ``mpi`` None: the server takes no nodes.
    """

    name: str
    mpi: str | None
    python: str


class Nodes:
    """The nodes of a server. Any thread may call it.

    ``changed`` is called whenever the slots that take work may be others; ``tell`` is for the server's log.
    """

    def __init__(
        self,
        here: Here,
        changed: Callable[[], None],
        tell: Callable[..., None],
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self.here, self._changed, self._tell, self._clock, self._wall = here, changed, tell, clock, wall
        self._lock = threading.Lock()
        self._nodes: dict[str, Node] = {}
        self._started = 0
        self._closed = False

    def join(self, registration: pb.Registration) -> Node:
        """Take a node in. Raises what it is refused with."""
        _compared(registration, self.here)
        name = registration.name
        with self._lock:
            self._forget()
            before = self._nodes.get(name)
            self._compare(registration, before)
            node = Node(registration, self._clock(), drained=registration.drained)
            if before is not None and before.registration.instance == registration.instance:
                # Its connection broke, which the server's end of it need not know yet.
                before.lost = before.lost or "it came back by another connection"
                _end(before)
            self._nodes[name] = node
        self._tell("node joined", node=name, slots=registration.slots, address=registration.address)
        self._changed()
        return node

    def leave(self, node: Node, why: str) -> None:
        """A node's stream has ended: it is lost, or where no reason is given it has left by itself."""
        name = node.registration.name
        with self._lock:
            if self._nodes.get(name) is not node or node.lost:
                return
            node.lost, node.heard = why or "it has left", self._clock()
            _end(node)
            if not why:
                del self._nodes[name]
        if why:
            self._tell("node lost", node=name, error=why)
        else:
            self._tell("node left", node=name)
        self._changed()

    def hear(self, node: Node, health: pb.Health) -> None:
        """A node's agent has said how it is. No clock but this machine's monotonic one decides anything."""
        apart = health.clock - self._wall() if health.clock else 0.0
        with self._lock:
            node.health, node.heard = health, self._clock()
            before, node.apart = node.apart, apart if abs(apart) > APART_SECONDS else 0.0
        if (node.apart == 0.0) != (before == 0.0):
            said = _apart(node.apart) or "its clock is the server's again"
            self._tell("clock", node=node.registration.name, message=said)

    def begin(self, name: str, ask: Callable[[int], pb.ServeResponse]) -> Start:
        """Ask a node for something, by a number. Raises UnreachableError where it is not there."""
        with self._lock:
            node = self._nodes.get(name)
            if node is None or node.lost:
                raise UnreachableError(
                    f"node {name}",
                    expected="its agent to be connected",
                    found="none of that name" if node is None else node.lost,
                    cure="see whether `dptrain agent` runs there",
                )
            self._started += 1
            start = node.starts[self._started] = Start(self._started)
            node.told.put(ask(start.id))
        return start

    def end(self, name: str, start: Start) -> None:
        """Have what was asked for ended, unless it has ended already."""
        with self._lock:
            node = self._nodes.get(name)
            if node is not None and start.id in node.starts:
                node.told.put(pb.ServeResponse(kill=pb.Kill(id=start.id)))

    def happen(self, node: Node, event: pb.Output | pb.Exited) -> None:
        """Something has come of what a node was asked for."""
        with self._lock:
            start = node.starts.get(event.id)
            if start is None:
                return
            if isinstance(event, pb.Exited):
                del node.starts[event.id]
                if event.refused:
                    self._tell("node refused", node=node.registration.name, error=event.refused)
            if isinstance(event, pb.Exited) or start.events.qsize() < _MOST_OUTPUT:
                start.events.put(event)

    def silent(self, node: Node) -> bool:
        """Whether a node's agent has said nothing for too long."""
        with self._lock:
            return self._clock() - node.heard > SILENT_SECONDS

    def drain(self, name: str, drained: bool) -> View:
        """Have a node take no new work, or work again. Raises NotFoundError."""
        with self._lock:
            self._forget()
            node = self._nodes.get(name)
            if node is None:
                raise NotFoundError(
                    f"node {name}", expected="a node of an agent", found="none", cure="`dptrain nodes` lists them"
                )
            moved, node.drained = node.drained != drained, drained
            node.told.put(pb.ServeResponse(drain=pb.Drain(drained=drained)))
            seen = self._view(node)
        if moved:
            self._tell("node drained" if drained else "node resumed", node=name)
            self._changed()
        return seen

    def views(self) -> list[View]:
        """All nodes by name."""
        with self._lock:
            self._forget()
            return [self._view(self._nodes[name]) for name in sorted(self._nodes)]

    def states(self) -> dict[str, tuple[NodeState, int]]:
        """Where each node stands, and its slots."""
        with self._lock:
            return {name: (node.state, node.registration.slots) for name, node in self._nodes.items()}

    def close(self) -> None:
        """End all streams; agents come back to the next server."""
        with self._lock:
            self._closed = True
            for node in self._nodes.values():
                node.told.put(None)

    @property
    def closed(self) -> bool:
        """Whether the server stops."""
        return self._closed

    def _view(self, node: Node) -> View:
        silent = self._clock() - node.heard
        message = node.lost or "; ".join(filter(None, ("drained on request" * node.drained, _apart(node.apart))))
        return View(node.registration, node.health, node.state, message, silent)

    def _forget(self) -> None:
        now = self._clock()
        for name in [name for name, node in self._nodes.items() if node.lost and now - node.heard > REMEMBERED_SECONDS]:
            del self._nodes[name]

    def _compare(self, registration: pb.Registration, before: Node | None) -> None:
        """Raise what a registration is refused with because of what is there."""
        name = registration.name
        if name == self.here.name:
            raise _refused(
                name, "another name than the server's own machine", name, "give the agent one with --name", LaunchError
            )
        if before is not None and not before.lost and before.registration.instance != registration.instance:
            found = f"{name} at {before.registration.address}, which is there"
            raise _refused(
                name, "a name that no other node has", found, "give the agent another with --name", LaunchError
            )
        living = [node for key, node in self._nodes.items() if key != name and not node.lost]
        if len(living) >= MOST_NODES:
            raise _refused(name, f"at most {MOST_NODES} nodes", "one more", "end an agent", BusyError)
        for node in living:
            other = node.registration
            if other.host == registration.host and registration.mpi.startswith("Open MPI"):
                raise _refused(
                    name,
                    "a host name that no other node has, as Open MPI takes two of one for one",
                    f"{registration.host}, as node {other.name}",
                    "start one agent on a machine, with more --slots",
                    LaunchError,
                )
            if other.fingerprint != registration.fingerprint:
                raise _refused(
                    name,
                    f"the arithmetic of node {other.name} ({other.arithmetic})",
                    f"other bits ({registration.arithmetic})",
                    "let all nodes have the same kind of CPU, numpy and BLAS, or all be started with --portable",
                    ArithmeticMismatch,
                )


def mpi() -> str:
    """This installation's MPI with its version; "" where there is none."""
    try:
        return " ".join(launch.library_version())
    except LaunchError:
        return ""


def _apart(seconds: float) -> str:
    """What is said of a node whose clock is so far ahead; "" where it is not."""
    if not seconds:
        return ""
    minutes = round(abs(seconds) / 60)
    far = f"{minutes // 60} h {minutes % 60:02} min" if minutes >= 60 else f"{minutes} min"
    way = "ahead of" if seconds > 0 else "behind"
    return f"its clock is {far} {way} the server's: set both, as by NTP"


def _end(node: Node) -> None:
    """End a node's stream, and what was asked for over it."""
    node.told.put(None)
    for start in node.starts.values():
        start.events.put(pb.Exited(id=start.id, code=UNREACHED, refused=f"it is lost: {node.lost}"))
    node.starts.clear()


def _compared(said: pb.Registration, here: Here) -> None:
    """Raise what a registration is refused with for itself."""
    if here.mpi is None:
        raise LaunchError(
            "the server",
            expected="to be one that runs jobs on the nodes of agents",
            found="one that runs them on its own machine",
            cure="start it with `dptrain serve --agents`",
        )
    if _NAME.fullmatch(said.name) is None:
        raise _refused(
            repr(said.name[:80]),
            "1 to 63 letters, digits, '-', '_' and '.', a letter or digit first",
            "another name",
            "give the agent one with --name",
            UsageError,
        )
    ours = version("dptrain")
    if said.version != ours:
        raise _refused(
            said.name,
            f"dptrain {ours}, as the server",
            f"dptrain {said.version}",
            "install the same version on both sides",
            UsageError,
        )
    if not 1 <= said.slots <= MOST_WORKERS:
        raise _refused(said.name, f"1 to {MOST_WORKERS} slots", str(said.slots), "correct --slots", UsageError)
    if said.mpi != here.mpi:
        raise _refused(
            said.name,
            f"{here.mpi or 'no MPI'}, as the server",
            said.mpi or "no MPI",
            "install the same MPI on both sides",
            LaunchError,
        )
    if said.python != here.python:
        raise _refused(
            said.name,
            f"Python at {here.python}, as on the server, whose launcher starts workers by that path",
            said.python,
            "install dptrain in the same place on both sides",
            LaunchError,
        )


def _refused(name: str, expected: str, found: str, cure: str, kind: type[DptrainError]) -> DptrainError:
    return kind(f"node {name}", expected=expected, found=found, cure=cure)
