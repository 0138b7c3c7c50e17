"""How elements of a flat vector become bytes to send, and elements again, without loss.

An encoding fits the declared arithmetic of gradients (``dptrain.gradients``): what is rounded to 16 bits is sent in two
bytes an element, what is mostly zeros as indices and values. Bytes are little-endian; no transport is known here.
"""

import sys
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dptrain.layout import Array

RAW, BFLOAT16, FLOAT16, SPARSE = "raw", "bfloat16", "float16", "sparse"
ENCODINGS = (RAW, BFLOAT16, FLOAT16, SPARSE)

_HALF = np.uint32(16)
"""Bits of a bfloat16, which is the upper half of a float32."""

if sys.byteorder != "little":
    raise ImportError("dptrain needs a little-endian machine")


class Packed(NamedTuple):
    """Elements as bytes. ``pieces`` one after the other are the message; they may be views of what was packed."""

    encoding: str
    pieces: Sequence[Array]

    @property
    def nbytes(self) -> int:
        """The length of the message."""
        return sum(piece.nbytes for piece in self.pieces)


def encoding_of(gradients: str) -> str:
    """The encoding of sums of gradients in this declared arithmetic (``Gradients.name``)."""
    return {"bfloat16": BFLOAT16, "float16": FLOAT16, "top_k": SPARSE}.get(gradients, RAW)


def ranges(lo: int, hi: int, parameters: int, encoding: str) -> list[tuple[int, int, str]]:
    """Elements lo to hi of the flat vector as parts of one encoding each: buffers, at its end, are sent raw."""
    cut = min(max(lo, parameters), hi)
    return [part for part in ((lo, cut, encoding), (cut, hi, RAW)) if part[0] < part[1]]


def pack(vector: Array, encoding: str) -> Packed:
    """The elements of a contiguous vector as bytes; exact for values that the encoding's arithmetic gives.

    A vector that sparse would make longer goes raw, so look at the encoding that comes back.
    """
    if encoding == SPARSE:
        index = np.flatnonzero(vector)
        if len(index) * (4 + vector.itemsize) >= vector.nbytes:
            return Packed(RAW, [vector.view(np.uint8)])
        return Packed(SPARSE, [index.astype(np.uint32).view(np.uint8), vector[index].view(np.uint8)])
    if encoding == BFLOAT16:
        return Packed(BFLOAT16, [vector.view(np.uint16)[1::2].copy().view(np.uint8)])
    if encoding == FLOAT16:
        with np.errstate(over="ignore", under="ignore"):
            return Packed(FLOAT16, [vector.astype(np.float16).view(np.uint8)])
    return Packed(RAW, [vector.view(np.uint8)])


def fits(nbytes: int, encoding: str, elements: int, itemsize: int) -> bool:
    """Whether so many bytes may be a message of so many elements."""
    if encoding == SPARSE:
        return nbytes % (4 + itemsize) == 0 and nbytes < elements * itemsize
    return nbytes == elements * (itemsize if encoding == RAW else 2)


def unpack(content: Array, encoding: str, into: Array) -> None:
    """Write the elements that ``content``, the bytes of a message, holds over all of ``into``.

    Raises ValueError where the bytes are none of that many elements.
    """
    wanted = {RAW: into.nbytes, BFLOAT16: 2 * len(into), FLOAT16: 2 * len(into)}.get(encoding)
    if encoding not in ENCODINGS:
        raise ValueError(f"an encoding {encoding!r}")
    if wanted is None:
        _unpack_sparse(content, into)
        return
    if content.nbytes != wanted:
        raise ValueError(f"{content.nbytes} bytes, not {wanted}, for {len(into)} elements in {encoding}")
    if encoding == BFLOAT16:
        np.left_shift(content.view(np.uint16), _HALF, out=into.view(np.uint32), dtype=np.uint32)
    elif encoding == FLOAT16:
        np.copyto(into, content.view(np.float16))
    else:
        np.copyto(into, content.view(into.dtype))


def _unpack_sparse(content: Array, into: Array) -> None:
    pair = 4 + into.itemsize
    count, rest = divmod(content.nbytes, pair)
    if rest:
        raise ValueError(f"{content.nbytes} bytes of sparse elements, no multiple of {pair}")
    index = content[: 4 * count].view(np.uint32)
    # Each index above the one before it, so that none comes twice.
    if count and (index[-1] >= len(into) or (index[1:] <= index[:-1]).any()):
        raise ValueError(f"indices that do not rise within {len(into)} elements")
    into.fill(0)
    into[index] = np.frombuffer(content[4 * count :].tobytes(), into.dtype)
