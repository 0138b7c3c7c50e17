import os
import struct
import zipfile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dptrain.data.store import npy_header
from dptrain.errors import DataError

from .conftest import rows_of

RNG = np.random.default_rng(3)
X = RNG.standard_normal((40, 5)).astype(np.float32)
Y = RNG.integers(0, 3, 40)
WHOLE = {"validation": 0.0, "test": 0.0}


def folder(bench, x, y, name="arrays"):
    path = bench.folder / name
    path.mkdir(exist_ok=True)
    np.save(path / "x.npy", x)
    np.save(path / "y.npy", y)
    return path


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_an_npz_file_is_read_as_it_was_saved(bench, save):
    save(bench.folder / "a.npz", x=X, y=Y)
    data = bench.open("a.npz", **WHOLE)
    x, y = rows_of(data.train, np.float32)
    np.testing.assert_array_equal(x, X)
    np.testing.assert_array_equal(y, Y)
    assert (data.sample_shape, data.target.kind, data.target.classes) == ((5,), "classes", 3)
    assert data.train.mapped


@pytest.mark.parametrize(
    "x",
    [
        X.astype(np.float64),
        X.astype(">f4"),
        X.astype(">f8"),
        X.astype(np.float16),
        (X * 100).astype(np.int32),
        (X * 100).astype(">i2"),
        X > 0,
        np.asfortranarray(X),
        np.asfortranarray(X.astype(">f8")),
    ],
    ids=lambda x: f"{x.dtype.str}-{'F' if x.flags.fnc else 'C'}",
)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_any_number_and_order_is_converted(bench, x, dtype):
    data = bench.open(folder(bench, x, Y), **WHOLE)
    read, _ = rows_of(data.train, dtype)
    np.testing.assert_array_equal(read, x.astype(dtype))
    bench.npz(x=x, y=Y.astype(">i4"))
    read, y = rows_of(bench.open("data.npz", **WHOLE).train, dtype)
    np.testing.assert_array_equal(read, x.astype(dtype))
    np.testing.assert_array_equal(y, Y)


def test_npy_files_are_mapped_where_they_lie(bench):
    path = folder(bench, X, Y)
    plan = bench.plan(path, **WHOLE)
    assert plan["parts"]["train"]["x"]["path"] == str(path / "x.npy")


def test_arrays_are_found_by_name_or_named(bench):
    bench.npz(X_train=X, y_train=Y, x_test=X[:7] + 1, y_test=Y[:7], other=X * 2, kind=Y * 0)
    data = bench.open("data.npz", validation=0.25)
    assert (data.train.rows, data.validation.rows, data.test.rows) == (30, 10, 7)
    np.testing.assert_array_equal(rows_of(data.test, np.float32)[0], X[:7] + 1)
    named = bench.open("data.npz", features=("other",), label="kind", **WHOLE)
    np.testing.assert_array_equal(rows_of(named.train, np.float32)[0], X * 2)
    assert named.target.classes == 1
    with pytest.raises(DataError, match="expected an array called 'missing', found arrays X_train"):
        bench.plan("data.npz", label="missing")


def test_another_file_may_be_a_part(bench):
    bench.npz(x=X, y=Y)
    bench.npz("more.npz", x=X[:9] * 3, y=Y[:9])
    data = bench.open("data.npz", validation=0.0, test="more.npz")
    assert (data.train.rows, data.validation.rows, data.test.rows) == (40, 0, 9)
    np.testing.assert_array_equal(rows_of(data.test, np.float32)[0], X[:9] * 3)


def test_float_labels_are_numbers_one_or_several_a_row(bench):
    bench.npz(x=X, y=X[:, :2].astype(np.float64))
    data = bench.open("data.npz", **WHOLE)
    assert (data.target.kind, data.target.width, data.target.classes) == ("numbers", 2, 0)
    np.testing.assert_array_equal(rows_of(data.train, np.float64)[1], X[:, :2])
    bench.npz("one.npz", x=X, y=X[:, 0])
    assert rows_of(bench.open("one.npz", **WHOLE).train)[1].shape == (40, 1)
    bench.npz("int.npz", x=X, y=Y)
    numbers = bench.open("int.npz", task="numbers", **WHOLE)
    np.testing.assert_array_equal(rows_of(numbers.train)[1][:, 0], Y)


@pytest.mark.parametrize("kind", ["U", "S"])
def test_text_labels_are_classes_with_names(bench, kind):
    names = np.array(["cat", "ant", "bee"], dtype=kind)
    bench.npz(x=X, y=names[Y])
    data = bench.open("data.npz", **WHOLE)
    assert data.target.names == ("ant", "bee", "cat")
    np.testing.assert_array_equal(rows_of(data.train)[1], np.array([2, 0, 1])[Y])


def test_whole_float_labels_can_be_classes(bench):
    bench.npz(x=X, y=Y * 10.0)
    data = bench.open("data.npz", task="classes", **WHOLE)
    assert data.target.names == ("0", "10", "20")
    np.testing.assert_array_equal(rows_of(data.train)[1], Y)
    bench.npz("half.npz", x=X, y=Y / 2)
    with pytest.raises(DataError, match=r"row \d+: expected a whole number as the class, found 0\.5"):
        bench.plan("half.npz", task="classes")


def refused(bench, source, match, **keys):
    with pytest.raises(DataError, match=match) as caught:
        bench.plan(source, **keys)
    message = str(caught.value)
    assert message.startswith("job.toml: ")
    assert "\n" not in message
    return message


@pytest.mark.parametrize(("value", "name"), [(np.nan, "NaN"), (np.inf, "infinity"), (-np.inf, "-infinity")])
def test_numbers_that_are_none_are_refused_or_left_out(bench, value, name):
    x = X.copy()
    x[13, 2] = value
    bench.npz(x=x, y=Y)
    refused(bench, "data.npz", rf"row 13 column 2: expected a finite number, found {name};")
    data = bench.open("data.npz", nan="skip", **WHOLE)
    read, y = rows_of(data.train, np.float32)
    np.testing.assert_array_equal(read, np.delete(X, 13, axis=0))
    np.testing.assert_array_equal(y, np.delete(Y, 13))


def test_labels_that_are_no_numbers_are_refused(bench):
    y = X[:, 0].copy()
    y[39] = np.nan
    bench.npz(x=X, y=y)
    refused(bench, "data.npz", "row 39 label column 0: expected a finite number, found NaN")
    assert bench.open("data.npz", nan="skip", **WHOLE).train.rows == 39


def test_nothing_but_nan_is_refused(bench):
    bench.npz(x=X * np.nan, y=Y)
    refused(bench, "data.npz", "expected a row without NaN", nan="skip")


@pytest.mark.parametrize(
    ("label", "keys", "match"),
    [
        (-1, {}, r"row 17: expected a class from 0 to 999, found -1"),
        (3, {"classes": 3}, r"row 17: expected a class from 0 to 2, found 3"),
        (5000, {}, r"row 17: expected a class from 0 to 999, found 5000.*max_categories"),
    ],
)
def test_labels_out_of_range_are_refused(bench, label, keys, match):
    y = Y.copy()
    y[17] = label
    bench.npz(x=X, y=y)
    refused(bench, "data.npz", match, **keys)


def test_the_test_part_can_have_no_class_of_its_own(bench):
    bench.npz(x=X, y=Y, x_test=X, y_test=Y + 1)
    refused(bench, "data.npz", "expected a class from 0 to 2, found 3")


@pytest.mark.parametrize(
    ("arrays", "match"),
    [
        ({"x": X, "y": Y[:-1]}, "expected a label for each of the 40 rows, found 39"),
        ({"x": X, "y": np.zeros((40, 3), int)}, r"expected labels of shape \(n,\), found \(40, 3\)"),
        ({"x": X[:0], "y": Y[:0]}, "expected at least one row"),
        ({"x": X[:, :0], "y": Y}, "expected at least one row"),
        ({"x": X.astype(complex), "y": Y}, "found dtype complex128"),
        ({"x": X.astype("M8[s]"), "y": Y}, "dtype datetime64"),
        ({"z": X}, "expected an array called 'x', found arrays z"),
    ],
)
def test_arrays_that_cannot_be_used_are_refused(bench, arrays, match):
    bench.npz(**arrays)
    refused(bench, "data.npz", match)


def test_shapes(bench):
    bench.npz(x=X, y=Y)
    refused(bench, "data.npz", r"data.shape = \[2, 2\]: expected 4 values a row, found 5", shape=(2, 2))
    assert bench.open("data.npz", shape=(1, 5), **WHOLE).sample_shape == (1, 5)


def test_object_arrays_are_refused_and_never_unpickled(bench):
    trap = bench.folder / "trap"

    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(trap),)

    bench.npz(x=np.array([Trap(), 1], dtype=object), y=Y[:2])
    refused(bench, "data.npz", "found an object array, which would need pickle")
    path = folder(bench, np.array([Trap(), 1], dtype=object), Y[:2])
    refused(bench, path, "found an object array")
    assert not trap.exists()
    np.load(path / "x.npy", allow_pickle=True)  # the control: the trap works
    assert trap.is_dir()


def forged(shape="(40, 5)", descr="'<f4'", version=(1, 0), length=None, order="False"):
    text = f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}}}".ljust(117) + "\n"
    size = struct.pack("<H" if version == (1, 0) else "<I", len(text) if length is None else length)
    return b"\x93NUMPY" + bytes(version) + size + text.encode()


@pytest.mark.parametrize(
    ("header", "match"),
    [
        (forged(shape="(10000000000, 5)"), "expected 2000000001.. bytes for shape"),
        (forged(shape="(4611686018427387904, 16)"), "expected 29514790517935282.* bytes"),
        (forged(shape="(-40, -5)"), r"found shape \(-40, -5\)"),
        (forged(shape="(40.0, 5)"), "a broken npy header"),
        (forged(shape="__import__('os').getcwd()"), "a broken npy header"),
        (forged(descr="'|O'"), "an object array"),
        (forged(descr="[('a', '<f4')]"), "found dtype"),
        (forged(version=(2, 0), length=2**31), "a header of 2147483648 bytes"),
        (forged(length=60_000), "a header of 60000 bytes"),
        (forged(version=(9, 9)), r"npy version \(9, 9\)"),
        (b"PK\x03\x04", "no npy header"),
        (b"", "no npy header"),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_forged_headers_are_refused_before_reading(bench, header, match, packed):
    content = header + X.tobytes()
    if packed:
        with zipfile.ZipFile(bench.folder / "data.npz", "w") as archive:
            archive.writestr("x.npy", content if header else b"")
            archive.writestr("y.npy", forged(shape="(40,)", descr="'<i8'") + Y.tobytes())
        refused(bench, "data.npz", match)
    else:
        path = folder(bench, X, Y)
        (path / "x.npy").write_bytes(content if header else b"")
        refused(bench, path, match)


@given(st.binary(max_size=300))
def test_no_bytes_make_the_header_parser_fail_otherwise(content):
    import io

    for start in (content, b"\x93NUMPY\x01\x00" + content, forged()[:60] + content):
        try:
            header = npy_header(io.BytesIO(start), "bytes")
        except DataError:
            continue
        assert header.nbytes >= 0


def test_a_cut_off_file_is_refused(bench):
    path = folder(bench, X, Y)
    os.truncate(path / "x.npy", 500)
    refused(bench, path, "expected 928 bytes for shape .*, found 500 bytes; the file is cut off")


def test_zip_bombs_are_refused_before_unpacking(bench):
    zeros = forged(shape="(20000000,)", descr="'|u1'") + bytes(20_000_000)
    with zipfile.ZipFile(bench.folder / "data.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.npy", zeros)
        archive.writestr("y.npy", zeros)
    refused(bench, "data.npz", "expected at most 1000000 bytes, found 20000128", max_bytes=1_000_000)
    with zipfile.ZipFile(bench.folder / "more.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.npy", forged() + bytes(20_000_000))
        archive.writestr("y.npy", zeros)
    refused(bench, "more.npz", r"expected 928 bytes for shape .*, found 20000128 bytes, packed into \d+;")
    assert not list(bench.cache.glob("npz-*"))


def test_a_zip_that_lies_about_its_members_is_refused(bench):
    np.savez_compressed(bench.folder / "data.npz", x=X, y=Y)
    content = bytearray((bench.folder / "data.npz").read_bytes())
    entry = content.index(b"PK\x01\x02")
    content[entry + 24 : entry + 28] = struct.pack("<I", 300)  # the size that the directory says
    (bench.folder / "data.npz").write_bytes(content)
    refused(bench, "data.npz", "expected 928 bytes for shape .*, found 300 bytes|a broken archive")


@pytest.mark.parametrize("damage", [b"", b"PK", b"not a zip file at all", "half", "flip"])
def test_damaged_npz_files_are_refused(bench, damage):
    path = bench.folder / "data.npz"
    np.savez_compressed(path, x=X, y=Y)
    whole = path.read_bytes()
    if damage == "half":
        damage = whole[: len(whole) // 2]
    elif damage == "flip":
        damage = whole[:300] + bytes(byte ^ 255 for byte in whole[300:340]) + whole[340:]
    path.write_bytes(damage)
    refused(bench, "data.npz", "expected an npz file|expected an npy array")
    assert not list(bench.cache.glob("building-*"))


@pytest.mark.parametrize(
    ("source", "match"),
    [
        ("gone.npz", "gone.npz: expected a readable file, found no such file or directory"),
        ("gone", "expected a path, 'synthetic' or one of digits, found no such file"),
        ("sub/gone", "found no such file or directory"),
        ("data.txt", "expected a file of npz, npy, csv, IDX or parquet"),
        ("folder.npz", "is a directory|expected a file|train-images"),
        ("single.npy", "expected features and labels, found one npy file"),
    ],
)
def test_sources_that_cannot_be_read_are_refused(bench, source, match):
    (bench.folder / "data.txt").write_text("1 2 3")
    (bench.folder / "folder.npz").mkdir()
    np.save(bench.folder / "single.npy", X)
    refused(bench, source, match)


def test_a_directory_where_a_file_should_be(bench):
    (bench.folder / "folder").mkdir()
    refused(bench, "folder", "found is a directory", format="npz")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_is_refused(bench):
    bench.npz(x=X, y=Y)
    (bench.folder / "data.npz").chmod(0)
    refused(bench, "data.npz", "found permission denied")


def test_a_file_that_shrinks_is_an_error_and_no_crash(bench):
    path = folder(bench, X, Y)
    data = bench.open(path, **WHOLE)
    out = np.zeros((1, 5), np.float32), np.zeros(1, np.int64)
    data.train.read(np.array([39]), *out)
    os.truncate(path / "x.npy", 130)
    with pytest.raises(DataError, match="expected 928 bytes, as when it was opened, found 130 bytes"):
        data.train.read(np.array([39]), *out)


def test_a_file_that_is_another_when_it_is_opened(bench):
    path = folder(bench, X, Y)
    plan = bench.plan(path, **WHOLE)
    np.save(path / "x.npy", X[:5])
    from dptrain.data.dataset import open_dataset

    with pytest.raises(DataError, match="found 228 bytes"):
        open_dataset(plan)
    (path / "x.npy").unlink()
    with pytest.raises(DataError, match="no such file"):
        open_dataset(plan)
