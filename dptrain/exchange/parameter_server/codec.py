"""Chunks as bytes on the wire, without copying them more often than needed.

A chunk is an ordinary protobuf message of two fields, a Place and the data. Here it is put together in one copy, and
taken apart without one: generated code copies the data once more each way. Any other order of fields is read by the
generated code.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import xxhash

from dptrain import packing
from dptrain.layout import Array
from dptrain.v1 import parameter_server_pb2 as pb

CHUNK = 1 << 20
"""The most bytes of data in a chunk."""

TOGETHER = 16
"""The most chunks that one message tells of."""

Version = tuple[int, bool]
"""The number of steps that led to weights, and whether they are the best ones."""

_ALIGNED = 16
"""Elements; a chunk is cut at their multiples."""

_PLACE, _DATA = b"\x0a", b"\x12"
_LONGEST_VARINT = 5

Chunk = TypeVar("Chunk", pb.PushRequest, pb.PullResponse)


class Piece(NamedTuple):
    """A chunk as it came. ``data`` is a view of the message."""

    place: pb.Place
    data: memoryview


_ENCODINGS: dict[str, pb.Encoding.ValueType] = {
    packing.RAW: pb.ENCODING_RAW,
    packing.BFLOAT16: pb.ENCODING_BFLOAT16,
    packing.FLOAT16: pb.ENCODING_FLOAT16,
    packing.SPARSE: pb.ENCODING_SPARSE,
}
_NAMES = {number: name for name, number in _ENCODINGS.items()}


class Written(NamedTuple):
    """How the vectors of partials are written: their first ``parameters`` elements so, the others as they are."""

    encoding: str
    parameters: int

    def at(self, element: int) -> pb.Encoding.ValueType:
        """The encoding of a chunk that begins there."""
        return _ENCODINGS[self.encoding] if element < self.parameters else pb.ENCODING_RAW

    def may_be(self, encoding: pb.Encoding.ValueType, element: int) -> bool:
        """Whether a chunk that begins there may be written so: what sparse would make longer goes as it is."""
        wanted = self.at(element)
        return encoding == wanted or (wanted == pb.ENCODING_SPARSE and encoding == pb.ENCODING_RAW)


def cuts(elements: int, itemsize: int, border: int = 0) -> list[tuple[int, int]]:
    """The chunks of a segment: ranges of elements, none of them across the border.

    All on one side of it are about as long, so that one can be on its way while another is made, and a third is read.
    A segment without elements has none.
    """
    middle = min(border, elements)
    return [*_even(0, middle, CHUNK // itemsize), *_even(middle, elements, CHUNK // itemsize)]


def _even(lo: int, hi: int, most: int) -> list[tuple[int, int]]:
    """As few ranges of at most so many elements as there can be."""
    count = -(-(hi - lo) // most)
    # Rounded up to where memory is aligned, none gets longer than the most, which is a multiple too.
    starts = [lo + -(-(hi - lo) * i // (count * _ALIGNED)) * _ALIGNED for i in range(count)]
    return list(pairwise([*starts, hi]))


def checksum(data: bytes | memoryview) -> int:
    """That of a chunk's bytes."""
    return xxhash.xxh3_64_intdigest(data)


def encode(place: pb.Place, vector: Array) -> bytes:
    """A chunk of contiguous elements, with its checksum, as the bytes of a PushRequest or PullResponse.

    It is written in the encoding that its place names, or raw where sparse would be longer.
    """
    packed = packing.pack(vector, _NAMES[place.encoding])
    place.encoding = _ENCODINGS[packed.encoding]
    data = packed.pieces[0].data if len(packed.pieces) == 1 else b"".join(piece.tobytes() for piece in packed.pieces)
    place.checksum = checksum(data)
    head = place.SerializeToString()
    return b"".join((_PLACE, _varint(len(head)), head, _DATA, _varint(len(data)), data))


def together(some: Sequence[tuple[int, int]]) -> list[Sequence[tuple[int, int]]]:
    """Chunks that follow each other, as they are told of in one message each where they lie in memory that is lent."""
    return [some[at : at + TOGETHER] for at in range(0, len(some), TOGETHER)]


def lent(place: pb.Place, vectors: Sequence[Array], where: pb.Lent) -> bytes:
    """Chunks one after the other, of the first of which ``place`` is, that lie ``where`` the receiver looks."""
    place.checksum, *following = [checksum(vector.data) for vector in vectors]
    place.lent.CopyFrom(where)
    place.lent.following.extend(following)
    head = place.SerializeToString()
    return b"".join((_PLACE, _varint(len(head)), head))


def looked_at(piece: Piece, memory: Array | None, cuts: Mapping[int, int], itemsize: int) -> list[Piece]:
    """The chunks that a message stands for, with their bytes, which may lie in the sender's memory.

    ``cuts`` are where the segment's chunks begin and end. Raises ValueError where these are none, or that isn't lent.
    """
    if not piece.place.HasField("lent"):
        return [piece]
    lent = piece.place.lent
    if memory is None or len(piece.data) or lent.at + lent.bytes > len(memory):
        raise ValueError("no memory that is lent")
    data, found, at, offset = memory[lent.at : lent.at + lent.bytes].data, [], 0, piece.place.offset
    for checksum in (piece.place.checksum, *lent.following):
        place = pb.Place()
        place.CopyFrom(piece.place)
        place.offset, place.checksum = offset, checksum
        stop = cuts.get(offset)
        if stop is None:
            raise ValueError(f"no chunk begins at element {offset}")
        found.append(Piece(place, data[at : at + (stop - offset) * itemsize]))
        at, offset = at + (stop - offset) * itemsize, stop
    if at != lent.bytes:
        raise ValueError(f"{lent.bytes} bytes are not those of the chunks")
    return found


def decode_push(message: bytes) -> Piece:
    """A PushRequest. Raises google.protobuf's DecodeError."""
    return _decode(pb.PushRequest, message)


def decode_pull(message: bytes) -> Piece:
    """A PullResponse. Raises google.protobuf's DecodeError."""
    return _decode(pb.PullResponse, message)


def elements(piece: Piece, into: Array) -> None:
    """Write the chunk's elements over all of ``into``. Raises ValueError where they are not as many."""
    packing.unpack(np.frombuffer(piece.data, np.uint8), _NAMES[piece.place.encoding], into)


def fits(piece: Piece, count: int, dtype: npt.DTypeLike) -> bool:
    """Whether the chunk's data may be so many elements."""
    itemsize = np.dtype(dtype).itemsize
    return packing.fits(len(piece.data), _NAMES[piece.place.encoding], count, itemsize)


def _decode(kind: type[Chunk], message: bytes) -> Piece:
    view = memoryview(message)
    if message[:1] == _PLACE:
        length, start = _read_varint(message, 1)
        end = start + length
        if start and message[end : end + 1] == _DATA:
            size, data = _read_varint(message, end + 1)
            if data and data + size == len(message):
                return Piece(pb.Place.FromString(message[start:end]), view[data:])
    whole = kind.FromString(message)
    return Piece(whole.place, memoryview(whole.data))


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


def _read_varint(message: bytes, at: int) -> tuple[int, int]:
    """The number, and where what follows begins: 0 where there is no number."""
    value = 0
    for i, byte in enumerate(message[at : at + _LONGEST_VARINT]):
        value |= (byte & 0x7F) << 7 * i
        if byte < 0x80:
            return value, at + i + 1
    return 0, 0
