import gzip

import numpy as np
import pytest

from dptrain.errors import DataError

from .conftest import FASHION, idx_bytes, needs_fashion, rows_of, write_idx

RNG = np.random.default_rng(5)
IMAGES = RNG.integers(0, 256, (30, 4, 3)).astype(np.uint8)
LABELS = RNG.integers(0, 4, 30).astype(np.uint8)
WHOLE = {"validation": 0.0, "test": 0.0}


def mnist(folder, packed=False):
    write_idx(folder, "train-images-idx3-ubyte", IMAGES[:20], packed)
    write_idx(folder, "train-labels-idx1-ubyte", LABELS[:20], packed)
    write_idx(folder, "t10k-images-idx3-ubyte", IMAGES[20:], packed)
    write_idx(folder, "t10k-labels-idx1-ubyte", LABELS[20:], packed)
    return folder


@pytest.mark.parametrize("packed", [False, True])
def test_a_folder_as_mnist_has_it(bench, packed):
    data = bench.open(mnist(bench.folder / "mnist", packed), validation=0.0, classes=4)
    assert (data.sample_shape, data.train.rows, data.validation.rows, data.test.rows) == ((4, 3, 1), 20, 0, 10)
    x, y = rows_of(data.train)
    np.testing.assert_allclose(x, IMAGES[:20, ..., None] / 255, rtol=1e-15)
    np.testing.assert_array_equal(y, LABELS[:20])
    x, y = rows_of(data.test)
    np.testing.assert_allclose(x, IMAGES[20:, ..., None] / 255, rtol=1e-15)
    np.testing.assert_array_equal(y, LABELS[20:])


def test_pixels_can_be_left_as_they_are(bench):
    data = bench.open(mnist(bench.folder / "mnist"), normalise="none", shape=(12,), **WHOLE)
    assert data.integer
    np.testing.assert_array_equal(rows_of(data.train, np.int64)[0], IMAGES[:20].reshape(20, 12))


def test_a_test_part_of_zero_is_empty_and_a_path_is_followed(bench):
    folder = mnist(bench.folder / "mnist")
    assert bench.open(folder, test=0.0).test.rows == 0
    other = folder / "t10k-images-idx3-ubyte"
    data = bench.open(folder, validation=str(other), test=0.0, classes=4)
    np.testing.assert_array_equal(rows_of(data.validation)[1], LABELS[20:])


@pytest.mark.parametrize("dtype", [">i2", ">i4", ">f4", ">f8"])
def test_big_endian_types_are_converted(bench, dtype):
    folder = bench.folder / "idx"
    values = (RNG.standard_normal((20, 6)) * 100).astype(dtype)
    write_idx(folder, "train-images-idx3-ubyte", values)
    write_idx(folder, "train-labels-idx1-ubyte", LABELS[:20])
    x, _ = rows_of(bench.open(folder, **WHOLE).train)
    np.testing.assert_array_equal(x, values.astype(np.float64))


def broken(bench, content, packed, match):
    folder = mnist(bench.folder / "mnist", packed)
    path = folder / ("train-images-idx3-ubyte" + (".gz" if packed else ""))
    path.write_bytes(gzip.compress(content) if packed else content)
    with pytest.raises(DataError, match=match):
        bench.plan(folder)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "expected an IDX file, found first bytes b''"),
        (b"\x93NUM" + bytes(100), "expected an IDX file"),
        (b"\0\0\x08\x03\0\0\0\x14\0\0", "expected a whole IDX header, found 10 bytes"),
        (idx_bytes(IMAGES[:20])[:-1], r"expected 256 bytes for shape \(20, 4, 3\), found 255 bytes"),
        (idx_bytes(IMAGES[:20]) + b"x", r"expected 256 bytes for shape \(20, 4, 3\), found (257 bytes|more)"),
        (b"\0\0\x08\x03" + b"\x00\xff\xff\xff" * 3 + bytes(9), "for shape|expected at most"),
        (b"\0\0\x08\x03" + bytes(12), "expected at least one row"),
        (idx_bytes(IMAGES[:19]), "expected a label for each of the 19 rows, found 20"),
    ],
)
def test_broken_files_are_refused(bench, content, packed, match):
    broken(bench, content, packed, match)


@pytest.mark.parametrize("cut", [5, -5])
def test_a_damaged_gzip_file_is_refused(bench, cut):
    folder = mnist(bench.folder / "mnist", packed=True)
    path = folder / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(DataError, match="expected a whole gzip file"):
        bench.plan(folder)


def test_a_gzip_bomb_unpacks_no_further_than_declared(bench):
    # 64 MB of zeros behind a header that declares 240 bytes.
    broken(bench, idx_bytes(IMAGES[:20]) + bytes(1 << 26), True, "found more")


def test_missing_labels_are_named(bench):
    folder = mnist(bench.folder / "mnist")
    (folder / "train-labels-idx1-ubyte").unlink()
    with pytest.raises(DataError, match="expected labels in train-labels-idx1-ubyte beside"):
        bench.plan(folder)


@needs_fashion
def test_fashion_mnist(bench):
    data = bench.open(FASHION)
    assert (data.sample_shape, data.target.classes) == ((28, 28, 1), 10)
    assert (data.train.rows, data.validation.rows, data.test.rows) == (54_000, 6_000, 10_000)
    with gzip.open(FASHION / "t10k-images-idx3-ubyte.gz") as file:
        truth = np.frombuffer(file.read(), np.uint8, offset=16).reshape(10_000, 28, 28, 1)
    x, y = np.empty((3, 28, 28, 1), np.float32), np.empty(3, np.int64)
    data.test.read(np.array([9_999, 0, 17]), x, y)
    np.testing.assert_allclose(x, truth[[9_999, 0, 17]] / 255, rtol=1e-6)
    # The training labels are 6,000 of each class; so are the two parts together.
    both = np.concatenate([rows_of(part)[1] for part in (data.train, data.validation)])
    assert np.bincount(both).tolist() == [6_000] * 10
