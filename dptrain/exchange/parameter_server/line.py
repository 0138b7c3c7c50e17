"""A connection between two processes that share memory: short messages, noticed quickly.

A message is JSON, goes through a socket of the kernel's, and is counted in shared memory afterwards. Who waits looks
at the count first, which costs nothing and wakes nobody, giving the core away between looks; then it sleeps in the
kernel, where the end of the other process wakes it too.
"""

import json
import os
import select
import socket
import time
from collections.abc import Sequence
from typing import Any

from dptrain.board import Cell

SLEEPLESS = 0.005
"""Seconds of a wait before it sleeps, where all have a core: waking one that idles takes longer than all else here."""

_LONGEST = 1 << 17
"""Bytes of a message; a socket's own limit lies above."""


class Gone(Exception):
    """The process at the other end has ended."""


class Line:
    """One end. ``sent`` and ``came`` are the counts of the two directions, each written by one of the processes."""

    def __init__(self, end: socket.socket, sent: Cell, came: Cell) -> None:
        self._end, self._sent, self._came = end, sent, came
        self._taken = 0

    @property
    def waiting(self) -> bool:
        """Whether a message is known to have come; more may have."""
        return self._came[0] > self._taken

    def fileno(self) -> int:
        """The socket, for who sleeps on several of them."""
        return self._end.fileno()

    def send(self, message: Sequence[Any]) -> None:
        """Raises Gone where nobody can get it any more."""
        text = json.dumps(message).encode()
        assert len(text) <= _LONGEST
        try:
            self._end.send(text)
        except OSError:
            raise Gone from None
        self._sent[0] += 1

    def receive(self) -> list[Any]:
        """The next message, waiting for it; raises Gone where there is none and never will be."""
        try:
            text = self._end.recv(_LONGEST)
        except OSError:
            text = b""
        if not text:
            raise Gone
        self._taken += 1
        return json.loads(text)  # type: ignore[no-any-return]

    def close(self) -> None:
        """The other end learns that this one is gone."""
        self._end.close()


class Lines:
    """Several lines of which any may have something to say."""

    def __init__(self, lines: Sequence[Line]) -> None:
        self._lines = {line.fileno(): line for line in lines}
        self._asked = select.poll()
        for handle in self._lines:
            self._asked.register(handle, select.POLLIN)

    def wait(self, seconds: float | None, sleepless: float) -> list[Line]:
        """Those with a message or an end, as soon as there is one; none after ``seconds``, None for ever."""
        lines = list(self._lines.values())
        until = time.monotonic() + (sleepless if seconds is None else min(sleepless, seconds))
        while True:
            found = [line for line in lines if line.waiting]
            if found:
                return found
            if time.monotonic() >= until:
                break
            os.sched_yield()
        slept = self._asked.poll(None if seconds is None else max(0.0, seconds - sleepless) * 1000)
        return [self._lines[handle] for handle, _ in slept]
