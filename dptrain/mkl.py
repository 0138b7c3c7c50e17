"""Intel's MKL (extra ``mkl``), set so that the bits of a product depend on its operands' values alone.

What Intel promises for ``?gemm`` in the strict form of its conditional numerical reproducibility: on a branch (a set of
kernels) the same bits whatever the alignment of the operands and the number of threads, on every Intel CPU that has the
branch. The mode is the process's, and has to be set before the first product.
"""

import ctypes
from dataclasses import dataclass
from functools import cache
from typing import Any

from dptrain.errors import ArithmeticMismatch

PRODUCTS = 'arithmetic.products = "mkl"'

_STRICT, _ALL = 0x10000, -1
_AVX2, _AVX512 = 10, 12
_BRANCHES = {_AVX2: "AVX2", _AVX512: "AVX512"}
"""Those that have the strict form."""

_CHANGED_TOO_LATE = -8
"""MKL_CBWR_ERR_MODE_CHANGE_FAILURE."""

_SEQUENTIAL, _INTEL_OPENMP = 1, 0
_INTS_OF_32_BITS = 0


@dataclass(frozen=True)
class Mkl:
    """The library as it is set in this process. ``sgemm`` and ``dgemm`` are the CBLAS functions, undeclared."""

    version: str
    branch: str
    sgemm: Any
    dgemm: Any

    @property
    def name(self) -> str:
        """What makes the products, for the result and for errors."""
        return f"MKL {self.version}, {self.branch}, strict"


def load(kernels: str, threads: int) -> Mkl:
    """MKL with the kernels and threads of a job's arithmetic; it may be asked for again, by every job of a process.

    Raises ArithmeticMismatch where it is not installed, where the CPU has no branch whose bits are promised, and where
    something in this process had MKL already, and set otherwise.
    """
    library, version = _open()
    found = library.MKL_Set_Interface_Layer(_INTS_OF_32_BITS)
    if found != _INTS_OF_32_BITS:
        raise _refused("integers of 32 bits", f"layer {found} in use already")
    found = library.MKL_Set_Threading_Layer(_SEQUENTIAL if threads == 1 else _INTEL_OPENMP)
    if found != _INTEL_OPENMP and (found, threads) != (_SEQUENTIAL, 1):
        raise _refused(f"a threading layer for arithmetic.threads = {threads}", f"layer {found} in use already")
    branch = _set_branch(library, kernels)
    library.MKL_Set_Dynamic(0)
    library.MKL_Set_Num_Threads(threads)
    return Mkl(version, branch, _function(library, "cblas_sgemm"), _function(library, "cblas_dgemm"))


def _set_branch(library: Any, kernels: str) -> str:
    best = library.MKL_CBWR_Get_Auto_Branch()
    wanted = _AVX512 if kernels == "native" and best >= _AVX512 else _AVX2
    status = library.MKL_CBWR_Set(wanted | _STRICT)
    if status == _CHANGED_TOO_LATE:
        raise _refused(f"its {_BRANCHES[wanted]} branch", "that it has made products already, on another")
    if status or library.MKL_CBWR_Get(_ALL) != wanted | _STRICT:
        raise ArithmeticMismatch(
            PRODUCTS,
            expected=f"a CPU on which MKL promises the bits of its {_BRANCHES[wanted]} branch",
            found=f"none that MKL knows as such (it gives {status} for an answer)",
            cure='set arithmetic.products = "numpy"',
        )
    return _BRANCHES[wanted]


def _refused(expected: str, found: str) -> ArithmeticMismatch:
    return ArithmeticMismatch(
        PRODUCTS, expected=f"MKL with {expected}", found=found, cure="train this job in a process of its own"
    )


@cache
def _open() -> tuple[Any, str]:
    """The library that pip installed in this environment, and its version."""
    from importlib import metadata

    try:
        installed = metadata.distribution("mkl")
        path = next(file for file in installed.files or () if file.name.startswith("libmkl_rt.so"))
        return ctypes.CDLL(str(installed.locate_file(path))), installed.version
    except (metadata.PackageNotFoundError, StopIteration, OSError) as error:
        raise ArithmeticMismatch(
            PRODUCTS,
            expected="Intel's MKL in this environment",
            found=f"none ({error or 'its package has no libmkl_rt.so'})",
            cure="pip install 'dptrain[mkl]', on every machine; or set arithmetic.products = \"numpy\"",
        ) from None


def _function(library: Any, name: str) -> Any:
    function = getattr(library, name)
    function.restype = None
    return function
