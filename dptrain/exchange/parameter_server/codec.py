"""Chunks as bytes on the wire, without copying them more often than needed.

A chunk is an ordinary protobuf message of two fields, a Place and the data. Here it is put together in one copy, and
taken apart without one: generated code copies the data once more each way. Any other order of fields is read by the
generated code.
"""

from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import xxhash

from dptrain.layout import Array
from dptrain.v1 import parameter_server_pb2 as pb

CHUNK = 1 << 20
"""The most bytes of data in a chunk."""

_PLACE, _DATA = b"\x0a", b"\x12"
_LONGEST_VARINT = 5

Chunk = TypeVar("Chunk", pb.PushRequest, pb.PullResponse)


class Piece(NamedTuple):
    """A chunk as it came. ``data`` is a view of the message."""

    place: pb.Place
    data: memoryview


def cuts(elements: int, itemsize: int) -> list[tuple[int, int]]:
    """The chunks of a segment: ranges of elements. A segment without elements has none."""
    step = CHUNK // itemsize
    return [(lo, min(elements, lo + step)) for lo in range(0, elements, step)]


def checksum(data: bytes | memoryview) -> int:
    """That of a chunk's bytes."""
    return xxhash.xxh3_64_intdigest(data)


def encode(place: pb.Place, vector: Array) -> bytes:
    """A chunk of contiguous elements, with its checksum, as the bytes of a PushRequest or PullResponse."""
    little = vector if vector.dtype.isnative and vector.dtype.byteorder != ">" else vector.astype(_little(vector.dtype))
    data = little.view(np.uint8).data
    place.checksum = checksum(data)
    head = place.SerializeToString()
    return b"".join((_PLACE, _varint(len(head)), head, _DATA, _varint(len(data)), data))


def decode_push(message: bytes) -> Piece:
    """A PushRequest. Raises google.protobuf's DecodeError."""
    return _decode(pb.PushRequest, message)


def decode_pull(message: bytes) -> Piece:
    """A PullResponse. Raises google.protobuf's DecodeError."""
    return _decode(pb.PullResponse, message)


def elements(piece: Piece, dtype: npt.DTypeLike) -> Array:
    """The data as elements, a view."""
    return np.frombuffer(piece.data, _little(dtype))


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


def _little(dtype: npt.DTypeLike) -> np.dtype[np.generic]:
    return np.dtype(dtype).newbyteorder("<")


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
