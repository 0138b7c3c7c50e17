"""The declared arithmetic of gradients: what becomes of a shard's gradient before it is added, and of every sum.

It is part of the job, not of a wire: every node of the canonical tree has the same value whoever computes it, so the
bits are the same for any number of workers, and what is sent can be packed without loss (``dptrain.packing``). Buffers
at the end of the flat vector (running statistics) and tallies are never touched.
"""

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from dptrain.layout import Array

_CHUNK = 1 << 16
"""Elements that are rounded at once: they and their scratch stay in a core's cache."""

_HALF, _LAST, _BELOW, _UPPER = (np.uint32(number) for number in (16, 1, 0x7FFF, 0xFFFF0000))
"""Of a bfloat16 in a float32: its bits, its last place, less than half of that, and the mask. Python's own integers
would be converted with every call.
"""


class Gradients:
    """One declared arithmetic; this one leaves all as it is. Not for two threads at a time: see ``apart``."""

    name = "exact"
    rounds = False
    """Whether sums are rounded."""
    leaves = False
    """Whether a shard's gradient is changed before it is added."""
    feeds_back = False
    """Whether each shard keeps a residual, a vector over the parameters, from step to step."""

    def apart(self) -> "Gradients":
        """The same arithmetic with scratch of its own."""
        return self

    def leaf(self, tensor: Array, old: Array | None, new: Array | None) -> None:
        """Make of one tensor of a shard's gradient, in place, what is added.

        ``old`` is the shard's committed residual there, None for zeros; ``new``, None where nobody wants it, gets what
        it is after this step.
        """

    def round(self, total: Array) -> None:
        """Make of float32(left) + float32(right), in place, the value of their node."""

    def describe(self) -> dict[str, Any]:
        """For a person, and for results."""
        return {"gradients": self.name}


class Rounded(Gradients):
    """A shard's gradient and every sum are rounded to a 16-bit type, to nearest, ties to even; arrays stay float32.

    Beyond the type's range a value becomes infinite, NaN stays NaN. ``compiled``: bfloat16 by numba, the bits are the
    same.
    """

    rounds = leaves = True

    def __init__(self, name: str, *, compiled: bool = False) -> None:
        self.name, self._compiled = name, compiled
        self._scratch = np.empty(_CHUNK, np.uint32)
        self._round = {"bfloat16": self._to_bfloat16, "float16": self._to_float16}[name]
        if compiled and name == "bfloat16":
            from dptrain.rounding import to_bfloat16

            self._round = to_bfloat16

    def apart(self) -> "Rounded":
        """See Gradients."""
        return Rounded(self.name, compiled=self._compiled)

    def leaf(self, tensor: Array, old: Array | None, new: Array | None) -> None:
        """See Gradients."""
        self.round(tensor)

    def round(self, total: Array) -> None:
        """See Gradients."""
        flat = total.reshape(-1)
        for start in range(0, len(flat), _CHUNK):
            self._round(flat[start : start + _CHUNK])

    def _to_bfloat16(self, some: Array) -> None:
        """bfloat16 is the upper half of float32: add half of its last place, less one where it is even, and cut."""
        nan = None if np.isfinite(np.dot(some, some)) else np.isnan(some)
        bits, odd = some.view(np.uint32), self._scratch[: len(some)]
        np.right_shift(bits, _HALF, out=odd)
        np.bitwise_and(odd, _LAST, out=odd)
        np.add(odd, _BELOW, out=odd)
        np.add(bits, odd, out=bits)
        np.bitwise_and(bits, _UPPER, out=bits)
        if nan is not None:
            # The carry could have made anything of it.
            some[nan] = np.nan

    def _to_float16(self, some: Array) -> None:
        half = self._scratch.view(np.float16)[: len(some)]
        with np.errstate(over="ignore", under="ignore"):
            np.copyto(half, some, casting="unsafe")
        np.copyto(some, half)


class TopK(Gradients):
    """Of each tensor of a shard's gradient only a share of largest magnitude is added, the rest waits in a residual.

    v = gradient + residual; the k = ceil(share * n) elements of largest magnitude are added, of equal ones those of
    lowest index; the residual keeps the others. Nodes are exact sums. Error feedback after Stich et al. (2018),
    "Sparsified SGD with memory"; a k for each tensor after Lin et al. (2018), "Deep Gradient Compression".
    """

    name = "top_k"
    leaves = feeds_back = True

    def __init__(self, share: float) -> None:
        self.share = share
        self._magnitude = np.empty(0, np.float32)
        self._ordered = np.empty(0, np.float32)
        self._kept = self._equal = np.empty(0, np.bool_)

    def apart(self) -> "TopK":
        """See Gradients."""
        return TopK(self.share)

    def leaf(self, tensor: Array, old: Array | None, new: Array | None) -> None:
        """See Gradients."""
        v = tensor.reshape(-1)
        if old is not None:
            np.add(v, old, out=v)
        if not finite(v):
            # Kept back it would be hidden; added, the verdict on the step tells of it, and no residual is committed.
            return
        rest = self._rest(v)
        if new is not None:
            np.copyto(new, rest)
        # x - x is +0 and x - 0 is x, so that no -0 comes up here or in a sum.
        np.subtract(v, rest, out=v)

    def _rest(self, v: Array) -> Array:
        """v with zeros where it is kept; valid until the next call."""
        n = len(v)
        if n > len(self._magnitude):
            self._magnitude = np.empty(n, np.float32)
            self._ordered = np.empty(n, np.float32)
            self._kept, self._equal = np.empty((2, n), np.bool_)
        magnitude, ordered, kept = self._magnitude[:n], self._ordered[:n], self._kept[:n]
        np.abs(v, out=magnitude)
        np.copyto(ordered, magnitude)
        k = elements_kept(self.share, n)
        ordered.partition(n - k)
        least = ordered[n - k]
        np.greater(magnitude, least, out=kept)
        ties = k - int(np.count_nonzero(kept))
        if least > 0 and ties:
            equal = np.equal(magnitude, least, out=self._equal[:n])
            kept[np.flatnonzero(equal)[:ties]] = True
        np.copyto(ordered, v)
        np.copyto(ordered, 0, where=kept)
        return ordered

    def describe(self) -> dict[str, Any]:
        """See Gradients."""
        return {"gradients": self.name, "top_k": self.share}


def elements_kept(share: float, elements: int) -> int:
    """k: so many of a tensor's elements are kept, at least one."""
    return max(1, math.ceil(share * elements))


def declared(name: str, top_k: float, *, compiled: bool = False) -> Gradients:
    """The arithmetic that ``arithmetic.gradients`` and ``arithmetic.top_k`` of a job name; ``compiled`` by numba where
    that makes it faster, the bits are the same.
    """
    if name in ("bfloat16", "float16"):
        return Rounded(name, compiled=compiled)
    return TopK(top_k) if name == "top_k" else Gradients()


def sample(gradients: Gradients, vectors: Array) -> bytes:
    """What it makes of the gradients of two shards, as bytes: for a fingerprint."""
    own = gradients.apart()
    left, right = (np.array(vector) for vector in vectors[:2])
    kept: npt.NDArray[Any] = np.zeros_like(left)
    own.leaf(left, None, kept)
    own.leaf(right, kept, kept.copy())
    np.add(left, right, out=left)
    own.round(left)
    return left.tobytes() + kept.tobytes()


def finite(vector: Array) -> bool:
    """Whether all elements are finite."""
    # The product is much quicker than a look at every element, but overflows where all are finite.
    return bool(np.isfinite(np.dot(vector, vector)) or np.isfinite(vector).all())
