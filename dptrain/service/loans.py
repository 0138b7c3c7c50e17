"""What a supervisor lends to the workers of one launch on nodes that see no folder of it: its run directory, and the
job's files by digest.

A loan is for one launch and known by a ticket, which nobody can guess. It ends with the launch, at the latest when the
supervisor's connection does: from then on nothing is written under it. Within a launch the chief claims an epoch, and
what comes under another is refused. The requests are those of :mod:`dptrain.afar`; each may come twice.
"""

import contextlib
import errno
import hashlib
import json
import os
import secrets
import shutil
import threading
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from dptrain import checkpoint, supervision
from dptrain.afar import CHUNK
from dptrain.errors import NotFoundError
from dptrain.service.shipping import Offers
from dptrain.v1 import agent_service_pb2 as pb

_TOLD = (supervision.RUN, supervision.FAILURE, supervision.ENDED, supervision.LOST)
_READ_BACK = 1 << 18

Answer = tuple[dict[str, Any], bytes]


class Loan:
    """One loan: ``name`` is what the workers call the run directory ``root``."""

    def __init__(self, name: str, root: Path, job: Mapping[str, Any], items: Sequence[pb.LentItem]) -> None:
        self.ticket = secrets.token_hex(16)
        self.job, self.items = job, items
        self._name, self._root = PurePosixPath(name), root
        self._told: Path | None = None
        self._lock = threading.Lock()
        self._epoch: tuple[int, int] | None = None
        self._ended = False
        self._does: Mapping[str, Callable[[Mapping[str, Any], bytes], Answer]] = {
            "list": self._list,
            "stat": self._stat,
            "read": self._read,
            "end": self._end,
            "mkdir": self._mkdir,
            "rename": self._rename,
            "remove": self._remove,
            "write": self._write,
            "settle": self._settle,
            "append": self._append,
            "sync": self._sync,
        }

    def begin(self, told: Path) -> None:
        """The launch begins; what its workers tell goes to the supervisor's own folder."""
        self._told = told

    def end(self) -> None:
        """Nothing is done under it any more: when this returns the last has been."""
        with self._lock:
            self._ended = True

    def do(self, content: bytes, data: bytes) -> Answer:
        """What a worker asks for. Nothing is raised: the answer says what went wrong."""
        try:
            asked = json.loads(content)
            if asked["do"] in ("claim", "tell"):
                return self._claim(asked) if asked["do"] == "claim" else self._tell(asked)
            return self._does[asked["do"]](asked, data)
        except OSError as error:
            return {"error": error.errno or errno.EIO, "why": error.strerror or str(error)}, b""
        except (ValueError, KeyError, TypeError, AttributeError):
            return {"error": errno.EINVAL, "why": "it was asked for something else"}, b""

    def _claim(self, asked: Mapping[str, Any]) -> Answer:
        recoveries, chief = asked["epoch"]
        with self._lock:
            mine = (int(recoveries), int(chief))
            if self._epoch is not None and mine != self._epoch and mine[0] <= self._epoch[0]:
                raise _stale(mine)
            self._check_ended()
            self._epoch = mine
        return {}, b""

    def _check(self, asked: Mapping[str, Any]) -> None:
        """Raise OSError unless this comes from who writes now. Call it with the lock, and do it before that is gone."""
        self._check_ended()
        if asked["epoch"] is None or tuple(asked["epoch"]) != self._epoch:
            raise _stale(asked["epoch"])

    def _check_ended(self) -> None:
        if self._ended:
            raise OSError(errno.ESTALE, "this launch is over, and another may have begun")

    def _tell(self, asked: Mapping[str, Any]) -> Answer:
        name, content = asked["name"], dict(asked["content"])
        if name not in _TOLD or self._told is None:
            raise ValueError
        with self._lock:
            self._check_ended()
            said = asked["epoch"] and tuple(asked["epoch"])
            if said and self._epoch is not None and said != self._epoch and said[0] <= self._epoch[0]:
                raise _stale(said)
            path = self._told / name
            if asked["added"]:
                # By this machine's clock: the supervisor asks how long ago it was.
                line = json.dumps(content | {"time": time.time()}).encode() + b"\n"
                with path.open("ab", buffering=0) as file:
                    file.write(line)
            elif not (asked["once"] and path.exists()):
                part = path.with_name(f".{name}.{secrets.token_hex(4)}")
                part.write_bytes(json.dumps(content).encode())
                part.replace(path)
        return {}, b""

    def _at(self, path: str) -> Path:
        """A path below the run directory, or that. Raises ValueError for any other."""
        below = PurePosixPath(path).relative_to(self._name)
        if ".." in below.parts or "\0" in path:
            raise ValueError(path)
        return self._root / below

    def _list(self, asked: Mapping[str, Any], data: bytes) -> Answer:
        return {"names": sorted(os.listdir(self._at(asked["path"])))}, b""

    def _stat(self, asked: Mapping[str, Any], data: bytes) -> Answer:
        try:
            found = self._at(asked["path"]).stat()
        except FileNotFoundError:
            return {}, b""
        said = {"mode": found.st_mode, "inode": found.st_ino, "size": found.st_size, "mtime_ns": found.st_mtime_ns}
        return said, b""

    def _read(self, asked: Mapping[str, Any], data: bytes) -> Answer:
        with self._at(asked["path"]).open("rb") as file:
            return {}, os.pread(file.fileno(), CHUNK, int(asked["at"]))

    def _end(self, asked: Mapping[str, Any], data: bytes) -> Answer:
        """A file to be appended to, made if need be: its size, and whether its last line has no end."""
        with self._lock:
            self._check(asked)
            with self._at(asked["path"]).open("ab+") as file:
                size = os.fstat(file.fileno()).st_size
                return {"size": size, "torn": size > 0 and os.pread(file.fileno(), 1, size - 1) != b"\n"}, b""

    def _mkdir(self, asked: Mapping[str, Any], data: bytes) -> Answer:
        with self._lock:
            self._check(asked)
            path = self._at(asked["path"])
            path.mkdir(parents=True, exist_ok=True)
            checkpoint.flush_folder(path.parent)
        return {}, b""

    def _rename(self, asked: Mapping[str, Any], data: bytes) -> Answer:
        with self._lock:
            self._check(asked)
            source, target = self._at(asked["path"]), self._at(asked["to"])
            if source.exists() or not target.exists():
                source.rename(target)
            checkpoint.flush_folder(target.parent)
        return {}, b""

    def _remove(self, asked: Mapping[str, Any], data: bytes) -> Answer:
        with self._lock:
            self._check(asked)
            path = self._at(asked["path"])
            if path == self._root:
                raise ValueError(path)
            with contextlib.suppress(FileNotFoundError):
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink()
        return {}, b""

    def _write(self, asked: Mapping[str, Any], data: bytes) -> Answer:
        """A part of a new file, which is not to be seen before it has its own name."""
        _intact(asked, data)
        with self._lock:
            self._check(asked)
            handle = os.open(self._at(asked["path"]), os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        try:
            if not asked["at"] and asked["total"]:
                os.posix_fallocate(handle, 0, int(asked["total"]))
            _write_at(handle, data, int(asked["at"]))
        finally:
            os.close(handle)
        return {}, b""

    def _settle(self, asked: Mapping[str, Any], data: bytes) -> Answer:
        """The end of a new file: it is on the disk, and what the disk holds is what was sent."""
        path = self._at(asked["path"])
        with self._lock:
            self._check(asked)
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        try:
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            digest, at = hashlib.sha256(), 0
            while part := os.pread(handle, _READ_BACK, at):
                digest.update(part)
                at += len(part)
        finally:
            os.close(handle)
        if at != asked["total"] or digest.hexdigest() != asked["sha256"]:
            raise OSError(errno.EIO, f"{path.name} reads back differently from what was sent")
        return {}, b""

    def _append(self, asked: Mapping[str, Any], data: bytes) -> Answer:
        """More of a file, of which ``at`` bytes were there before; what is there already is not written again."""
        _intact(asked, data)
        at = int(asked["at"])
        with self._lock:
            self._check(asked)
            handle = os.open(self._at(asked["path"]), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
            try:
                size = os.fstat(handle).st_size
                there = os.pread(handle, len(data), at)
                if size < at or size > at + len(data) or not data.startswith(there):
                    raise OSError(errno.EIO, "another wrote to it")
                _write_at(handle, data[len(there) :], at + len(there))
            finally:
                os.close(handle)
        return {}, b""

    def _sync(self, asked: Mapping[str, Any], data: bytes) -> Answer:
        handle = os.open(self._at(asked["path"]), os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
        return {}, b""


class Loans:
    """All that are lent by a server. Any thread may call it."""

    def __init__(self, offers: Offers) -> None:
        self._offers = offers
        self._lock = threading.Lock()
        self._loans: dict[str, Loan] = {}

    def lend(self, said: Mapping[str, Any]) -> Loan:
        """A new loan, of what a supervisor says. Raises DataError, and KeyError or TypeError where that is nothing."""
        items = [self._item(Path(path)) for path in said["files"]]
        loan = Loan(str(said["name"]), Path(said["root"]), said["job"], items)
        with self._lock:
            self._loans[loan.ticket] = loan
        return loan

    def _item(self, path: Path) -> pb.LentItem:
        files = self._offers.offer(_source(path), _among(path))
        return pb.LentItem(path=str(path), files=files, file=path.name if path.is_file() else "")

    def end(self, loan: Loan) -> None:
        """Take it back."""
        with self._lock:
            self._loans.pop(loan.ticket, None)
        loan.end()

    def find(self, ticket: str) -> Loan:
        """The loan of a ticket. Raises NotFoundError."""
        with self._lock:
            loan = self._loans.get(ticket)
        if loan is None:
            raise NotFoundError("this launch", expected="to go on", found="that it is over", cure="start the job again")
        return loan


def _source(path: Path) -> Path:
    """What of a job's path is sent: of a run that weights come from its newest checkpoint alone."""
    found = checkpoint.generations(path / "checkpoints")
    return found[0] if found else path


def _among(path: Path) -> str:
    """A part of the names of the files beside a file that belong to it; "" where it is alone."""
    return "ubyte" if path.is_file() and "ubyte" in path.name else ""


def _stale(epoch: Any) -> OSError:
    return OSError(errno.ESTALE, f"others lead this run since; epoch {epoch} is over")


def _intact(asked: Mapping[str, Any], data: bytes) -> None:
    if zlib.crc32(data) != asked["crc"]:
        raise OSError(errno.EIO, "what was sent has another checksum than what came")


def _write_at(handle: int, data: bytes, at: int) -> None:
    view = memoryview(data)
    while len(view):
        written = os.pwrite(handle, view, at)
        at, view = at + written, view[written:]
