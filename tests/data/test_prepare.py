import json
import os
import tracemalloc

import numpy as np
import pytest

from dptrain.data import cache
from dptrain.data.dataset import Part, open_dataset
from dptrain.data.encoding import Affine, Encoding, Target
from dptrain.data.prepare import prepare
from dptrain.data.store import Opened, describe_npy
from dptrain.errors import DataError, StorageError
from dptrain.job import spec
from dptrain.random import Permutation, Purpose

from .conftest import rows_of

X = np.arange(300, dtype=np.float32).reshape(100, 3)
Y = np.arange(100) % 4


def test_parts_cover_all_rows_once(bench):
    bench.npz(x=X, y=Y)
    data = bench.open("data.npz", validation=0.29, test=0.105)
    parts = [data.train, data.validation, data.test]
    assert [part.rows for part in parts] == [61, 29, 10]
    rows = np.concatenate([part.file_rows(np.arange(part.rows)) for part in parts])
    np.testing.assert_array_equal(np.sort(rows), np.arange(100))
    np.testing.assert_array_equal(rows, Permutation(100, 1, Purpose.SPLIT).at(np.arange(100)))
    for part in parts:
        x, y = rows_of(part, np.float32)
        at = part.file_rows(np.arange(part.rows))
        np.testing.assert_array_equal(x, X[at])
        np.testing.assert_array_equal(y, Y[at])


def test_the_split_depends_on_the_seed_and_not_on_shuffle(bench):
    bench.npz(x=X, y=Y)
    rows = {}
    for seed, shuffle in ((1, True), (1, False), (2, True)):
        part = bench.open("data.npz", seed=seed, shuffle=shuffle).train
        rows[seed, shuffle] = part.file_rows(np.arange(part.rows)).tolist()
    assert rows[1, True] == rows[1, False] != rows[2, True]


def test_without_shares_rows_stay_in_their_order(bench):
    bench.npz(x=X, y=Y)
    data = bench.open("data.npz", validation=0.0, test=0.0)
    np.testing.assert_array_equal(data.train.file_rows(np.arange(100)), np.arange(100))
    assert (data.validation.rows, data.test.rows) == (0, 0)


def test_left_out_rows_are_left_out_before_splitting(bench):
    x = X.copy()
    x[[3, 50, 99], 1] = np.nan
    bench.npz(x=x, y=Y)
    data = bench.open("data.npz", nan="skip", validation=0.25, test=0.25, normalise="standard")
    parts = [data.train, data.validation, data.test]
    assert [part.rows for part in parts] == [49, 24, 24]
    rows = [part.file_rows(np.arange(part.rows)) for part in parts]
    np.testing.assert_array_equal(np.sort(np.concatenate(rows)), np.delete(np.arange(100), [3, 50, 99]))
    np.testing.assert_allclose(data.encoding.affine.shift, X[rows[0]].mean(0, dtype=np.float64))


def test_shares_must_leave_training_rows(bench):
    bench.npz(x=X[:3], y=Y[:3])
    with pytest.raises(DataError, match="expected shares that leave training rows, found 0 of 3"):
        bench.plan("data.npz", validation=0.67, test=0.34)


def test_the_digest_is_of_the_content(bench):
    bench.npz(x=X, y=Y)
    digest = bench.plan("data.npz")["digest"]
    assert digest.startswith("sha256:")
    assert len(digest) == 71
    (bench.folder / "other.npz").write_bytes((bench.folder / "data.npz").read_bytes())
    os.utime(bench.folder / "other.npz", (1, 1))
    assert bench.plan("other.npz", seed=5, normalise="standard")["digest"] == digest
    changed = X.copy()
    changed[99, 2] += 1
    bench.npz(x=changed, y=Y)
    assert bench.plan("data.npz")["digest"] != digest


def test_a_second_start_reads_nothing_again(bench, monkeypatch):
    bench.npz(x=X, y=Y)
    first = bench.plan("data.npz")
    with monkeypatch.context() as patched:
        patched.setattr("dptrain.data.source.read", lambda *_: pytest.fail("read again"))
        assert bench.plan("data.npz") == first
        with pytest.raises(pytest.fail.Exception, match="read again"):
            bench.plan("data.npz", normalise="minmax")
    # A damaged cache is made again.
    for file in bench.cache.glob("npz-*/array.npy"):
        os.truncate(file, 10)
    assert bench.plan("data.npz") == first
    part = bench.open("data.npz").train
    np.testing.assert_array_equal(rows_of(part)[0], X[part.file_rows(np.arange(part.rows))])


def test_a_plan_is_plain_and_small(bench):
    bench.npz(x=X, y=Y)
    data = spec.Data(source="data.npz", nan="skip")
    plan = prepare(data, directory=bench.folder, seed=1, cache=bench.cache)
    assert json.loads(json.dumps(plan)) == plan
    assert len(json.dumps(plan)) < 4_000


def test_the_digits_need_no_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DPTRAIN_CACHE", str(tmp_path / "none"))
    data = open_dataset(prepare(spec.Data(), directory=tmp_path, seed=0))
    assert not (tmp_path / "none").exists()
    assert not data.train.mapped
    assert (data.sample_shape, data.target.classes) == ((64,), 10)
    assert (data.train.rows, data.validation.rows, data.test.rows) == (1439, 179, 179)
    parts = [rows_of(part, np.float32) for part in (data.train, data.validation, data.test)]
    x = np.concatenate([x for x, _ in parts])
    y = np.concatenate([y for _, y in parts])
    # UCI's counts of the ten digits in this file, and its range of pixels.
    assert np.bincount(y).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert (x.min(), x.max()) == (0, 1)
    images = open_dataset(prepare(spec.Data(shape=(8, 8, 1)), directory=tmp_path, seed=0))
    np.testing.assert_array_equal(rows_of(images.train, np.float32)[0].reshape(-1, 64), parts[0][0])


def test_an_unknown_name_is_refused(tmp_path):
    with pytest.raises(DataError, match="expected one of the embedded data sets"):
        prepare(spec.Data(source="letters", format="embedded"), directory=tmp_path, seed=0)


def test_synthetic_rows_can_be_learned_and_come_from_the_seed(bench):
    made = spec.Synthetic(rows=20_000, shape=(4, 2), classes=3, noise=0.0)
    keys = {"synthetic": made, "validation": 0.0, "test": 0.0}
    data = bench.open("synthetic", **keys)
    x, y = rows_of(data.train, np.float32)
    assert x.shape == (20_000, 4, 2)
    assert abs(x.mean()) < 5 / np.sqrt(x.size)
    assert abs(x.std() - 1) < 0.02
    assert min(np.bincount(y, minlength=3)) > 1_000
    # Without noise a linear map tells the classes apart: fit one on the first half, try it on the second.
    flat = x.reshape(-1, 8).astype(np.float64)
    w = np.linalg.lstsq(flat[:10_000], np.eye(3)[y[:10_000]], rcond=None)[0]
    assert ((flat[10_000:] @ w).argmax(1) == y[10_000:]).mean() > 0.85
    assert bench.open("synthetic", **keys).digest == data.digest
    assert bench.open("synthetic", seed=2, **keys).digest != data.digest
    numbers = bench.open("synthetic", synthetic=spec.Synthetic(rows=100, classes=0))
    assert (numbers.target.kind, numbers.target.width) == ("numbers", 1)


def test_reading_leaves_other_rows_alone_and_counts(bench):
    bench.npz(x=X, y=Y)
    part = bench.open("data.npz").train
    x, y = np.full((5, 3), 7, np.float32), np.full(5, 7)
    part.read(np.array([4, 4]), x, y)
    assert (x[2:] == 7).all()
    assert (y[2:] == 7).all()
    np.testing.assert_array_equal(x[0], x[1])
    assert part.rows_read == 2
    for outside in (-1, 80):
        with pytest.raises(IndexError, match=r"range\(80\)"):
            part.read(np.array([outside]), x, y)


def sparse(path, shape, dtype, header=256):
    """An npy file of zeros that takes no room on the disk."""
    text = repr({"descr": dtype, "fortran_order": False, "shape": shape}).ljust(header - 11) + "\n"
    with open(path, "wb") as file:
        file.write(b"\x93NUMPY\x01\x00" + (header - 10).to_bytes(2, "little") + text.encode())
        file.truncate(header + int(np.prod(shape)) * np.dtype(dtype).itemsize)
    return Opened(describe_npy(path)[0])


@pytest.mark.parametrize(("dtype", "header"), [("<f4", 256), (">f8", 256), ("<f4", 257)])
def test_reading_copies_only_the_rows_asked_for(tmp_path, dtype, header):
    n = 10**6
    x, y = sparse(tmp_path / "x.npy", (n, 2), dtype, header), sparse(tmp_path / "y.npy", (n,), "|u1")
    encoding = Encoding((2,), (2,), False, Target("classes", 2, 1, ("0", "1")), Affine((3.0,), (2.0,)))
    out = np.zeros((100, 2), np.float32), np.ones(100, np.int64)
    part = Part(x, y, encoding, rows=n // 2, start=7, permutation=Permutation(n, 1, Purpose.SPLIT))
    tracemalloc.start()
    part.read(np.arange(n // 2 - 100, n // 2), *out)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 200_000  # the file has 8 or 16 million bytes
    assert (out[0] == -6).all()
    assert (out[1] == 0).all()


@pytest.mark.skipif(not os.path.exists("/proc/self/smaps"), reason="the system doesn't tell how files are mapped")
@pytest.mark.parametrize(("limit", "scattered"), [(1 << 10, True), (1 << 28, True), (1 << 10, False)])
def test_scattered_rows_of_a_large_file_are_read_without_their_neighbours(tmp_path, monkeypatch, limit, scattered):
    monkeypatch.setattr("dptrain.data.store.LARGE", limit)
    store = sparse(tmp_path / "x.npy", (1000, 2), "<f4").store
    opened = Opened(store, scattered=scattered)
    assert opened.array[999, 1] == 0
    with open("/proc/self/smaps") as maps:
        own = maps.read().split(store.path)[1]
    flags = own[own.index("VmFlags:") :].splitlines()[0].split()
    assert ("rr" in flags) == (scattered and limit < 8_000)  # rr: random reads were announced


def test_a_billion_rows_need_no_index(tmp_path):
    n = 10**9
    x, y = sparse(tmp_path / "x.npy", (2, 1), "<f4"), sparse(tmp_path / "y.npy", (2,), "|u1")
    encoding = Encoding((1,), (1,), False, Target("classes", 2, 1, ("0", "1")))
    tracemalloc.start()
    part = Part(x, y, encoding, rows=n // 2, start=n // 4, permutation=Permutation(n, 1, Purpose.SPLIT))
    rows = part.file_rows(np.arange(n // 2 - 1000, n // 2))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1_000_000
    truth = Permutation(n, 1, Purpose.SPLIT).at(np.arange(3 * n // 4 - 1000, 3 * n // 4))
    np.testing.assert_array_equal(rows, truth)


def test_where_the_cache_lies(tmp_path, monkeypatch):
    monkeypatch.setenv("DPTRAIN_CACHE", str(tmp_path / "a"))
    assert cache.locate() == tmp_path / "a"
    assert cache.locate(tmp_path / "b") == tmp_path / "b"
    monkeypatch.delenv("DPTRAIN_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "c"))
    assert cache.locate() == tmp_path / "c" / "dptrain"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "d"))
    assert cache.locate() == tmp_path / "d" / ".cache" / "dptrain"


def test_a_home_that_cannot_be_written_is_passed_over(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.delenv("DPTRAIN_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert cache.locate() == tmp_path / f"dptrain-{os.getuid()}"
    with pytest.raises(StorageError, match="set DPTRAIN_CACHE"):
        cache.locate(tmp_path / "file" / "cache")


def test_a_full_disk_is_named(bench, monkeypatch):
    bench.npz(x=X, y=Y)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dptrain.data.arrays._copy", full)
    with pytest.raises(StorageError, match="found no space left on device; set DPTRAIN_CACHE"):
        bench.plan("data.npz")
    assert not list(bench.cache.glob("building-*"))


def test_of_two_that_build_an_entry_one_wins(tmp_path):
    def build(into):
        (into / "v").write_text("outer")
        cache.entry(tmp_path, "same", lambda other: (other / "v").write_text("inner") and None)

    made = cache.entry(tmp_path, "same", build)
    assert (made / "v").read_text() == "inner"
    assert [path.name for path in tmp_path.iterdir()] == ["same"]
