"""Where the weights go out: every committed vector, to all who listen, without being asked for."""

import threading
from collections.abc import Iterator

from dptrain.exchange.parameter_server.codec import Version, cuts, encode, lent, together
from dptrain.exchange.parameter_server.lending import Lent
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

    With ``asked`` a worker gets what it is to ``hand`` it, and nothing else.

    Chunks are made once for all listeners, when a vector is handed out, the first of them on its way while the next is
    made. Those for who looks at the vector where it lies, in memory that is ``lent``, only say where, and what for a
    checksum it has: to be too late is noticed. It must not be written to before the next is handed out.
    """

    def __init__(
        self, job: int, segment: int, lo: int, hi: int, *, asked: bool = False, lent: Lent | None = None
    ) -> None:
        self._job, self._segment, self._lo, self._hi = job, segment, lo, hi
        self._lent = lent
        self._lock = threading.Lock()
        self._newest: Array | None = None
        self._made: dict[bool, Messages] = {}
        """The newest as messages, for those that look and for others, as far as there are any."""
        self._listeners: set[Listening] = set()
        self._closed = False
        self._asked = asked
        self._version: Version = 0, False
        self._wanted: dict[int, Version] = {}
        self._given: dict[int, tuple[Version, Messages]] = {}
        self._of: dict[int, Listening] = {}
        self.changed = False
        """Whether it was closed because the servers are others now."""

    def publish(self, vector: Array, step: int, *, best: bool = False) -> None:
        """Hand out a vector, that of a step or the one that is kept as the best."""
        part = vector[self._lo : self._hi]
        if not len(part):
            return
        with self._lock:
            self._newest, self._version, self._made = part, (step, best), {}
            to_make = []
            for looks in (True, False):
                hearing = [listener for listener in self._listeners if self._looks(listener) == looks]
                if hearing or (self._asked and not looks):
                    to_make.append((self._prepared(looks), looks))
                    for listener in () if self._asked else hearing:
                        listener.hear(self._made[looks])
            for worker in list(self._wanted):
                self._give(worker)
        for messages, looks in to_make:
            self._make(messages, part, (step, best), looks)

    def _looks(self, listener: "Listening") -> bool:
        """Whether it looks at the newest where that lies."""
        assert self._newest is not None
        return listener.looks and self._lent is not None and self._lent.where(self._newest) is not None

    def _prepared(self, looks: bool) -> Messages:
        """The newest as messages yet to be made."""
        assert self._newest is not None
        some = cuts(len(self._newest), self._newest.dtype.itemsize)
        made = self._made[looks] = Messages(len(together(some)) if looks else len(some))
        return made

    def _make(self, messages: Messages, part: Array, version: Version, looks: bool) -> None:
        every = cuts(len(part), part.dtype.itemsize)
        for some in together(every) if looks else [[cut] for cut in every]:
            lo, hi = some[0][0], some[-1][1]
            place = pb.Place(
                membership=pb.Membership(job=self._job),
                step=version[0],
                segment=self._segment,
                offset=lo,
                total=len(part),
                encoding=pb.ENCODING_RAW,
                best=version[1],
            )
            where = self._lent.where(part[lo:hi]) if looks and self._lent is not None else None
            if where is None:
                messages.add(encode(place, part[lo:hi]))
            else:
                messages.add(lent(place, [part[start:stop] for start, stop in some], where))

    def retract(self) -> None:
        """What was handed out last is not what is gone on from: whoever listens from now on gets the next."""
        with self._lock:
            self._newest, self._made = None, {}

    def hand(self, worker: int, version: Version) -> None:
        """Hand a version to a worker, as soon as it is published; it is the only one that this worker waits for."""
        with self._lock:
            self._wanted[worker] = version
            self._give(worker)

    def forget(self, worker: int) -> None:
        """It is gone."""
        with self._lock:
            for known in (self._wanted, self._given, self._of):
                known.pop(worker, None)

    def _give(self, worker: int) -> None:
        version = self._wanted[worker]
        if self._newest is None or self._version != version:
            return
        newest = self._made[False]
        del self._wanted[worker]
        if worker in self._given and self._given[worker][0] == version:
            return
        self._given[worker] = version, newest
        if worker in self._of:
            self._of[worker].hear(newest)

    def listen(self, worker: int, *, looks: bool = False) -> "Listening":
        """From now on, beginning with the newest there is for this worker, who ``looks`` where the vectors are lent."""
        with self._lock:
            listening = Listening(self, looks)
            if self._asked:
                self._of[worker] = listening
                if worker in self._given:
                    listening.hear(self._given[worker][1])
            elif self._newest is not None:
                kind = self._looks(listening)
                if kind not in self._made:
                    # While the lock is held nothing newer is handed out, so this is not written to.
                    self._make(self._prepared(kind), self._newest, self._version, kind)
                listening.hear(self._made[kind])
            if self._closed:
                listening.end()
            self._listeners.add(listening)
            return listening

    def leave(self, listener: "Listening") -> None:
        """Hand out nothing to it any more."""
        with self._lock:
            self._listeners.discard(listener)

    def close(self, *, changed: bool = False) -> None:
        """Nothing more is handed out, once what was handed out is gone."""
        with self._lock:
            self._closed, self.changed = True, changed
            for listener in self._listeners:
                listener.end()


class Listening:
    """The chunks of one vector after the other, as long as there are any.

    Of who does not read nothing is kept but the vector on its way and the newest.
    """

    def __init__(self, outlet: Outlet, looks: bool) -> None:
        self.outlet, self.looks = outlet, looks
        self._next: Messages | None = None
        self._ended = False
        self._changed = threading.Condition()

    def hear(self, messages: Messages) -> None:
        """The newest vector; nobody needs one that it overtakes."""
        with self._changed:
            self._next = messages
            self._changed.notify()

    def end(self) -> None:
        """There is no more to hear."""
        with self._changed:
            self._ended = True
            self._changed.notify()

    def stop(self) -> None:
        """From any thread: end it."""
        self.outlet.leave(self)
        self.end()

    def __iter__(self) -> Iterator[bytes]:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._next is not None or self._ended)
                messages, self._next = self._next, None
            if messages is None:
                return
            yield from messages
