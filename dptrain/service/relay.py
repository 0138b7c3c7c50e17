"""From a launcher to a node: ``dptrain-rsh`` hands over what is to run there, and gets what comes of it.

A Unix socket in the server's folder, for the server's own user alone. A request is a line of JSON with ``node`` and one
of ``program`` and ``arguments``, with the ``ticket`` of a loan or without; ``port``, ``processes``, ``token`` and
``data``; ``look``; ``bring`` and ``ticket``. Or a supervisor ``lend``s its run directory, for as long as it is
connected, and then says where it is ``told``. The answer is frames of a letter, a length in four bytes, and content:
``o`` and ``e`` are output, ``x`` is the end, JSON with ``code`` and ``why``; ``t`` answers a loan, in JSON.
"""

import contextlib
import json
import os
import select
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dptrain import sockets
from dptrain.errors import DptrainError, UnreachableError
from dptrain.rsh import HEAD, SOCKET, UNREACHED
from dptrain.service.loans import Loans
from dptrain.service.nodes import Nodes, Start
from dptrain.service.shipping import Offers
from dptrain.v1 import agent_service_pb2 as pb
from dptrain.wire.backoff import MOST_SECONDS

_AGAIN = 0.1
_WORKERS_SECONDS = 60.0
"""For which the node of a parameter server's worker is waited for, before it is asked for anew."""

_MOST_REQUEST = 1 << 20


class Relay:
    """Listens in a folder that no other server has, from construction until ``close``."""

    def __init__(self, folder: Path, nodes: Nodes, offers: Offers, loans: Loans) -> None:
        self._nodes, self._offers, self._loans = nodes, offers, loans
        self._settled = time.monotonic() + MOST_SECONDS + 1.0
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        (folder / SOCKET).unlink(missing_ok=True)
        before = os.umask(0o177)
        try:
            with sockets.short(folder, SOCKET) as path:
                self._socket.bind(path)
        finally:
            os.umask(before)
        self._socket.listen(128)
        self._thread = threading.Thread(target=self._accept, name="relay", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Take nothing more. What runs goes on for as long as its node is connected."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._socket.close()

    def _accept(self) -> None:
        while True:
            try:
                caller, _ = self._socket.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(caller,), name="relay", daemon=True).start()

    def _serve(self, caller: socket.socket) -> None:
        """One request, from its line to its end."""
        with caller, contextlib.suppress(OSError):
            try:
                said = _line(caller)
                if "lend" in said:
                    self._lend(caller, said["lend"])
                    return
                name, ask, patience = self._request(said)
                start = self._begin(caller, name, ask, patience)
            except DptrainError as error:
                code = UNREACHED if isinstance(error, UnreachableError) else error.exit_code
                _send(caller, b"x", _ending(code, str(error)))
                return
            except (ValueError, KeyError, TypeError):
                _send(caller, b"x", _ending(UNREACHED, "the server was asked for something else"))
                return
            threading.Thread(target=self._watch, args=(caller, name, start), name="relay", daemon=True).start()
            try:
                _pass(caller, name, start)
            finally:
                self._nodes.end(name, start)
                # Whoever watches it sees the end.
                with contextlib.suppress(OSError):
                    caller.shutdown(socket.SHUT_RDWR)

    def _begin(
        self, caller: socket.socket, name: str, ask: Callable[[int], pb.ServeResponse], patience: float
    ) -> Start:
        """Ask a node, which is waited for: by a worker of a parameter server that goes on meanwhile, and where this
        server is so young that the node may not have come back.
        """
        until = max(self._settled, time.monotonic() + patience)
        while True:
            try:
                return self._nodes.begin(name, ask)
            except UnreachableError:
                # Readable: whoever asked is gone, as nothing more is said.
                if time.monotonic() > until or select.select([caller], [], [], _AGAIN)[0]:
                    raise

    def _lend(self, caller: socket.socket, said: dict[str, Any]) -> None:
        """Lend what a supervisor says until it is gone."""
        loan = self._loans.lend(said)
        try:
            _send(caller, b"t", json.dumps({"ticket": loan.ticket}).encode())
            loan.begin(Path(_line(caller)["told"]))
            _send(caller, b"t", b"{}")
            while caller.recv(1 << 12):
                pass
        finally:
            self._loans.end(loan)

    def _request(self, said: dict[str, Any]) -> tuple[str, Callable[[int], pb.ServeResponse], float]:
        """The node's name, what makes the message to it of a number, and for how many seconds the node is waited for.

        Raises ValueError, KeyError, TypeError.
        """
        if "bring" in said:
            brought = str(said["ticket"])
            return str(said["node"]), lambda number: pb.ServeResponse(bring=pb.Bring(id=number, ticket=brought)), 0.0
        if "look" in said:
            path = str(said["look"])
            return str(said["node"]), lambda number: pb.ServeResponse(look=pb.Look(id=number, path=path)), 0.0
        if "port" in said:
            port, processes, token = int(said["port"]), int(said["processes"]), str(said["token"])
            files = self._offers.offer(Path(said["data"])) if "data" in said else []
            return (
                str(said["node"]),
                lambda number: pb.ServeResponse(
                    work=pb.Work(id=number, port=port, processes=processes, token=token, files=files)
                ),
                _WORKERS_SECONDS,
            )
        program, arguments = str(said["program"]), [str(word) for word in said["arguments"]]
        ticket = str(said.get("ticket", ""))
        return (
            str(said["node"]),
            lambda number: pb.ServeResponse(
                start=pb.Start(id=number, program=program, arguments=arguments, ticket=ticket)
            ),
            0.0,
        )

    def _watch(self, caller: socket.socket, name: str, start: Start) -> None:
        """End what runs when whoever asked for it is gone."""
        with contextlib.suppress(OSError):
            while caller.recv(1 << 12):
                pass
        self._nodes.end(name, start)


def _line(caller: socket.socket) -> dict[str, Any]:
    """A line of JSON. Raises ValueError."""
    line = b""
    while not line.endswith(b"\n"):
        part = caller.recv(1 << 16)
        if not part or len(line) > _MOST_REQUEST:
            raise ValueError("no line")
        line += part
    said: dict[str, Any] = json.loads(line)
    return said


def _pass(caller: socket.socket, name: str, start: Start) -> None:
    """Hand on what comes of a start, until it has ended."""
    while True:
        event = start.events.get()
        if isinstance(event, pb.Exited):
            _send(caller, b"x", _ending(event.code, event.refused and f"node {name}: {event.refused}"))
            return
        _send(caller, b"e" if event.stderr else b"o", event.data)


def _send(caller: socket.socket, kind: bytes, content: bytes) -> None:
    caller.sendall(HEAD.pack(kind, len(content)) + content)


def _ending(code: int, why: str) -> bytes:
    return json.dumps({"code": code, "why": why}).encode()
