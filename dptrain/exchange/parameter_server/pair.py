"""A chief and its standby as a communicator: what the chief knows, its standby knows before it counts.

Both run the same loop and keep the same books; the chief alone meets workers and writes to the run directory. When it
dies the standby is the lowest of the living, as a rank would be that survives the others.
"""

import json
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from dptrain.errors import DeadlineError, PeerFailed, WorkerLost
from dptrain.exchange.communicator import Alone, Message, Posted
from dptrain.exchange.parameter_server.codec import CHUNK, checksum
from dptrain.exchange.parameter_server.hub import Hub
from dptrain.layout import Array
from dptrain.v1 import parameter_server_pb2 as pb

Said = TypeVar("Said", pb.FollowRequest, pb.FollowResponse)

_LEAVING = 10.0
"""Seconds in which what is said at the end has to be sent."""


class Chief(Alone):
    """The communicator of a chief server that has no standby: it is alone, and its workers are the hub's."""

    def __init__(self, hub: Hub) -> None:
        super().__init__()
        self.hub = hub


class Link:
    """One side of the stream between chief and standby. ``kind`` is what this side says."""

    def __init__(self, kind: type[pb.FollowRequest] | type[pb.FollowResponse]) -> None:
        self._kind = kind
        self._out: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._in: queue.SimpleQueue[bytes | int | None] = queue.SimpleQueue()
        self._sent = 0
        self._drained = threading.Event()
        self.connected = threading.Event()
        self.lost = False

    def send(self, data: bytes | memoryview) -> None:
        """Say something; it is on its way when this returns."""
        view = memoryview(data)
        starts = range(0, max(1, len(view)), CHUNK)
        for start in starts:
            part = bytes(view[start : start + CHUNK])
            self._put(data=part, checksum=checksum(part), last=start == starts[-1])

    def leave(self, code: int) -> None:
        """Say that this side leaves with a code, or is done with 0, and let all that was said be sent."""
        if code:
            self._put(leaving=code)
        self._out.put(None)
        if self.connected.is_set() or not self.lost:
            self._drained.wait(_LEAVING)

    def receive(self, seconds: float) -> bytes:
        """What the other side says next. Raises WorkerLost where it is gone, PeerFailed where it leaves."""
        if self.lost:
            raise _gone()
        try:
            found = self._in.get(timeout=seconds)
        except queue.Empty:
            raise DeadlineError(
                "the parameter server",
                expected=f"the other server within {seconds:g} s",
                found="nothing",
                cure="see what it is at, or raise exchange.deadline",
            ) from None
        if found is None:
            self.lost = True
            raise _gone()
        if isinstance(found, int):
            raise PeerFailed(0, 0, "all phases", found)
        return found

    def listen(self, messages: Iterable[pb.FollowRequest | pb.FollowResponse]) -> None:
        """Take in what the other side says until it ends; from a thread of its own."""
        whole = bytearray()
        for number, message in enumerate(messages):
            if message.number != number or (checksum(message.data) != message.checksum and not message.leaving):
                break
            if message.leaving:
                self._in.put(message.leaving)
                continue
            whole += message.data
            if message.last:
                self._in.put(bytes(whole))
                whole.clear()

    def end(self) -> None:
        """The stream is over."""
        self._in.put(None)
        self._out.put(None)
        self._drained.set()

    def __iter__(self) -> Iterator[Any]:
        """What is to be sent."""
        while (message := self._out.get()) is not None:
            yield message
        self._drained.set()

    def _put(self, **content: Any) -> None:
        self._out.put(self._kind(number=self._sent, **content))
        self._sent += 1


class Pair(Chief):
    """The chief, rank 0, or its standby, rank 1, until one of them is gone; then the other is alone."""

    survives = True

    def __init__(self, hub: Hub, link: Link, rank: int) -> None:
        super().__init__(hub)
        self.rank, self.size, self.members = rank, 2, (0, 1)
        self._link = link

    def allgather(self, row: npt.NDArray[np.float64], phase: str) -> npt.NDArray[np.float64]:
        """See Communicator."""
        if self.size == 1:
            return super().allgather(row, phase)
        other = np.frombuffer(self._swapped(np.ascontiguousarray(row).data.cast("B")), row.dtype)
        return np.stack([row, other] if self.rank == 0 else [other, row])

    def allgather_json(self, content: Any, phase: str) -> list[Any]:
        """See Communicator."""
        said = json.dumps(content).encode()
        if self.size == 1:
            return [json.loads(said)]
        every = [said, self._swapped(said)]
        return [json.loads(each) for each in (every if self.rank == 0 else every[::-1])]

    def broadcast_json(self, content: Any, phase: str) -> Any:
        """See Communicator."""
        if self.size == 1 or self.rank:
            return json.loads(self._link.receive(self.deadline)) if self.size > 1 else json.loads(json.dumps(content))
        said = json.dumps(content).encode()
        self._send(said)
        return json.loads(said)

    def broadcast(self, vector: Array, phase: str) -> None:
        """See Communicator."""
        if self.size == 1:
            return
        if self.rank == 0:
            self._send(np.ascontiguousarray(vector).data.cast("B"))
        else:
            np.copyto(vector, np.frombuffer(self._link.receive(self.deadline), vector.dtype).reshape(vector.shape))

    def barrier(self, phase: str) -> None:
        """See Communicator."""
        if self.size > 1:
            self._swapped(b"")

    def post(self, sends: Sequence[Message], receives: Sequence[Message], phase: str) -> Posted:
        """Nothing goes this way."""
        return super().post(sends, receives, phase)

    def machines(self) -> tuple[tuple[int, ...], ...]:
        """They share nothing."""
        return tuple((rank,) for rank in range(self.size))

    def meet(self, word: Callable[[], Any], *, settled: bool = False) -> list[Any] | None:
        """See Communicator: who comes here unsettled has lost the other."""
        if settled:
            if self.size > 1:
                try:
                    self._swapped(b"settled")
                except (WorkerLost, DeadlineError):
                    self._alone()
            return None
        self._alone()
        return [word()]

    def leave(self, code: int) -> None:
        """See Communicator."""
        if not self.left and self.size > 1:
            self._link.leave(code)
        self.left = True

    def _alone(self) -> None:
        self.members, self.rank, self.size = (self.members[self.rank],), 0, 1

    def _swapped(self, said: bytes | memoryview) -> bytes:
        self._send(said)
        return self._link.receive(self.deadline)

    def _send(self, said: bytes | memoryview) -> None:
        if self._link.lost:
            raise _gone()
        self._link.send(said)


def _gone() -> WorkerLost:
    return WorkerLost(
        "the other parameter server", expected="it to live", found="that it is gone", cure="the other one goes on"
    )
