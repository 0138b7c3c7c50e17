"""The process that a job belongs to: starts ``dptrain run``, keeps what it prints, and writes down how it ended.

It outlives the server, which finds it again by the lock on its folder and its process id. One launch is made at most
once: whoever holds the lock writes down the launch's number first, and a number that was used is not used again. The
server takes the lock before this process is there, and hands it on, so that there is no moment at which a job is
started and not locked.

Imports are few: every job waits for them.
"""

import contextlib
import fcntl
import json
import os
import re
import resource
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from dptrain.processes import process
from dptrain.supervision import die_with

LOCK, ORDER, BEGUN, EXIT, LOG = "lock", "order.json", "begun.jsonl", "exit.json", "log.jsonl"
"""Of a job's folder: the lock, what to start, the launches that have begun, how the last ended, what was printed."""

KILL = signal.SIGUSR1
"""Asks a keeper to end the run at once, and to write down its end."""

_MOST_LINE = 16_384
_LINE_OF_RANK = re.compile(rb"(?:dptrain: )?rank (\d{1,6})\b")
_READ = 1 << 16


class Order(NamedTuple):
    """What to start: ``dptrain ARGV`` as launch number ``launch``, with what limits."""

    launch: int
    argv: Sequence[str]
    most_log_bytes: int
    most_memory: int


def main(folder: Path, lock: int) -> int:
    """Keep the launch that the folder orders; ``lock`` is the descriptor of its locked lock file."""
    os.set_inheritable(lock, False)
    order = Order(**json.loads((folder / ORDER).read_bytes()))
    if launches(folder) >= order.launch:
        return 0
    own = process(os.getpid())
    _append(
        folder / BEGUN, {"launch": order.launch, "pid": os.getpid(), "born": own.born if own else 0, "time": _now()}
    )
    # Where memory runs out it is a job that ends, not the server.
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("500")
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if order.most_memory:
        resource.setrlimit(resource.RLIMIT_DATA, (order.most_memory, order.most_memory))
    code, requests = _Run(folder, order).wait()
    write(folder / EXIT, {"launch": order.launch, "code": code, "requests": requests, "time": _now()})
    return 0


class _Run:
    """One ``dptrain run``, from its start until all that could print has ended."""

    def __init__(self, folder: Path, order: Order) -> None:
        self._requests = 0
        self._kill = self._passed = False
        self._wakes, self._wake = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        # From here on a request to stop is not lost; it is passed on as soon as there is someone to pass it to.
        for number in (signal.SIGTERM, signal.SIGINT, KILL):
            signal.signal(number, self._note)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        self._log = _Log(folder / LOG, order.most_log_bytes)
        ours = os.getpid()
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "dptrain", *order.argv],
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            process_group=0,
            preexec_fn=lambda: die_with(ours),
        )

    def wait(self) -> tuple[int, int]:
        """Its exit code (-N where signal N ended it), and how often it was asked to stop."""
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        poll = select.poll()
        streams = {self._process.stdout.fileno(): "out", self._process.stderr.fileno(): "err"}
        ended = os.pidfd_open(self._process.pid)
        for handle in (self._wakes, ended, *streams):
            poll.register(handle, select.POLLIN)
        runs = True
        while runs or streams:
            ready = {handle for handle, _ in poll.poll(None if runs else 0)}
            if not runs and not ready & streams.keys():
                # All that was printed before its end has been read; whoever still holds the pipes is not waited for.
                break
            if self._wakes in ready:
                os.read(self._wakes, _READ)
                self._pass_on()
            for handle in ready & streams.keys():
                data = os.read(handle, _READ)
                self._log.take(streams[handle], data)
                if not data:
                    poll.unregister(handle)
                    del streams[handle]
            if ended in ready:
                poll.unregister(ended)
                runs = False
        code = self._process.wait()
        self._log.close()
        return code, self._requests

    def _pass_on(self) -> None:
        """The first request is passed on, and no other: a second one would end the workers at once."""
        if self._kill:
            self._process.kill()
        elif self._requests and not self._passed:
            self._passed = True
            self._process.send_signal(signal.SIGTERM)

    def _note(self, number: int, frame: object) -> None:
        if number == KILL:
            self._kill = True
        else:
            self._requests += 1
        with contextlib.suppress(BlockingIOError):
            os.write(self._wake, b"!")


class _Log:
    """log.jsonl: {"t": seconds since 1970, "s": "out" or "err", "r": rank, "l": text} a line, over all launches."""

    def __init__(self, path: Path, most: int) -> None:
        self._handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self._size = os.fstat(self._handle).st_size
        self._most = most
        self._pending = {"out": b"", "err": b""}
        if self._size and os.pread(self._handle, 1, self._size - 1) != b"\n":
            self._write(b"\n")

    def take(self, stream: str, data: bytes) -> None:
        """What a stream said; no data: it has ended."""
        *lines, rest = (self._pending[stream] + data).split(b"\n")
        while len(rest) > _MOST_LINE:
            lines.append(rest[:_MOST_LINE])
            rest = rest[_MOST_LINE:]
        if not data and rest:
            lines.append(rest)
            rest = b""
        self._pending[stream] = rest
        if lines:
            self._write(b"".join(_encoded(stream, line[:_MOST_LINE]) for line in lines))

    def close(self) -> None:
        """Write what has no end of line, and all of it to the disk."""
        for stream in self._pending:
            self.take(stream, b"")
        with contextlib.suppress(OSError):
            os.fsync(self._handle)
        os.close(self._handle)

    def _write(self, data: bytes) -> None:
        if self._size >= self._most:
            return
        if self._size + len(data) > self._most:
            data = _encoded("err", b"dptrain: the log is full; what is printed from here on is not kept")
            self._size = self._most
        # A full disk must not end the job.
        with contextlib.suppress(OSError):
            self._size += os.write(self._handle, data)


def _encoded(stream: str, line: bytes) -> bytes:
    found = _LINE_OF_RANK.match(line)
    content = {
        "t": round(_now(), 3),
        "s": stream,
        "r": int(found[1]) if found else 0,
        "l": line.rstrip(b"\r").decode(errors="replace"),
    }
    return json.dumps(content, separators=(",", ":")).encode() + b"\n"


def launches(folder: Path) -> int:
    """The number of the newest launch that has begun; 0 where none has."""
    return max((line["launch"] for line in begun(folder)), default=0)


def begun(folder: Path) -> list[dict[str, Any]]:
    """The launches that have begun, in order: launch, pid, born, time."""
    found = []
    try:
        data = (folder / BEGUN).read_bytes()
    except FileNotFoundError:
        return []
    for line in data.splitlines():
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return found


def lock(folder: Path) -> BinaryIO | None:
    """The lock file of a job's folder, locked; None where another has it."""
    file = (folder / LOCK).open("ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    return file


def write(path: Path, content: Any) -> None:
    """Write a JSON file whole or not at all, and to the disk."""
    part = path.with_name(f".{path.name}")
    with part.open("wb") as file:
        file.write(json.dumps(content).encode())
        file.flush()
        os.fsync(file.fileno())
    part.rename(path)
    _flush_folder(path.parent)


def _append(path: Path, content: Any) -> None:
    with path.open("ab", buffering=0) as file:
        file.write(json.dumps(content).encode() + b"\n")
        os.fsync(file.fileno())
    _flush_folder(path.parent)


def _flush_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _now() -> float:
    return time.time()


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2])))
