"""Rounding to bfloat16 in one pass over memory instead of six, compiled by numba (extra ``compiled``)."""

import numba
import numpy as np

from dptrain.layout import Array


def to_bfloat16(some: Array) -> None:
    """Round contiguous float32 in place, to nearest, ties to even; NaN becomes the same NaN as without numba."""
    _round(some.view(np.uint32))


@numba.njit(cache=True)
def _round(bits):  # type: ignore[no-untyped-def]  # numba finds the types
    for i in range(bits.size):
        number = bits[i]
        if number & 0x7FFFFFFF > 0x7F800000:
            bits[i] = 0x7FC00000
        else:
            bits[i] = (number + 0x7FFF + (number >> 16 & 1)) & 0xFFFF0000
