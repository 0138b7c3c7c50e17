"""What a worker sends to other machines and gets from them in a step, piece by piece, while others are computed.

Backward knows the gradients of the last layers first. A piece whose partials are final everywhere on a machine leaves
it at once; its sum comes back as soon as its coordinator has all of them. In backward a thread sees to it, which sleeps
between looks; afterwards the worker itself does, and updates the pieces whose sums are there while others travel.
Which elements are added to which, and in which order, is the tree's: the bits don't know of any of this.

To each peer few messages are under way at a time, and partials go before sums: links are shared by all that is under
way on them, and what is whole late holds up who needs it.
"""

import heapq
import threading
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from dptrain.exchange.communicator import Communicator, Message, Posted
from dptrain.layout import BLOCK, Array
from dptrain.packing import RAW, SPARSE, pack, unpack
from dptrain.state import STRETCH, Segment

LOOK = 0.0003
"""Seconds between looks during backward: a link of 1 Gbit/s carries 37 kB in them, and more than that is queued."""

_PIECES, _SMALLEST = 16, 2 * BLOCK
"""The pieces that a segment is cut into, and the elements that each has at least."""

AT_ONCE = 3
"""Messages that are under way to a peer: one travels while the next ones are agreed on."""

_FIRST_TAG = 1 << 16
"""Those below it are others'."""


ALL = -1
"""In place of the lowest parameter that is final: buffers are, too."""


def piece_length(segment: int) -> int:
    """The elements of a piece of a segment of so many.

    A sum can leave when all of its piece has come, but each costs a look and a few messages.
    """
    blocks = -(-segment // (_PIECES * BLOCK))
    return min(STRETCH, max(_SMALLEST, blocks * BLOCK))


class Way(NamedTuple):
    """A range that goes to a peer, or comes from one; ``vector`` is that range alone."""

    peer: int
    vector: Array


class Range(NamedTuple):
    """A segment of the flat vector, from ``lo`` on, as far as it concerns this worker.

    Where it is ``owned``, other machines' partials come and the sum goes to them; else the sums of what this machine
    has go, and the finished sum comes. What is to be added before anything goes ``segment`` knows.
    """

    lo: int
    owned: bool
    segment: Segment
    sends: Sequence[Way]
    receives: Sequence[Way]


class Departures:
    """What is to go, and what is under way, by peer."""

    def __init__(self, communicator: Communicator) -> None:
        self._communicator = communicator
        self._waiting: dict[int, list[tuple[bool, int, Message]]] = {}
        self._under_way: dict[int, list[Posted]] = {}
        self._count = 0

    def add(self, messages: Sequence[Message], *, sums: bool) -> None:
        """Messages that may go from now on: partials before sums, and otherwise in this order."""
        for message in messages:
            self._count += 1
            heapq.heappush(self._waiting.setdefault(message.peer, []), (sums, self._count, message))

    def look(self) -> bool:
        """Let go what may, and say whether anything did."""
        moved = False
        for peer, waiting in self._waiting.items():
            under_way = self._under_way.setdefault(peer, [])
            under_way[:] = [some for some in under_way if not some.done()]
            while waiting and len(under_way) < AT_ONCE:
                *_, message = heapq.heappop(waiting)
                under_way.append(self._communicator.post([message], [], "exchange"))
                moved = True
        return moved

    def gone(self) -> bool:
        """Whether all has; as of the last look."""
        return not any(self._waiting.values()) and not any(self._under_way.values())

    def abandon(self) -> None:
        """After WorkerLost."""
        for under_way in self._under_way.values():
            self._communicator.abandon(under_way)
        self._waiting, self._under_way = {}, {}


class Piece:
    """A stretch of a segment: ``added`` as soon as what goes may leave, ``summed`` when its finished sum is here."""

    def __init__(self, of: Range, number: int, encoding: str, messages: int) -> None:
        self.owned, self.segment, self.number = of.owned, of.segment, number
        self.start, stop = of.segment.ranges[number]
        self._encoding = encoding
        part = slice(self.start - of.lo, stop - of.lo)
        # From one worker to another never more than one message of a tag is under way: a sum, or a partial.
        tag = _FIRST_TAG + number * messages
        self._sends = _messages(of.sends, part, tag if of.owned else tag + 1)
        self._wanted = _messages(of.receives, part, tag + 1 if of.owned else tag)
        self._receives = self._wanted
        if encoding != RAW:
            self._receives = [some._replace(array=np.empty(2 * len(some.array), np.uint8)) for some in self._wanted]
        self.added = self.summed = True
        self._coming: list[Posted] = []

    def open(self, communicator: Communicator) -> None:
        """Be ready for what comes in this step."""
        self.added = self.summed = False
        self._coming = [communicator.post([], self._receives, "exchange")]

    def abandon(self, communicator: Communicator) -> None:
        """After WorkerLost."""
        communicator.abandon(self._coming)
        self._coming = []

    def look(self, final: bool, departures: Departures) -> bool:
        """Go on as far as may be, and say whether that was anywhere; ``final``: what is to be added here."""
        if self.summed or (not self.added and not final):
            return False
        if not self.added:
            if self.owned and not self._came():
                return False
            self.segment.add(self.number)
            departures.add(self._packed(), sums=self.owned)
            self.added, self.summed = True, self.owned
            return True
        self.summed = self._came()
        return self.summed

    def _packed(self) -> list[Message]:
        if self._encoding == RAW:
            return self._sends
        # What is owned is one sum, the same for all.
        distinct = self._sends[:1] if self.owned else self._sends
        content = [pack(some.array, self._encoding).pieces[0] for some in distinct]
        if self.owned:
            content *= len(self._sends)
        return [some._replace(array=packed) for some, packed in zip(self._sends, content, strict=True)]

    def _came(self) -> bool:
        if not self._coming[0].done():
            return False
        if self._encoding != RAW:
            for wanted, some in zip(self._wanted, self._receives, strict=True):
                unpack(some.array, self._encoding, wanted.array)
        return True


def _messages(ways: Sequence[Way], part: slice, tag: int) -> list[Message]:
    """A part of each way, those of a peer with tags from ``tag`` on."""
    found: list[Message] = []
    for peer, vector in ways:
        found.append(Message(peer, vector[part], tag + sum(some.peer == peer for some in found)))
    return found


class Traffic:
    """That of one worker. ``lowest`` says from which parameter on all that its machine has is final.

    ``messages``: more than any worker ever sends another of one piece. From ``open`` to ``closed``, or to ``abandon``
    after WorkerLost, all that the ranges hold is the traffic's.
    """

    def __init__(
        self,
        communicator: Communicator,
        ranges: Sequence[Range],
        *,
        encoding: str,
        parameters: int,
        messages: int,
        lowest: Callable[[], int],
    ) -> None:
        self._communicator, self._lowest, self._parameters = communicator, lowest, parameters
        encoding = RAW if encoding == SPARSE else encoding
        self.pieces = [
            Piece(some, number, encoding if start < parameters else RAW, messages)
            for some in ranges
            for number, (start, _) in enumerate(some.segment.ranges)
        ]
        # Backward begins at the end.
        self.pieces.sort(key=lambda piece: -piece.start)
        self._departures = Departures(communicator)
        self.is_open = False
        self._final = False
        self._thread: threading.Thread | None = None
        self._over = threading.Event()
        self._error: BaseException | None = None

    def open(self) -> None:
        """A step begins."""
        self.is_open, self._final = True, False
        for piece in self.pieces:
            piece.open(self._communicator)

    def wake(self) -> None:
        """More is final: from now on a thread looks, until ``settle``. Nobody else may use the communicator."""
        if self._thread is None:
            self._over.clear()
            self._thread = threading.Thread(target=self._looking, name="dptrain-traffic", daemon=True)
            self._thread.start()

    def settle(self) -> None:
        """The caller looks itself from now on; raises what the thread met with."""
        if self._thread is not None:
            self._over.set()
            self._thread.join()
            self._thread = None
            error, self._error = self._error, None
            if error is not None:
                raise error

    def finalize(self) -> None:
        """All that this machine has is final."""
        self._final = True

    def look(self) -> bool:
        """Send what can go, take what has come, and say whether anything did."""
        lowest = ALL if self._final else self._lowest()
        moved = False
        for piece in self.pieces:
            known = lowest == ALL or lowest <= piece.start < self._parameters
            moved = piece.look(known, self._departures) or moved
        return self._departures.look() or moved

    def closed(self) -> bool:
        """Whether all of the step's has come and gone; looks."""
        self.look()
        if not self._departures.gone() or not all(piece.summed for piece in self.pieces):
            return False
        self.is_open = False
        return True

    def abandon(self) -> None:
        """After WorkerLost."""
        self.is_open = False
        self._departures.abandon()
        for piece in self.pieces:
            piece.abandon(self._communicator)

    def _looking(self) -> None:
        try:
            while not self._over.is_set():
                self.look()
                self._over.wait(LOOK)
        except BaseException as error:
            self._error = error
