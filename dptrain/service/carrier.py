"""The node's end of a loan: what the workers of a launch ask for is carried to the server, and the answers back."""

import contextlib
import json
import queue
import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

from dptrain import afar, sockets
from dptrain.errors import DptrainError
from dptrain.service.shipping import received
from dptrain.v1 import agent_service_pb2 as pb

Carry = Callable[[Iterator[pb.CarryRequest]], Iterator[pb.CarryResponse]]
"""Requests of one connection to the answers. Raises DptrainError."""


def brought(
    ticket: str, carry: Carry, fetch: Callable[[str], Iterable[bytes]], folder: Path
) -> tuple[bytes, dict[str, str]]:
    """The job of a launch, in JSON, and where its files are here, by their paths there; what lacks is fetched.

    Raises DptrainError.
    """
    (lent,) = carry(iter([pb.CarryRequest(ticket=ticket)]))
    found = {}
    for item in lent.items:
        place = received(item.files, fetch, folder)
        found[item.path] = str(place / item.file if item.file and place.is_dir() else place)
    return lent.job, found


class Carrier:
    """Listens in a folder of this user's alone for the workers of a launch, from construction until it is left."""

    def __init__(self, folder: Path, ticket: str, carry: Carry, job: bytes, files: dict[str, str]) -> None:
        self._ticket, self._carry = ticket, carry
        (folder / afar.LAUNCH).write_text(json.dumps({"job": json.loads(job), "files": files}))
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        with sockets.short(folder, afar.SOCKET) as path:
            self._socket.bind(path)
        self._socket.listen(128)
        self._lock = threading.Lock()
        self._callers: set[socket.socket] = set()
        self._thread = threading.Thread(target=self._accept, name="carrier", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._socket.close()
        with self._lock:
            for caller in self._callers:
                with contextlib.suppress(OSError):
                    caller.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        while True:
            try:
                caller, _ = self._socket.accept()
            except OSError:
                return
            with self._lock:
                self._callers.add(caller)
            threading.Thread(target=self._serve, args=(caller,), name="carrier", daemon=True).start()

    def _serve(self, caller: socket.socket) -> None:
        """One connection: when either side ends, so does the other."""
        asked: queue.Queue[pb.CarryRequest | None] = queue.Queue(afar.UNDER_WAY)
        try:
            with contextlib.suppress(OSError, DptrainError):
                threading.Thread(target=self._hear, args=(caller, asked), name="carrier", daemon=True).start()
                for answer in self._carry(iter(asked.get, None)):
                    head = afar.HEAD.pack(len(answer.answered), len(answer.data))
                    caller.sendall(head + answer.answered)
                    if answer.data:
                        caller.sendall(answer.data)
        finally:
            with self._lock:
                self._callers.discard(caller)
            # To close it would not wake who reads from it.
            with contextlib.suppress(OSError):
                caller.shutdown(socket.SHUT_RDWR)
            # Neither who waits for room here nor who waits for a request is to wait for ever.
            with contextlib.suppress(queue.Empty):
                while True:
                    asked.get_nowait()
            with contextlib.suppress(queue.Full):
                asked.put_nowait(None)
            caller.close()

    def _hear(self, caller: socket.socket, asked: "queue.Queue[pb.CarryRequest | None]") -> None:
        """Read requests; a full queue has the worker wait."""
        ticket = self._ticket
        try:
            while True:
                content, data = afar.take_raw(caller)
                asked.put(pb.CarryRequest(ticket=ticket, asked=content, data=data))
                ticket = ""
        except OSError:
            asked.put(None)
