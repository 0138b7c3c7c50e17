"""What it costs the cores of machines to move bytes, beside what else they have to do."""

import contextlib
import math
import socket
import time
from dataclasses import dataclass

CHUNK = 1 << 18
"""Bytes of the probe's messages; a piece of float32 has as many."""


@dataclass(frozen=True)
class Cores:
    """Of each machine, for all that is done there, and the seconds that one needs for a byte that is sent or comes."""

    count: float = math.inf
    byte: float = 0.0

    def turns(self, workers: int) -> float:
        """By how much so many workers are slowed that have to take turns."""
        return max(1.0, workers / self.count)


class Busy:
    """The cores of ``machines``: what they have to do is done as soon as there is time for it, in whatever order.

    Where ``workers`` leave none over, bytes are moved when they have computed, between updates. Else some are there for
    that from the beginning, no more than one a worker, whose messages are moved one after the other.
    """

    def __init__(self, machines: int, workers: int, cores: Cores, computed: float) -> None:
        """``computed``: when in a step the workers have computed."""
        self.shared = cores.count < workers + 1
        self._count = cores.count if self.shared else min(cores.count - workers, workers)
        self._done = [computed if self.shared else 0.0] * machines
        self._byte = cores.byte

    def move(self, machine: int, begun: float, nbytes: float) -> float:
        """When bytes are moved that a link begins with at a time."""
        return self._given(machine, begun, nbytes * self._byte)

    def compute(self, machine: int, begun: float, seconds: float) -> float:
        """When a worker has done what it begins with at a time."""
        return self._given(machine, begun, seconds) if self.shared else begun + seconds

    def _given(self, machine: int, begun: float, seconds: float) -> float:
        self._done[machine] += seconds / self._count
        return max(begun + seconds, self._done[machine])


def seconds_a_byte(seconds: float = 0.3) -> float:
    """What a byte costs a core of this machine at one of its ends: over TCP to itself, the quickest of some."""
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as there:
        here, _ = server.accept()
        with here:
            here.setblocking(False)
            there.setblocking(False)
            content, room = memoryview(bytes(CHUNK)), memoryview(bytearray(CHUNK))
            best, until = math.inf, time.perf_counter() + seconds
            while (started := time.perf_counter()) < until:
                sent = come = 0
                while come < CHUNK:
                    with contextlib.suppress(BlockingIOError):
                        sent += here.send(content[sent:]) if sent < CHUNK else 0
                    with contextlib.suppress(BlockingIOError):
                        come += there.recv_into(room[come:])
                best = min(best, time.perf_counter() - started)
    return best / CHUNK / 2
