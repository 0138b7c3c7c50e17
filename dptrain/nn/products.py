"""Matrix products of the layers: by numpy, or by MKL with one ``?gemm`` for each shard."""

from collections.abc import Callable
from ctypes import c_double, c_float, c_int, c_void_p
from typing import Any, Protocol, cast

import numpy as np

from dptrain import mkl
from dptrain.job import spec
from dptrain.nn.layer import Array

LEAST = 1 << 20
"""Multiplications of one shard's product from which MKL is quicker than numpy, its call from Python included."""

NARROWEST = 8
"""Of no fewer rows, columns and terms, too."""

_ROW_MAJOR, _AS_IT_IS, _TRANSPOSED = c_int(101), c_int(111), c_int(112)


class Matmul(Protocol):
    """``np.matmul(a, b, out=out)`` for operands of two axes or three, shards first; ``out`` overlaps neither.

    The bits of a shard's product depend on its own operands alone: not on how many shards there are, nor on where in
    memory anything lies.
    """

    def __call__(self, a: Array, b: Array, /, *, out: Array) -> Any:
        """Fill ``out`` wholly."""


numpy_matmul = cast(Matmul, np.matmul)


def maker(arithmetic: spec.Arithmetic) -> Matmul:
    """What makes the products of a job. Raises ArithmeticMismatch where MKL is wanted and can't be had."""
    return MklMatmul(mkl.load(arithmetic.kernels, arithmetic.threads)) if arithmetic.products == "mkl" else numpy_matmul


class MklMatmul:
    """Matmul by MKL; numpy where the product is small or lies in a way that BLAS can't take."""

    def __init__(self, library: mkl.Mkl) -> None:
        self._library = library
        self._plans: dict[Any, Callable[[Array, Array, Array], None] | None] = {}

    def __call__(self, a: Array, b: Array, /, *, out: Array) -> None:
        """See Matmul."""
        key = (
            a.shape,
            a.strides,
            a.dtype.char,
            b.shape,
            b.strides,
            b.dtype.char,
            out.shape,
            out.strides,
            out.dtype.char,
        )
        try:
            plan = self._plans[key]
        except KeyError:
            plan = self._plans[key] = self._planned(a, b, out)
        if plan is None:
            np.matmul(a, b, out=out)
        else:
            plan(a, b, out)

    def _planned(self, a: Array, b: Array, out: Array) -> Callable[[Array, Array, Array], None] | None:
        """The call of MKL for operands that lie like these; None leaves them to numpy.

        Whether it is MKL is decided by a shard's shape, strides and dtype, never by the number of shards.
        """
        gemm, number = {"f": (self._library.sgemm, c_float), "d": (self._library.dgemm, c_double)}.get(
            out.dtype.char, (None, c_float)
        )
        (m, terms), n = a.shape[-2:], b.shape[-1]
        if gemm is None or not a.dtype == b.dtype == out.dtype:
            return None
        if m * terms * n < LEAST or min(m, terms, n) < NARROWEST:
            return None
        lies = [_matrix(array) for array in (a, b, out)]
        if None in lies or lies[2][0] is _TRANSPOSED:  # type: ignore[index]
            return None
        (a_turned, a_step), (b_turned, b_step), (_, out_step) = cast(list[tuple[c_int, c_int]], lies)
        if {array.shape[:-2] for array in (a, b)} - {(), out.shape[:-2]}:
            return None
        head = (_ROW_MAJOR, a_turned, b_turned, c_int(m), c_int(n), c_int(terms), number(1))
        zero = number(0)
        shards = len(out) if out.ndim == 3 else 1
        a_next, b_next, out_next = (array.strides[0] if array.ndim == 3 else 0 for array in (a, b, out))

        def plan(a: Array, b: Array, out: Array) -> None:
            at_a, at_b, at_out = a.ctypes.data, b.ctypes.data, out.ctypes.data
            for _ in range(shards):
                gemm(*head, c_void_p(at_a), a_step, c_void_p(at_b), b_step, zero, c_void_p(at_out), out_step)
                at_a += a_next
                at_b += b_next
                at_out += out_next

        return plan


def _matrix(array: Array) -> tuple[c_int, c_int] | None:
    """How BLAS is told of the last two axes, and of the items between rows; None where it can't be."""
    if array.ndim not in (2, 3):
        return None
    item = array.itemsize
    rows, columns = array.shape[-2:]
    down, along = array.strides[-2:]
    if along == item and down >= columns * item and down % item == 0:
        return _AS_IT_IS, c_int(down // item)
    if down == item and along >= rows * item and along % item == 0:
        return _TRANSPOSED, c_int(along // item)
    return None
