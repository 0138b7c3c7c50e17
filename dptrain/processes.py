"""Processes of this machine as the kernel tells of them."""

import contextlib
import os
import select
import signal
import time
from collections.abc import Iterator
from typing import NamedTuple


class Process(NamedTuple):
    """A process: its name as the kernel shortens it, one letter for its state, its parent, its start in ticks."""

    name: str
    state: str
    parent: int
    born: int


def process(pid: int) -> Process | None:
    """The process of that number; None where there is none, or none that may be looked at."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            stat = file.read()
    except OSError:
        return None
    # The name, in parentheses, may hold anything, these too.
    name, rest = stat[stat.index(b"(") + 1 : stat.rindex(b")")], stat[stat.rindex(b")") + 1 :].split()
    return Process(name.decode(errors="replace"), rest[0].decode(), int(rest[1]), int(rest[19]))


def pids() -> Iterator[int]:
    """All processes that there are."""
    return map(int, filter(str.isdigit, os.listdir("/proc")))


def children(parent: int) -> Iterator[int]:
    """The processes that have this parent; those that have ended too, until somebody asks for their code."""
    for pid in pids():
        found = process(pid)
        if found is not None and found.parent == parent:
            yield pid


def session(leader: int) -> Iterator[int]:
    """The processes of a session that have not ended."""
    for pid in pids():
        with contextlib.suppress(ProcessLookupError):
            found = process(pid) if os.getsid(pid) == leader else None
            if found is not None and found.state not in "ZX":
                yield pid


def opened(pid: int) -> int:
    """A descriptor of a process, which becomes readable when it ends; -1 where there is none."""
    try:
        return os.pidfd_open(pid) if pid > 0 else -1
    except ProcessLookupError:
        return -1


def end_session(leader: int, seconds: float) -> None:
    """Kill all processes of a session and return when they are gone, or after so many seconds."""
    until = time.monotonic() + seconds
    while members := list(session(leader)):
        for member in members:
            held = opened(member)
            if held < 0:
                continue
            try:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    signal.pidfd_send_signal(held, signal.SIGKILL)
                select.select([held], [], [], max(0.0, until - time.monotonic()))
            finally:
                os.close(held)
        if time.monotonic() > until:
            return
