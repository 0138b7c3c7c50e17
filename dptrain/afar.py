"""The run directory of another machine, for workers whose node sees no folder of it: by way of the node's agent.

The agent names a folder of the node in the environment. In it are the socket that it listens at and the launch: the
job, and where its files are on this node. A request is a head, JSON and bytes, and so is its answer, in order; every
request may be made twice, so one that a broken connection left without its answer is made again.

What is written belongs to an epoch of the launch, which each recovery raises. Whoever writes under another than the
newest is refused: a side that was cut off, or a chief that was stopped and goes on, changes nothing any more.
"""

import contextlib
import errno
import hashlib
import json
import os
import queue
import socket
import stat
import struct
import threading
import time
import zlib
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PosixPath
from typing import Any, Self

from dptrain import sockets

FOLDER = "DPTRAIN_AFAR"
"""Of the environment: names the folder."""

TICKET = "DPTRAIN_TICKET"
"""Of a launcher's environment: by which its server knows what it lends to the workers. Workers are not told it."""

SOCKET, LAUNCH = "agent.sock", "launch.json"
"""Of the folder."""

HEAD = struct.Struct("!II")
"""Before a request and an answer: how many bytes of JSON, and how many others, follow."""

CHUNK = 1 << 20
"""The most bytes of a request or an answer."""

PATIENCE = 15.0
"""Seconds in which a broken connection must be there again."""

SILENCE = 60.0
"""Seconds in which a request must be answered: the longest that a disk may take for a checkpoint's chunk."""

UNDER_WAY = 8
"""Requests at a time that have no answer yet."""

UNSENT = 1024
"""Pieces that may wait to be appended, before who appends is to wait or keep them."""

_AGAIN = 0.05
_WAIT = 1.0
_FLUSH = 20.0
"""Seconds in which all that was appended must be there when a file is closed."""


class _Standing:
    """Under which epoch of its launch this process writes: the number of recoveries before, and the chief's rank."""

    epoch: tuple[int, int] | None = None


def reached() -> bool:
    """Whether this process writes to another machine."""
    return FOLDER in os.environ


def launch() -> dict[str, Any]:
    """What the supervisor lends: ``job``, and ``files``, where they are on this node by their paths over there."""
    with open(os.path.join(os.environ[FOLDER], LAUNCH), encoding="utf-8") as file:
        found: dict[str, Any] = json.load(file)
    return found


def place(path: str | os.PathLike[str]) -> Path:
    """A run directory: on this machine, or on the supervisor's where that is another."""
    return FarPath(str(path)) if reached() else Path(path)


def renew(recoveries: int, chief: int) -> None:
    """All workers call this as the run begins and after each recovery, before the chief claims the epoch."""
    _Standing.epoch = (recoveries, chief)


def claim() -> None:
    """The chief calls this first of all: from now on nobody writes under an older epoch. Raises OSError."""
    if reached():
        _ask({"do": "claim"})


def tell(name: str, content: Mapping[str, Any], *, once: bool = False, added: bool = False) -> None:
    """Tell the supervisor something; ``once``: unless it knows, ``added``: with what it knows. Raises OSError."""
    _ask({"do": "tell", "name": name, "content": dict(content), "once": once, "added": added})


class Line:
    """One connection, made when it is needed and made again when it breaks. Any thread may use it, one at a time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None

    def ask(self, asked: Mapping[str, Any], data: "bytes | memoryview" = b"") -> tuple[dict[str, Any], bytes]:
        """One request and its answer. Raises OSError."""
        (answer,) = self.all([(asked, data)])
        return answer

    def all(
        self, requests: "Iterable[tuple[Mapping[str, Any], bytes | memoryview]]"
    ) -> Iterator[tuple[dict[str, Any], bytes]]:
        """The answers to requests in order, several of which are under way at a time. Raises OSError."""
        with self._lock:
            epoch, left = _Standing.epoch, iter(requests)
            waiting: deque[tuple[bytes, bytes | memoryview]] = deque()
            more = True
            while more or waiting:
                if more and len(waiting) < UNDER_WAY:
                    found = next(left, None)
                    more = found is not None
                    if found is not None:
                        content = json.dumps({**found[0], "epoch": epoch}, separators=(",", ":")).encode()
                        waiting.append((content, found[1]))
                        self._send(waiting, waiting[-1])
                    continue
                answer, data = self._answer(waiting)
                waiting.popleft()
                if "error" in answer:
                    self._drop()
                    raise OSError(answer["error"], answer["why"])
                yield answer, data

    def close(self) -> None:
        """Be done with it."""
        with self._lock:
            self._drop()

    def _send(
        self, waiting: "deque[tuple[bytes, bytes | memoryview]]", one: "tuple[bytes, bytes | memoryview]"
    ) -> None:
        try:
            _put(self._open(), one)
        except OSError:
            self._again(waiting)

    def _answer(self, waiting: "deque[tuple[bytes, bytes | memoryview]]") -> tuple[dict[str, Any], bytes]:
        while True:
            try:
                assert self._socket is not None
                return take(self._socket)
            except TimeoutError:
                self._drop()
                raise
            except OSError:
                self._again(waiting)

    def _again(self, waiting: "deque[tuple[bytes, bytes | memoryview]]") -> None:
        """Connect again and make all requests again that have no answer."""
        until = time.monotonic() + PATIENCE
        while True:
            self._drop()
            try:
                for one in waiting:
                    _put(self._open(), one)
            except OSError as error:
                if time.monotonic() > until:
                    raise OSError(errno.EHOSTUNREACH, f"the supervisor's machine is not reached ({error})") from None
                time.sleep(_AGAIN)
            else:
                return

    def _open(self) -> socket.socket:
        if self._socket is None:
            made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                made.settimeout(SILENCE)
                with sockets.short(os.environ[FOLDER], SOCKET) as path:
                    made.connect(path)
            except OSError:
                made.close()
                raise
            self._socket = made
        return self._socket

    def _drop(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None


def _put(connection: socket.socket, one: "tuple[bytes, bytes | memoryview]") -> None:
    content, data = one
    connection.sendall(HEAD.pack(len(content), len(data)) + content)
    if len(data):
        connection.sendall(data)


def take(connection: socket.socket) -> tuple[dict[str, Any], bytes]:
    """One request or answer. Raises OSError where the connection ends before it does."""
    content, data = take_raw(connection)
    found: dict[str, Any] = json.loads(content)
    return found, data


def take_raw(connection: socket.socket) -> tuple[bytes, bytes]:
    """One request or answer, unread."""
    asked, more = HEAD.unpack(_exactly(connection, HEAD.size))
    if asked > CHUNK or more > CHUNK:
        raise ConnectionError("no request")
    return _exactly(connection, asked), _exactly(connection, more)


def _exactly(connection: socket.socket, count: int) -> bytes:
    found = bytearray(count)
    view = memoryview(found)
    while len(view):
        got = connection.recv_into(view)
        if not got:
            raise ConnectionError("the connection has ended")
        view = view[got:]
    return bytes(found)


def _ask(asked: Mapping[str, Any]) -> dict[str, Any]:
    line = Line()
    try:
        return line.ask(asked)[0]
    finally:
        line.close()


_LINE = Line()


class FarPath(PosixPath):
    """A path on the supervisor's machine, at or below the run directory, by the supervisor's name for it.

    What is not defined here fails: as a path of this machine it means nothing.
    """

    def __fspath__(self) -> str:
        raise TypeError(f"{self} is a path of another machine")

    def stat(self, *, follow_symlinks: bool = True) -> os.stat_result:
        """Its kind, size, inode and time of change."""
        found, _ = _LINE.ask({"do": "stat", "path": str(self)})
        if "mode" not in found:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self))
        seconds = found["mtime_ns"] // 10**9
        plain = (found["mode"], found["inode"], 0, 1, 0, 0, found["size"], seconds, seconds, seconds)
        return os.stat_result(plain, {"st_mtime_ns": found["mtime_ns"]})

    def exists(self, *, follow_symlinks: bool = True) -> bool:
        """Whether something is there."""
        try:
            self.stat()
        except FileNotFoundError:
            return False
        return True

    def is_dir(self, *, follow_symlinks: bool = True) -> bool:
        """Whether it is a folder."""
        try:
            return stat.S_ISDIR(self.stat().st_mode)
        except FileNotFoundError:
            return False

    def is_file(self, *, follow_symlinks: bool = True) -> bool:
        """Whether it is a file."""
        try:
            return stat.S_ISREG(self.stat().st_mode)
        except FileNotFoundError:
            return False

    def iterdir(self) -> Iterator[Self]:  # type: ignore[override]
        """What is in a folder."""
        found, _ = _LINE.ask({"do": "list", "path": str(self)})
        return iter([self / name for name in found["names"]])

    def mkdir(self, mode: int = 0o777, parents: bool = False, exist_ok: bool = False) -> None:
        """Make a folder, and those above it; one that is there already is left as it is."""
        _LINE.ask({"do": "mkdir", "path": str(self)})

    def rename(self, target: "str | os.PathLike[str]") -> Self:
        """Give it another name, in place of what had that; after it returns that survives a crash."""
        _LINE.ask({"do": "rename", "path": str(self), "to": str(target)})
        return type(self)(str(target))

    def replace(self, target: "str | os.PathLike[str]") -> Self:
        """See ``rename``."""
        return self.rename(target)

    def unlink(self, missing_ok: bool = False) -> None:
        """Remove it."""
        self.remove()

    def remove(self) -> None:
        """Remove it, and all that is in it; nothing happens where nothing is there."""
        _LINE.ask({"do": "remove", "path": str(self)})

    def read_bytes(self) -> bytes:
        """Its content."""
        size = self.stat().st_size
        asked = (({"do": "read", "path": str(self), "at": at}, b"") for at in range(0, size, CHUNK))
        return b"".join(data for _, data in _LINE.all(asked))

    def write_whole(self, pieces: Sequence[memoryview]) -> None:
        """Make a file; after it returns the content is on the disk, and was read back from it."""
        total, digest = sum(len(piece) for piece in pieces), hashlib.sha256()

        def requests() -> Iterator[tuple[dict[str, Any], memoryview]]:
            at = 0
            for piece in pieces:
                for start in range(0, len(piece), CHUNK):
                    part = piece[start : start + CHUNK]
                    digest.update(part)
                    said = {"do": "write", "path": str(self), "at": at, "total": total, "crc": zlib.crc32(part)}
                    yield said, part
                    at += len(part)
            yield {"do": "settle", "path": str(self), "total": total, "sha256": digest.hexdigest()}, memoryview(b"")

        # Of its own connection: what else is asked meanwhile does not wait for the disk.
        line = Line()
        try:
            for _ in line.all(requests()):
                pass
        finally:
            line.close()


class Appending:
    """A file on the supervisor's machine to whose end is written, by a thread: who writes waits for no network.

    Nothing is dropped: while what was written before can't be sent, or too much of it waits, ``write`` raises OSError.
    """

    def __init__(self, path: FarPath) -> None:
        self._path, self._line = path, Line()
        found, _ = self._line.ask({"do": "end", "path": str(path)})
        self._at: int = found["size"]
        self.torn: bool = found["torn"]
        self._pieces: queue.Queue[bytes | None] = queue.Queue(UNSENT)
        self._failed: OSError | None = None
        self._retry = threading.Event()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._send, name="appending", daemon=True)
        self._thread.start()

    def write(self, data: bytes) -> int:
        """Have it appended. Raises OSError where it was not taken."""
        if self._failed is not None:
            self._retry.set()
            raise self._failed
        try:
            self._pieces.put(data, timeout=_WAIT)
        except queue.Full:
            raise OSError(errno.EAGAIN, "the supervisor's machine is too slow") from None
        return len(data)

    def close(self, *, durable: bool = True) -> None:
        """Return when all is there and on its disk. Raises OSError where it is not."""
        self._retry.set()
        try:
            self._pieces.put(None, timeout=_FLUSH)
            self._over.wait(_FLUSH)
        except queue.Full:
            pass
        whole = self._over.is_set() and self._failed is None
        try:
            if whole and durable:
                self._line.ask({"do": "sync", "path": str(self._path)})
        finally:
            if self._over.is_set():
                self._line.close()
        if not whole:
            raise self._failed or OSError(errno.EAGAIN, "the supervisor's machine is too slow")

    def _send(self) -> None:
        ends = False
        while not ends:
            pieces = [self._pieces.get()]
            with contextlib.suppress(queue.Empty):
                while sum(len(piece or b"") for piece in pieces) < CHUNK >> 1:
                    pieces.append(self._pieces.get_nowait())
            ends = pieces[-1] is None
            data = b"".join(piece for piece in pieces if piece is not None)
            for start in range(0, len(data), CHUNK):
                if not self._append(data[start : start + CHUNK]):
                    ends = True
                    break
        self._over.set()

    def _append(self, data: bytes) -> bool:
        """Send it, again and again; False where this will never be done."""
        while True:
            said = {"do": "append", "path": str(self._path), "at": self._at, "crc": zlib.crc32(data)}
            try:
                self._line.ask(said, data)
            except OSError as error:
                self._failed = error
                if error.errno == errno.ESTALE:
                    return False
                self._retry.wait(1.0)
                self._retry.clear()
            else:
                self._at += len(data)
                self._failed = None
                return True
