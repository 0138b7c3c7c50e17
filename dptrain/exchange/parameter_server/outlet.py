"""Where the weights go out: every committed vector, to all who listen, without being asked for."""

import queue
import threading
from collections.abc import Iterator

from dptrain.exchange.parameter_server.codec import cuts, encode
from dptrain.layout import Array
from dptrain.v1 import parameter_server_pb2 as pb


class Messages:
    """A vector's chunks, ready to be sent, as they are made by one thread: ``count`` of them in all."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._made: list[bytes] = []
        self._grown = threading.Condition()

    def add(self, chunk: bytes) -> None:
        """The next one."""
        with self._grown:
            self._made.append(chunk)
            self._grown.notify_all()

    def __iter__(self) -> Iterator[bytes]:
        for i in range(self.count):
            if i >= len(self._made):
                with self._grown:
                    self._grown.wait_for(lambda i=i: i < len(self._made))  # type: ignore[misc]
            yield self._made[i]


class Outlet:
    """Hands out elements lo to hi of a vector. A listener that is slow gets the newest, not all.

    Chunks are made once, when a vector is handed out, the first of them on its way while the next is made: they are the
    same for all listeners, and nobody holds the vector itself afterwards.
    """

    def __init__(self, job: int, segment: int, lo: int, hi: int) -> None:
        self._job, self._segment, self._lo, self._hi = job, segment, lo, hi
        self._lock = threading.Lock()
        self._newest: Messages | None = None
        self._listeners: set[queue.SimpleQueue[Messages | None]] = set()
        self._closed = False

    def publish(self, vector: Array, step: int, *, best: bool = False) -> None:
        """Hand out a vector, that of a step or the one that is kept as the best."""
        part = vector[self._lo : self._hi]
        places = [
            (
                pb.Place(
                    membership=pb.Membership(job=self._job),
                    step=step,
                    segment=self._segment,
                    offset=start,
                    total=len(part),
                    encoding=pb.ENCODING_RAW,
                    best=best,
                ),
                part[start:stop],
            )
            for start, stop in cuts(len(part), part.dtype.itemsize)
        ]
        messages = Messages(len(places))
        with self._lock:
            self._newest = messages
            for listener in self._listeners:
                listener.put(messages)
        for place, some in places:
            messages.add(encode(place, some))

    def listen(self) -> "Listening":
        """From now on, beginning with the newest there is."""
        with self._lock:
            listening = Listening(self)
            if self._newest is not None:
                listening.queue.put(self._newest)
            if self._closed:
                listening.queue.put(None)
            self._listeners.add(listening.queue)
            return listening

    def leave(self, listener: "queue.SimpleQueue[Messages | None]") -> None:
        """Hand out nothing to it any more."""
        with self._lock:
            self._listeners.discard(listener)
        listener.put(None)

    def close(self) -> None:
        """Nothing more is handed out."""
        with self._lock:
            self._closed = True
            for listener in self._listeners:
                listener.put(None)


class Listening:
    """The chunks of one vector after the other, as long as there are any."""

    def __init__(self, outlet: Outlet) -> None:
        self.queue: queue.SimpleQueue[Messages | None] = queue.SimpleQueue()
        self._outlet = outlet

    def stop(self) -> None:
        """From any thread: end it."""
        self._outlet.leave(self.queue)

    def __iter__(self) -> Iterator[bytes]:
        while (messages := self.queue.get()) is not None:
            while not self.queue.empty():
                # Nobody needs what has been overtaken.
                newer = self.queue.get()
                if newer is None:
                    return
                messages = newer
            yield from messages
