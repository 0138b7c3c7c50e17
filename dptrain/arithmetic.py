"""Which kernels compute: set before numpy is loaded, checked where it is too late.

``native`` leaves numpy and its BLAS to pick what is fastest on this CPU. ``portable`` pins them to what every x86-64
machine with AVX2 has, so that all such machines agree with the same numpy build, at a measured price.
"""

import os
import platform
import resource
import sys
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from typing import Any

from dptrain import mkl
from dptrain.errors import ArithmeticMismatch

_THREADS = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "BLIS_NUM_THREADS")

PORTABLE = {
    "OPENBLAS_CORETYPE": "Haswell",
    # numpy before 2.4 knows the first names, later ones the last; it passes over those it doesn't know.
    "NPY_DISABLE_CPU_FEATURES": "AVX512F AVX512CD AVX512_SKX AVX512_CLX AVX512_CNL AVX512_ICL AVX512_SPR X86_V4",
}


def choose(kernels: str, threads: int, environ: MutableMapping[str, str] = os.environ) -> None:
    """Set the environment for the job's arithmetic; it counts only if numpy is not loaded yet."""
    if "numpy" in sys.modules:
        return
    for variable in _THREADS:
        environ[variable] = str(threads)
    if kernels == "portable":
        environ.update(PORTABLE)


@contextmanager
def limited(threads: int) -> Iterator[None]:
    """Within it, every BLAS in the process runs this many threads, however it was started."""
    if all(os.environ.get(variable) == str(threads) for variable in _THREADS):
        yield
        return
    from threadpoolctl import threadpool_limits

    with threadpool_limits(threads):
        yield


def describe(kernels: str, threads: int, products: str = "numpy") -> dict[str, Any]:
    """What computes here, for the result and for the comparison of workers.

    Raises ArithmeticMismatch where the job wants portable kernels and numpy was loaded with others, and where it wants
    MKL's products and MKL can't be had.
    """
    import numpy as np

    features = _numpy_features()
    wide = sorted(name for name in features if name.startswith("AVX512") or name == "X86_V4")
    if kernels == "portable" and (wide or os.environ.get("OPENBLAS_CORETYPE") != PORTABLE["OPENBLAS_CORETYPE"]):
        raise ArithmeticMismatch(
            'arithmetic.kernels = "portable"',
            expected="numpy to be loaded with AVX2 kernels at most",
            found=f"kernels in use: {', '.join(wide) or 'chosen by the CPU'}",
            cure="use the dptrain command, or set "
            + " ".join(f"{name}='{value}'" for name, value in PORTABLE.items())
            + " before Python imports numpy",
        )
    blas = np.show_config("dicts").get("Build Dependencies", {}).get("blas", {})
    return {
        "kernels": kernels,
        "threads": threads,
        "numpy": np.__version__,
        "blas": f"{blas.get('name', '?')} {blas.get('version', '?')}",
        "products": "numpy" if products == "numpy" else mkl.load(kernels, threads).name,
        "machine": platform.machine(),
    }


def kernel_hash() -> str:
    """A hash of what numpy and its BLAS compute here from given numbers: products, sums and functions.

    It tells most machines apart that compute other bits. What a job itself computes is compared at its start.
    """
    import hashlib

    import numpy as np

    content = hashlib.sha256()
    rng = np.random.Generator(np.random.Philox(1))
    for dtype in (np.float32, np.float64):
        x: Any = rng.standard_normal((67, 301)).astype(dtype)
        w: Any = rng.standard_normal((301, 130)).astype(dtype)
        y = x @ w
        for made in (y, x[:1] @ w, np.matmul(x.T, y), np.exp(x), np.tanh(x), np.log(np.abs(x)), x.sum(0), y.sum(1)):
            content.update(np.ascontiguousarray(made).tobytes())
    return "sha256:" + content.hexdigest()


def peak_memory() -> int:
    """The most bytes this program has had in memory so far."""
    try:
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        # Elsewhere; on Linux it would count what the program that started this one had.
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _numpy_features() -> set[str]:
    import numpy as np

    found = np.show_config("dicts").get("SIMD Extensions", {}).get("found", [])
    return set(found)


def named(described: Mapping[str, Any]) -> str:
    """A few words on what :func:`describe` says."""
    # Checkpoints of earlier versions don't name what made their products.
    products = described.get("products", "numpy")
    made = "" if products == "numpy" else f", products by {products}"
    return f"{described['kernels']} kernels, numpy {described['numpy']}, {described['blas']}{made}"
