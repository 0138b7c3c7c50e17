import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from dptrain import arithmetic
from dptrain.errors import ArithmeticMismatch

AVX2 = """
import os, sys
from dptrain import arithmetic
assert "numpy" not in sys.modules
arithmetic.choose("portable", 1)
print(os.environ["OPENBLAS_NUM_THREADS"], arithmetic.describe("portable", 1)["kernels"])
"""


def test_once_numpy_is_loaded_nothing_is_chosen_any_more() -> None:
    environ: dict[str, str] = {}
    arithmetic.choose("portable", 3, environ)
    assert environ == {}


def test_kernels_and_threads_are_set_before_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "numpy")
    environ: dict[str, str] = {}
    arithmetic.choose("native", 3, environ)
    assert environ["OPENBLAS_NUM_THREADS"] == environ["OMP_NUM_THREADS"] == "3"
    assert "OPENBLAS_CORETYPE" not in environ
    arithmetic.choose("portable", 3, environ)
    assert environ["OPENBLAS_CORETYPE"] == "Haswell"


def test_a_fresh_process_gets_portable_kernels() -> None:
    found = arithmetic._numpy_features()
    if not {"AVX2", "X86_V3"} & found:
        pytest.skip(f"numpy finds no AVX2 on this machine: {sorted(found)}")
    done = subprocess.run([sys.executable, "-c", AVX2], capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["1", "portable"], done.stderr


def test_portable_is_refused_where_numpy_was_loaded_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENBLAS_CORETYPE", raising=False)
    with pytest.raises(ArithmeticMismatch, match="before Python imports numpy"):
        arithmetic.describe("portable", 1)
    monkeypatch.setenv("OPENBLAS_CORETYPE", "Haswell")
    monkeypatch.setattr(arithmetic, "_numpy_features", lambda: {"AVX2", "AVX512F"})
    with pytest.raises(ArithmeticMismatch, match="kernels in use: AVX512F"):
        arithmetic.describe("portable", 1)
    monkeypatch.setattr(arithmetic, "_numpy_features", lambda: {"AVX2", "X86_V3"})
    assert arithmetic.describe("portable", 1)["kernels"] == "portable"


def test_what_computes_is_described() -> None:
    assert arithmetic.describe("native", 2) | {"threads": 2, "numpy": np.__version__} == arithmetic.describe(
        "native", 2
    )


def threads() -> set[Any]:
    from threadpoolctl import threadpool_info

    return {pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"}


def test_threads_are_limited_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"):
        monkeypatch.delenv(variable, raising=False)
    before = threads()
    with arithmetic.limited(1):
        assert threads() == {1}
    assert threads() == before


def test_the_peak_is_the_processs_own() -> None:
    """Not what the program that started it has had."""
    before = arithmetic.peak_memory()
    some = np.ones(50 << 17)
    assert arithmetic.peak_memory() >= before
    assert some.nbytes == 50 << 20
    code = "from dptrain.arithmetic import peak_memory; print(peak_memory())"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert 1 << 20 < int(child.stdout) < 50 << 20
