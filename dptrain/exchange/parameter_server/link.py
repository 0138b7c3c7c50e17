"""One side of a stream between two servers of a run: what is said in turn, and notices beside it.

What breaks a link, a message that is not the next or not whole as well, is to this side the other server's end.
"""

import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from dptrain.errors import DeadlineError, PeerFailed, WorkerLost
from dptrain.exchange.parameter_server.codec import CHUNK, checksum
from dptrain.v1 import parameter_server_pb2 as pb

Said = TypeVar("Said", pb.FollowRequest, pb.FollowResponse)

_LEAVING = 10.0
"""Seconds in which what is said at the end has to be sent."""

_LOOK = 0.25
"""Seconds between looks whether the other side still gives signs of life."""

_SAID, _MEETS, _LEAVES, _GONE = range(4)


class Link:
    """``kind`` is what this side says, ``peer`` the other's number, ``hear`` is called with each of its notices.

    ``ring`` is called when the other is gone, leaves or meets. Without a sign for ``silent_seconds`` it is gone.
    """

    def __init__(
        self,
        kind: type[pb.FollowRequest] | type[pb.FollowResponse],
        hear: Callable[[int, pb.Notice], None],
        ring: Callable[[], None],
        silent_seconds: float,
        peer: int = 0,
    ) -> None:
        self._kind, self._hear, self._ring, self._silent_seconds = kind, hear, ring, silent_seconds
        self.peer = peer
        self.heard = time.monotonic()
        self.watched = False
        """Whether both sides give signs of life."""
        self.lost = False
        self._out: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._in: queue.SimpleQueue[tuple[int, bytes | int]] = queue.SimpleQueue()
        self._counting = threading.Lock()
        self._sent = 0
        self._drained = threading.Event()
        self._disturbances = self._handled = 0
        self._met: bytes | None = None
        self._left = 0

    @property
    def disturbed(self) -> bool:
        """Whether the other is gone, leaves or meets, and nobody has looked after it yet."""
        return self._disturbances > self._handled or self.silent

    @property
    def silent(self) -> bool:
        """Whether the other gave no sign of life for too long."""
        return self.watched and time.monotonic() - self.heard > self._silent_seconds

    def send(self, data: bytes | memoryview, *, meeting: bool = False) -> None:
        """Say something; it is on its way when this returns. Raises WorkerLost where the other is known to be gone."""
        if self.lost:
            raise self._gone()
        view = memoryview(data)
        starts = range(0, max(1, len(view)), CHUNK)
        for start in starts:
            part = bytes(view[start : start + CHUNK])
            self._put(data=part, checksum=checksum(part), last=start == starts[-1], meeting=meeting)

    def notify(self, notice: pb.Notice) -> None:
        """Tell something beside; from any thread."""
        self._put(notice=notice)

    def leave(self, code: int) -> None:
        """Say that this side leaves with a code, or is done with 0, and let all that was said be sent."""
        if code:
            self._put(leaving=code)
        self._out.put(None)
        if not self.lost:
            self._drained.wait(_LEAVING)

    def lose(self) -> None:
        """The other counts as gone, whatever becomes of it."""
        self.lost = True
        self._out.put(None)

    def receive(self, seconds: float) -> bytes:
        """What the other side says next. Raises WorkerLost where it is gone or meets, PeerFailed where it leaves."""
        until = time.monotonic() + seconds
        while True:
            if self.lost:
                raise self._gone()
            if self._met is not None:
                raise WorkerLost(
                    f"parameter server {self.peer}", expected="to go on", found="that it meets the others", cure="meet"
                )
            if self._left:
                raise PeerFailed(self.peer, 0, "all phases", self._left)
            taken = self._take(until)
            if taken is None:
                raise DeadlineError(
                    "the parameter server",
                    expected=f"server {self.peer} within {seconds:g} s",
                    found="nothing",
                    cure="see what it is at, or raise exchange.deadline",
                )
            kind, content = taken
            if kind == _SAID:
                assert isinstance(content, bytes)
                return content

    def meeting(self, seconds: float) -> bytes | int | None:
        """What the other side says in a meeting, or the code it leaves with; None where nothing came in time.

        What else it said is passed over. Raises WorkerLost where it is gone.
        """
        until = time.monotonic() + seconds
        while True:
            if self.lost:
                raise self._gone()
            if self._left:
                return self._left
            if self._met is not None:
                found, self._met = self._met, None
                return found
            if self._take(until) is None:
                return None

    def _take(self, until: float) -> tuple[int, bytes | int] | None:
        """The next of what came; None where nothing did."""
        while True:
            left = until - time.monotonic()
            try:
                kind, content = self._in.get(timeout=max(0.0, min(left, _LOOK)))
                break
            except queue.Empty:
                if self.silent:
                    self.lose()
                    return _GONE, 0
                if left <= 0:
                    return None
        if kind != _SAID:
            self._handled += 1
        if kind == _GONE:
            self.lose()
        elif kind == _MEETS:
            assert isinstance(content, bytes)
            self._met = content
        elif kind == _LEAVES:
            assert isinstance(content, int)
            self._left = content
        return kind, content

    def listen(self, messages: Iterable[pb.FollowRequest | pb.FollowResponse], heard: int = 0) -> None:
        """Take in what the other side says until it ends; from a thread of its own. ``heard`` messages came before."""
        whole, meeting = bytearray(), False
        for number, message in enumerate(messages, heard):
            self.heard = time.monotonic()
            if message.number != number:
                break
            if message.HasField("notice"):
                if message.notice.WhichOneof("what") is not None:
                    self._hear(self.peer, message.notice)
                continue
            if message.leaving:
                self._disturb(_LEAVES, message.leaving)
                continue
            if checksum(message.data) != message.checksum or (whole and message.meeting != meeting):
                break
            meeting = message.meeting
            whole += message.data
            if message.last:
                if meeting:
                    self._disturb(_MEETS, bytes(whole))
                else:
                    self._in.put((_SAID, bytes(whole)))
                whole.clear()

    def end(self) -> None:
        """The stream is over."""
        self._out.put(None)
        self._drained.set()
        self._disturb(_GONE, 0)

    def __iter__(self) -> Iterator[Any]:
        """What is to be sent."""
        while (message := self._out.get()) is not None:
            yield message
        self._drained.set()

    def _disturb(self, kind: int, content: bytes | int) -> None:
        with self._counting:
            self._disturbances += 1
            self._in.put((kind, content))
        self._ring()

    def _put(self, **content: Any) -> None:
        with self._counting:
            self._out.put(self._kind(number=self._sent, **content))
            self._sent += 1

    def _gone(self) -> WorkerLost:
        return WorkerLost(
            f"parameter server {self.peer}", expected="it to live", found="that it is gone", cure="the others go on"
        )
