"""Where the chunks of partials arrive: each into its place in its lease's box, once."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from dptrain.exchange.parameter_server.codec import Piece, Written, checksum, cuts, elements, fits, looked_at
from dptrain.gradients import finite
from dptrain.layout import Array
from dptrain.tree import Node
from dptrain.v1 import parameter_server_pb2 as pb

_DAMAGED = "the checksum is not that of the bytes"

Spot = tuple[int, int]
"""A row of a box, and the first element of a chunk in it."""


@dataclass
class Box:
    """What came of a lease: rows of ``vectors`` are those of ``nodes``, as far as ``sums`` has their checksums.

    ``finite``: nothing that came is NaN or infinite.
    """

    nodes: Sequence[Node]
    vectors: Array
    missing: int
    memory: int
    """A number that other memory would not have."""
    sums: dict[Spot, int] = field(default_factory=dict)
    shut: bool = False
    finite: bool = True
    writing: int = 0


class Intake:
    """Takes chunks of one segment, elements lo to hi of the vector, from many threads.

    The memory of a member's first, second ... lease of a step is the same at every step, so that a sum over it can be
    prepared once. It is nobody else's: what a member that is taken for dead still sends meets nothing of the others'.
    """

    def __init__(self, segment: int, lo: int, hi: int, dtype: npt.DTypeLike, written: Written) -> None:
        self.segment, self.lo, self.hi = segment, lo, hi
        self.dtype = np.dtype(dtype)
        self._written = written._replace(parameters=max(0, written.parameters - lo))
        self._cuts = dict(cuts(hi - lo, self.dtype.itemsize, self._written.parameters))
        self._lock = threading.Lock()
        self._open: dict[int, Box] = {}
        self._memory: dict[tuple[int, int], tuple[int, Array]] = {}
        self._memories = 0
        self._late: dict[int, Box] = {}
        self._differ: list[int] = []

    def expect(self, lease: int, member: int, number: int, nodes: Sequence[Node]) -> Box:
        """Take chunks of a lease from now on, the member's ``number``-th of the step."""
        which, memory = self._memory.get((member, number), (0, None))
        if memory is None or len(memory) < len(nodes):
            self._memories = which = self._memories + 1
            memory = np.zeros((len(nodes), self.hi - self.lo), self.dtype)
            self._memory[member, number] = which, memory
        box = Box(nodes, memory[: len(nodes)], len(nodes) * len(self._cuts), which)
        with self._lock:
            self._open[lease] = box
        return box

    def box(self, lease: int) -> Box:
        """That of a lease whose chunks are taken."""
        with self._lock:
            return self._open[lease]

    def finite(self, lease: int) -> bool:
        """Whether all that came of a lease is, as far as it is of interest."""
        with self._lock:
            return lease not in self._open or self._open[lease].finite

    def shut(self, leases: Sequence[int]) -> None:
        """Take no more chunks of these; those that are being written are of no interest any more."""
        with self._lock:
            for lease in leases:
                box = self._open.pop(lease, None)
                if box is not None:
                    box.shut = True

    def differ(self, lease: int, first: Box) -> bool:
        """Whether a lease's chunks are others than those of ``first``, which answered the same question.

        What comes of it later is compared too: see ``differing``.
        """
        with self._lock:
            box = self._open[lease]
            self._late[lease] = Box(first.nodes, first.vectors, 0, first.memory, dict(first.sums), shut=True)
            return any(first.sums.get(spot) != found for spot, found in box.sums.items())

    def differing(self) -> list[int]:
        """The leases of which something else came, since the last call, than of who was first."""
        with self._lock:
            found, self._differ = self._differ, []
            return found

    def compare_no_more(self, lease: int) -> None:
        """Of that lease nothing is of interest any more."""
        with self._lock:
            self._late.pop(lease, None)

    def forget(self, member: int) -> None:
        """A member is gone, and so is its memory, once nobody adds up what came of it."""
        for key in [key for key in self._memory if key[0] == member]:
            del self._memory[key]

    def looked_at(self, piece: Piece, memory: Array | None) -> list[Piece]:
        """The chunks that a message stands for, which may lie in that memory. Raises ValueError."""
        return looked_at(piece, memory, self._cuts, self.dtype.itemsize)

    def take(self, piece: Piece) -> tuple[pb.Outcome.ValueType, str]:
        """What became of a chunk, whose membership was looked at before, and why; OUTCOME_UNSPECIFIED: taken."""
        place = piece.place
        with self._lock:
            box = self._open.get(place.lease) or self._late.get(place.lease)
        if box is None:
            return pb.OUTCOME_STALE, f"lease {place.lease} does not count any more"
        wrong = self._wrong(piece, box)
        if wrong:
            return pb.OUTCOME_REFUSED, wrong
        lent = place.HasField("lent")
        if not lent and checksum(piece.data) != place.checksum:
            return pb.OUTCOME_DAMAGED, _DAMAGED
        spot = (box.nodes.index(Node(place.lo, place.hi)), place.offset)
        with self._lock:
            if box.shut:
                if self._late.get(place.lease, box).sums.get(spot, place.checksum) != place.checksum:
                    self._differ.append(place.lease)
                return pb.OUTCOME_STALE, f"lease {place.lease} does not count any more"
            if spot in box.sums:
                same = box.sums[spot] == place.checksum
                return pb.OUTCOME_DUPLICATE, "" if same else "it holds other bytes than the first"
            box.sums[spot] = place.checksum
        row, offset = spot
        stop = self._cuts[offset]
        some = box.vectors[row, offset:stop]
        try:
            elements(piece, some)
        except ValueError as error:
            with self._lock:
                del box.sums[spot]
            return pb.OUTCOME_REFUSED, str(error)
        if lent and checksum(some.data) != place.checksum:
            # Bytes that another process may write to are known only once they are copied.
            with self._lock:
                del box.sums[spot]
            return pb.OUTCOME_DAMAGED, _DAMAGED
        with np.errstate(over="ignore"):
            sound = finite(some)
        with self._lock:
            box.finite = box.finite and sound
            box.missing -= 1
            return (pb.OUTCOME_UNSPECIFIED if box.missing else pb.OUTCOME_COMPLETE), ""

    def _wrong(self, piece: Piece, box: Box) -> str:
        place = piece.place
        if place.segment != self.segment or place.total != self.hi - self.lo:
            return f"segment {self.segment} has {self.hi - self.lo} elements, not {place.total} of {place.segment}"
        if Node(place.lo, place.hi) not in box.nodes:
            return f"shards {place.lo} to {place.hi} are no node of lease {place.lease}"
        if not self._written.may_be(place.encoding, place.offset):
            return f"encoding {place.encoding} is not the job's"
        if place.HasField("lent") and place.encoding != pb.ENCODING_RAW:
            return "only elements as they are can be lent"
        stop = self._cuts.get(place.offset)
        if stop is None or not fits(piece, stop - place.offset, self.dtype):
            return f"{len(piece.data)} bytes at element {place.offset} are no chunk"
        return ""
