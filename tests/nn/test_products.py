"""Products by numpy: of the same bits whatever lies on the stack.

By MKL: right, of the same bits wherever the operands lie, and a part of the job's arithmetic. Only where MKL is
installed and the CPU has a branch whose bits are promised, as in CI's environment for it.
"""

import ctypes
import dataclasses
import itertools
import os
import re
import subprocess
import sys
import tomllib

import numpy as np
import pytest

from dptrain import arithmetic, mkl
from dptrain.errors import ArithmeticMismatch, JobError
from dptrain.job import spec
from dptrain.nn import products
from dptrain.nn.layer import Workspace
from dptrain.nn.products import LEAST, NARROWEST, MklMatmul, maker, numpy_matmul
from dptrain.random import Purpose, stream
from dptrain.training import run
from tests.exchange.jobs import job
from tests.mpirun import dptrain

from .passes import bind, make_run, make_tensors, run_layer

MKL = spec.Arithmetic(products="mkl")

try:
    FOUND, WHY = mkl.load("native", 1), ""
except ArithmeticMismatch as mismatch:
    FOUND, WHY = None, str(mismatch)

with_mkl = pytest.mark.skipif(FOUND is None, reason=WHY)

# Rows, terms, columns of a shard: of a perceptron, of a convolution, odd ones; the last are numpy's.
SHAPES = [(32, 784, 512), (128, 100, 256), (6272, 9, 32), (61, 129, 257), (8, 512, 256), (7, 900, 300), (31, 64, 32)]
WAYS = list(itertools.product("NT", "NT"))
DTYPES = [np.float32, np.float64]

LIBC = ctypes.CDLL(None)


def operand(rng, shape, way, dtype, pad=0):
    """Numbers of a shape in memory that is row-major or transposed, with ``pad`` unused numbers after each line."""
    *lead, rows, columns = shape
    lines = (rows, columns) if way == "N" else (columns, rows)
    whole = rng.standard_normal((*lead, lines[0], lines[1] + pad)).astype(dtype)[..., : lines[1]]
    return whole if way == "N" else whole.swapaxes(-1, -2)


class OnStack(ctypes.Structure):
    """What is handed to a function by value lies on the stack, and still does when that has returned."""

    _fields_ = (("words", ctypes.c_uint32 * (1 << 12)),)


def leave_on_stack(word):
    left = OnStack()
    np.frombuffer(left, np.uint32)[:] = word
    LIBC.getpid(left)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("word", [0x7FA00000, 0x7F800000, 0x7F7FFFFF], ids=["NaN", "infinite", "huge"])
def test_what_lies_on_the_stack_moves_no_bit(dtype, word):
    """OpenBLAS reads there beyond short vectors: it may raise a flag, which nobody asks for, and nothing else."""
    rng = np.random.default_rng(9)
    for rows, terms, columns in itertools.product((1, 2, 3, 7), range(1, 18), (1, 2, 10)):
        for ways in WAYS:
            a = operand(rng, (2, rows, terms), ways[0], dtype)
            b = operand(rng, (terms, columns), ways[1], dtype)
            clean, dirty = np.empty((2, 2, rows, columns), dtype)
            leave_on_stack(0)
            numpy_matmul(a, b, out=clean)
            leave_on_stack(word)
            numpy_matmul(a, b, out=dirty)
            assert clean.tobytes() == dirty.tobytes(), (rows, terms, columns, ways)


class Counted:
    """Products as ``maker`` gives them, and how many MKL made."""

    def __init__(self):
        self.calls = 0
        sgemm, dgemm = (self._counted(function) for function in (FOUND.sgemm, FOUND.dgemm))
        self.matmul = MklMatmul(dataclasses.replace(mkl.load("native", 1), sgemm=sgemm, dgemm=dgemm))

    def _counted(self, function):
        def call(*arguments):
            self.calls += 1
            function(*arguments)

        return call


@with_mkl
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ways", WAYS, ids="".join)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_the_product(shape, ways, dtype):
    m, terms, n = shape
    rng = stream(1, Purpose.PROBE)
    for k, shared, pad in ((1, True, 0), (3, True, 0), (3, False, 5)):
        a = operand(rng, (k, m, terms), ways[0], dtype, pad)
        b = operand(rng, (terms, n) if shared else (k, terms, n), ways[1], dtype, pad)
        out = np.full((k, m, n), np.nan, dtype)
        counted = Counted()
        counted.matmul(a, b, out=out)
        exact = a.astype(np.longdouble if dtype is np.float64 else np.float64) @ b
        # Gauss's summation of `terms` rounded products errs by less than this.
        bound = terms * np.finfo(dtype).eps * (np.abs(a) @ np.abs(b))
        assert np.all(np.abs(out - exact) <= bound)
        assert np.all(np.abs(out - np.matmul(a, b)) <= 2 * bound)
        large = m * terms * n >= LEAST and min(shape) >= NARROWEST
        assert counted.calls == (k if large else 0)


@with_mkl
def test_what_blas_cant_take_is_left_to_numpy():
    rng = stream(2, Purpose.PROBE)
    counted = Counted()
    a, b = rng.standard_normal((2, 2, 128, 128))
    out = np.empty_like(a)
    reversed_lines = a[:, ::-1]
    every_second = rng.standard_normal((2, 128, 256))[:, :, ::2]
    once = np.broadcast_to(a[:, :1], a.shape)
    turned_out = np.empty_like(a).swapaxes(1, 2)
    for some, other, to in (
        (reversed_lines, b, out),
        (every_second, b, out),
        (once, b, out),
        (a, b, turned_out),
        (a.astype(np.float32), b, out),
        (a[:1], b, out),
    ):
        counted.matmul(some, other, out=to)
        assert np.array_equal(to, np.matmul(some, other))
        assert counted.calls == 0
    counted.matmul(a, b, out=out)
    assert counted.calls == 2


def placed(array, offset):
    """A copy that begins ``offset`` numbers behind a border of 64 bytes."""
    memory = np.empty(array.size + 128 // array.itemsize, array.dtype)
    first = -memory.ctypes.data % 64 // array.itemsize + offset
    copy = memory[first : first + array.size].reshape(array.shape)
    assert copy.ctypes.data % 64 == offset * array.itemsize
    copy[...] = array
    return copy


@with_mkl
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_bits_are_the_same_wherever_the_operands_lie(shape, dtype):
    m, terms, n = shape
    rng = stream(3, Purpose.PROBE)
    matmul = maker(MKL)
    for ways in WAYS:
        a, b = operand(rng, (m, terms), "N", dtype), operand(rng, (terms, n), "N", dtype)
        found = set()
        for offsets in ((0, 0, 0), (1, 0, 0), (0, 3, 0), (0, 0, 5), (7, 2, 1), (4, 4, 4)):
            some, other = (
                placed(x if way == "N" else x.T.copy(), offset)
                for x, way, offset in zip((a, b), ways, offsets, strict=False)
            )
            out = placed(np.full((m, n), np.nan, dtype), offsets[2])
            matmul(some if ways[0] == "N" else some.T, other if ways[1] == "N" else other.T, out=out)
            found.add(out.tobytes())
        assert len(found) == 1


@with_mkl
def test_other_bits_would_be_seen():
    """The same numbers summed in another order differ: as for numpy, or when the terms come the other way round."""
    rng = stream(4, Purpose.PROBE)
    a, b = operand(rng, (32, 784), "N", np.float32), operand(rng, (784, 512), "N", np.float32)
    matmul, out = maker(MKL), np.empty((32, 512), np.float32)
    matmul(a, b, out=out)
    other = np.empty_like(out)
    matmul(a[:, ::-1].copy(), b[::-1].copy(), out=other)
    assert np.allclose(out, other, atol=1e-3)
    assert out.tobytes() != other.tobytes()
    assert out.tobytes() != np.matmul(a, b).tobytes()


LAYERS = [
    (spec.Linear(units=128), (256,)),
    (spec.Linear(units=64), (8, 96)),
    (spec.Conv2d(channels=32, kernel=3), (16, 16, 8)),
    (spec.Conv2d(channels=32, kernel=3, stride=2), (16, 16, 16)),
    (spec.Conv2d(channels=16, kernel=5, padding="same"), (20, 20, 1)),
    (spec.LayerNorm(), (64, 64)),
    (spec.BatchNorm(), (16, 16, 32)),
]


@with_mkl
@pytest.mark.parametrize("k", [2, 3, 5])
@pytest.mark.parametrize(("settings", "shape"), LAYERS, ids=lambda some: str(getattr(some, "type", some)))
def test_shards_together_give_the_bytes_of_one_by_one(settings, shape, k):
    rng = stream(5, Purpose.PROBE)
    layer = bind(settings, shape, np.float32)
    tensors = make_tensors(layer, rng, np.float32)
    b = 48
    x = rng.standard_normal((k, b, *shape)).astype(np.float32)
    dy = rng.standard_normal((k, b, *layer.output_shape)).astype(np.float32)
    by_numpy = run_layer(layer, tensors, x, dy, make_run(k, b, dtype=np.float32))
    counted = Counted()
    layer.matmul = counted.matmul
    workspace = Workspace()
    together = run_layer(layer, tensors, x, dy, make_run(k, b, dtype=np.float32, workspace=workspace))
    for j in range(k):
        alone = run_layer(
            layer,
            tensors,
            x[j : j + 1].copy(),
            dy[j : j + 1].copy(),
            make_run(1, b, shards=[j], dtype=np.float32, workspace=workspace),
        )
        assert alone.y.tobytes() == together.y[j : j + 1].tobytes()
        assert alone.dx.tobytes() == together.dx[j : j + 1].tobytes()
        for name, grad in alone.grads.items():
            assert grad.tobytes() == together.grads[name][j : j + 1].tobytes()
    assert np.allclose(together.y, by_numpy.y, atol=1e-3, rtol=1e-3)
    if isinstance(settings, (spec.Linear, spec.Conv2d)):
        # All three: outputs, weights' and input's gradients.
        assert counted.calls >= 2 * 3 * k


# Shards of 40 rows: its two larger layers are MKL's. A worker of five has one or two of the eight. Sums of few terms
# can be the same by both libraries, those of the second layer's 1,024 aren't.
WHOLE = """
seed = 5
[data]
source = "digits"
[[model.layers]]
type = "linear"
units = 1024
[[model.layers]]
type = "relu"
[[model.layers]]
type = "linear"
units = 512
[[model.layers]]
type = "relu"
[[model.layers]]
type = "linear"
units = 10
[train]
batch_size = 320
shards = 8
steps = 12
"""


WIDE = tomllib.loads(WHOLE)["model"]["layers"]


def weights(folder, *overrides, n=0, **environ):
    path = folder / "job.toml"
    path.write_text(WHOLE)
    sets = [word for override in overrides for word in ("--set", override)]
    done = dptrain("run", str(path), "--set", "output.runs=runs", *sets, n=n, folder=folder, **environ)
    assert done.returncode == 0, done.stderr
    return re.search(r"sha256:[0-9a-f]+", done.stdout.partition("weights")[2])[0]


@with_mkl
@pytest.mark.parametrize("kernels", ["native", "portable"])
def test_a_whole_job_has_the_same_weights_for_any_number_of_workers(kernels, tmp_path):
    ours = "arithmetic.products=mkl", f"arithmetic.kernels={kernels}"
    alone = weights(tmp_path, *ours)
    assert {weights(tmp_path, *ours, n=n) for n in (2, 3, 5)} == {alone}
    assert weights(tmp_path, *ours[1:]) != alone
    if kernels == "portable":
        # As on a CPU that has no more.
        assert weights(tmp_path, *ours, MKL_ENABLE_INSTRUCTIONS="AVX2") == alone


@with_mkl
def test_threads_and_settings_of_the_environment_change_no_bits(tmp_path):
    """Intel promises it of the strict form; other branches are other kernels, and do."""
    alone = weights(tmp_path, "arithmetic.products=mkl")
    for environ in (
        {"MKL_CBWR": "COMPATIBLE", "MKL_INTERFACE_LAYER": "ILP64", "MKL_THREADING_LAYER": "GNU", "MKL_DYNAMIC": "1"},
        {"MKL_NUM_THREADS": "2"},
    ):
        assert weights(tmp_path, "arithmetic.products=mkl", **environ) == alone
    rng = stream(6, Purpose.PROBE)
    a, b = rng.standard_normal((2, 512, 512)).astype(np.float32)
    np.savez(tmp_path / "ab.npz", a=a, b=b)
    one, two, wide = (product(tmp_path, "native", threads) for threads in (1, 2, 4))
    assert one == two == wide
    if FOUND.branch != "AVX2":
        assert product(tmp_path, "portable", 1) != one
        assert product(tmp_path, "native", 1, MKL_ENABLE_INSTRUCTIONS="AVX2") == product(tmp_path, "portable", 1)


PRODUCT = """
import hashlib, sys
import numpy as np
from dptrain.job import spec
from dptrain.nn.products import maker
loaded = np.load(sys.argv[1])
a, b, out = loaded["a"], loaded["b"], np.empty((512, 512), np.float32)
maker(spec.Arithmetic(products="mkl", kernels=sys.argv[2], threads=int(sys.argv[3])))(a, b, out=out)
print(hashlib.sha256(out).hexdigest())
"""


def product(folder, kernels, threads, **environ):
    line = [sys.executable, "-c", PRODUCT, str(folder / "ab.npz"), kernels, str(threads)]
    done = subprocess.run(line, capture_output=True, text=True, check=True, timeout=60, env={**os.environ, **environ})
    return done.stdout


@with_mkl
def test_one_job_after_the_other_in_one_process(tmp_path):
    by_numpy, by_mkl, again, after = (
        run(job("mlp", 4, arithmetic={"products": some}, model={"layers": WIDE}), run_dir=tmp_path / str(i))
        for i, some in enumerate(("numpy", "mkl", "mkl", "numpy"))
    )
    assert by_mkl.weights_sha256 == again.weights_sha256 != by_numpy.weights_sha256 == after.weights_sha256
    assert by_mkl.job_sha256 != by_numpy.job_sha256


@with_mkl
def test_a_mode_that_the_process_cant_have_any_more_is_refused():
    matmul = maker(MKL)
    a = np.ones((128, 128), np.float32)
    matmul(a, a, out=np.empty_like(a))
    if FOUND.branch != "AVX2":
        with pytest.raises(
            ArithmeticMismatch, match="MKL with its AVX2 branch, found that it has made products already"
        ):
            mkl.load("portable", 1)
    with pytest.raises(ArithmeticMismatch, match=r"arithmetic\.threads = 2, found layer 1 in use already"):
        mkl.load("native", 2)
    assert mkl.load("native", 1).name == FOUND.name


@with_mkl
def test_what_made_the_products_is_named():
    described = arithmetic.describe("native", 1, "mkl")
    assert described["products"] == f"MKL {FOUND.version}, {FOUND.branch}, strict"
    assert arithmetic.named(described).endswith(f", products by MKL {FOUND.version}, {FOUND.branch}, strict")
    assert "MKL" not in arithmetic.named(arithmetic.describe("native", 1))


@with_mkl
def test_a_cpu_without_a_branch_of_promised_bits_is_refused():
    environ = {**os.environ, "MKL_ENABLE_INSTRUCTIONS": "SSE4_2"}
    code = "from dptrain import mkl; mkl.load('native', 1)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environ, timeout=60)
    assert done.returncode == 1
    assert "expected a CPU on which MKL promises the bits of its AVX2 branch" in done.stderr


@pytest.mark.parametrize("n", [0, 2])
def test_a_missing_library_is_told_before_training_with_the_cure(n, tmp_path):
    """Simulated by hiding it where it is installed."""
    (tmp_path / "sitecustomize.py").write_text(
        "from importlib import metadata\n"
        "find = metadata.distribution\n"
        "def distribution(name):\n"
        "    if name == 'mkl':\n"
        "        raise metadata.PackageNotFoundError(name)\n"
        "    return find(name)\n"
        "metadata.distribution = distribution\n"
    )
    (tmp_path / "job.toml").write_text(WHOLE)
    done = dptrain(
        *("run", "job.toml", "--set", "arithmetic.products=mkl"), n=n, folder=tmp_path, PYTHONPATH=str(tmp_path)
    )
    assert done.returncode == 2
    assert "pip install 'dptrain[mkl]'" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.glob("runs/*/journal.jsonl"))


class Own:
    def parameters(self, rng):
        return {"w": rng.standard_normal((64, 10))}

    def forward(self, params, x, rng):
        return x.reshape(len(x), -1) @ params["w"], lambda dy: {"w": x.reshape(len(x), -1).T @ dy}


def test_a_model_of_ones_own_keeps_numpy(tmp_path):
    plain = job("mlp", 4)
    its = dataclasses.replace(
        plain, model=spec.Model(), arithmetic=dataclasses.replace(plain.arithmetic, products="mkl")
    )
    with pytest.raises(JobError, match="leave the key out"):
        run(its, model=Own(), run_dir=tmp_path)


def test_without_being_asked_for_nothing_of_it_is_used():
    assert maker(spec.Arithmetic()) is numpy_matmul is products.np.matmul
