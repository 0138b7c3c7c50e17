import gzip

import numpy as np
import pytest

from dptrain.errors import DataError

from .conftest import rows_of

WHOLE = {"validation": 0.0, "test": 0.0}
TABLE = """size,colour,weight,kind
1.5,red,10,b
2.5,blue,,a
-3e2,red,30,b
4,green,40,a
"""


def test_columns_by_name_with_the_label_last(bench):
    bench.text(TABLE)
    data = bench.open("data.csv", missing="zero", **WHOLE)
    x, y = rows_of(data.train)
    # Numbers first, then one column for each colour in sorted order.
    assert data.encoding.names == ("size", "weight", "colour=blue", "colour=green", "colour=red")
    expected = [[1.5, 10, 0, 0, 1], [2.5, 0, 1, 0, 0], [-300, 30, 0, 0, 1], [4, 40, 0, 1, 0]]
    np.testing.assert_array_equal(x, expected)
    np.testing.assert_array_equal(y, [1, 0, 1, 0])
    assert data.target.names == ("a", "b")
    assert not data.integer


def test_features_and_label_can_be_chosen(bench):
    bench.text(TABLE)
    data = bench.open("data.csv", features=("colour",), label="size", categories="ordinal", **WHOLE)
    x, y = rows_of(data.train)
    np.testing.assert_array_equal(x, [[2], [0], [2], [1]])
    np.testing.assert_array_equal(y, [[1.5], [2.5], [-300], [4]])
    assert data.target.kind == "numbers"
    assert data.target.names == ("size",)


def test_the_forms_a_table_can_have(bench):
    bench.text(TABLE.replace(",", ";"), "semicolon.csv")
    bench.text("\ufeff" + TABLE.replace("\n", "\r\n"), "windows.csv")
    bench.text(TABLE.replace("red", '"red"').replace("\n", "\n\n"), "quoted.csv")
    (bench.folder / "packed.csv.gz").write_bytes(gzip.compress(TABLE.encode()))
    bench.text(TABLE)
    whole = rows_of(bench.open("data.csv", missing="mean", **WHOLE).train)
    for name, keys in {
        "semicolon.csv": {"delimiter": ";"},
        "windows.csv": {},
        "quoted.csv": {},
        "packed.csv.gz": {},
    }.items():
        x, y = rows_of(bench.open(name, missing="mean", **keys, **WHOLE).train)
        np.testing.assert_array_equal(x, whole[0])
        np.testing.assert_array_equal(y, whole[1])


@pytest.mark.parametrize(
    ("labels", "kind", "names"),
    [
        (["10", "9", "10"], "classes", ("9", "10")),
        (["-1", "1", "1"], "classes", ("-1", "1")),
        (["1.0", "2.0", "1.0"], "numbers", ("y",)),
        (["1e3", "2", "3"], "numbers", ("y",)),
        (["x", "1", "2"], "classes", ("1", "2", "x")),
    ],
)
def test_whole_numbers_and_text_are_classes_others_numbers(bench, labels, kind, names):
    bench.text("x,y\n" + "".join(f"{i},{label}\n" for i, label in enumerate(labels)))
    data = bench.open("data.csv", **WHOLE)
    assert (data.target.kind, data.target.names) == (kind, names)
    y = rows_of(data.train)[1]
    expected = [names.index(v) for v in labels] if kind == "classes" else [[float(v)] for v in labels]
    np.testing.assert_array_equal(y, expected)
    if names == ("9", "10"):
        numbers = bench.open("data.csv", task="numbers", **WHOLE)
        np.testing.assert_array_equal(rows_of(numbers.train)[1], [[10], [9], [10]])


def test_a_column_that_turns_to_text_late_is_text_from_the_start(bench):
    rows = 40_000  # more than are read in one go
    bench.text("a,b,y\n" + "".join(f"{i % 7},{i},{i % 2}\n" for i in range(rows)) + "seven,1,0\n")
    data = bench.open("data.csv", categories="ordinal", **WHOLE)
    x, y = rows_of(data.train)
    assert data.encoding.features[0].vocabulary == ("0", "1", "2", "3", "4", "5", "6", "seven")
    np.testing.assert_array_equal(x[:, 1], [*(i % 7 for i in range(rows)), 7])
    np.testing.assert_array_equal(x[:, 0], [*range(rows), 1])
    np.testing.assert_array_equal(y, [*(i % 2 for i in range(rows)), 0])


@pytest.mark.parametrize(("rule", "expected"), [("mean", 4.0), ("median", 3.0), ("zero", 0.0), ("drop", None)])
def test_missing_values(bench, rule, expected):
    bench.text("a,c,y\n1,u,0\nNA,v,1\n3,,0\n8,u,1\n")
    data = bench.open("data.csv", missing=rule, **WHOLE)
    x, y = rows_of(data.train)
    if expected is None:
        np.testing.assert_array_equal(x, [[1, 1], [8, 1]])
        np.testing.assert_array_equal(y, [0, 1])
    else:
        np.testing.assert_array_equal(x, [[1, 1, 0], [expected, 0, 1], [3, 0, 0], [8, 1, 0]])


def refused(bench, content, match, **keys):
    source = bench.text(content) if isinstance(content, str) else "data.csv"
    if isinstance(content, bytes):
        (bench.folder / source).write_bytes(content)
    with pytest.raises(DataError, match=match) as caught:
        bench.plan(source, **keys)
    assert str(caught.value).startswith("job.toml: ")
    assert not list(bench.cache.glob("building-*"))


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("a,y\n1,2\n1,2,3\n", "data.csv line 3: expected 2 columns, found 3; correct that line"),
        ("a,y\n1,2\n\n\n1\n", "line 5: expected 2 columns, found 1"),
        ('a,y\n"p\nq",2\n1\n', "line 4: expected 2 columns, found 1"),
        ("a,y\n1,0\n\n,0\n", "line 4 column 'a': expected a value, found none, as in 1 of 2 rows"),
        ("a,y\n1,0\n2,\n", "line 3 column 'y': expected a value"),
        ("a,y\n1,0\n2,1\n-inf,1\n", "line 4 column 'a': expected a finite number, found infinity"),
        ("", "expected a line of column names, found an empty file"),
        ("a,y\n", "expected at least one row, found none"),
        ("1,2\n3,4\n", "line 1: expected the names of the columns, found numbers"),
        ("a,a,y\n1,2,3\n", "expected each column name once, found 'a' twice"),
        ('a,y\n"1,2\n', "expected UTF-8 text in columns"),
        (b"a,y\n\xff\xfe,2\n", "expected UTF-8 text in columns, found bytes that are none"),
    ],
)
def test_broken_tables_are_refused(bench, content, match):
    refused(bench, content, match)


def test_rules_that_do_not_fit_are_refused(bench):
    refused(bench, TABLE, "column 'weight': expected a value", **WHOLE)
    refused(bench, TABLE, "expected a column 'height', found columns size, colour", features=("height",))
    refused(bench, TABLE, "expected a column 'height'", label="height")
    refused(bench, TABLE, "expected features apart from the label", features=("size",), label="size")
    refused(bench, TABLE, "column 'colour': expected numbers, found text", categories="error", missing="zero")
    refused(bench, TABLE, "column 'colour': expected at most 2 different texts", max_categories=2)
    refused(bench, TABLE, "expected one character", delimiter="::")
    refused(bench, TABLE, "label: expected numbers, found text", task="numbers", missing="zero")


def test_infinite_values_can_be_left_out(bench):
    bench.text("a,y\n1,0\ninf,1\n3,1\n")
    x, y = rows_of(bench.open("data.csv", nan="skip", **WHOLE).train)
    np.testing.assert_array_equal(x, [[1], [3]])
    np.testing.assert_array_equal(y, [0, 1])


def test_too_many_classes_are_probably_numbers(bench):
    refused(bench, "a,y\n" + "".join(f"1,{i}\n" for i in range(1_001)), "expected at most 1000 classes, found 1001")


def test_a_gzip_bomb_is_refused(bench):
    (bench.folder / "data.csv.gz").write_bytes(gzip.compress(b"a,y\n" + b"0,0\n" * 50_000))
    with pytest.raises(DataError, match="expected no more bytes unpacked than"):
        bench.plan("data.csv.gz", max_bytes=100_000)
    assert bench.open("data.csv.gz").train.rows == 40_000


@pytest.mark.parametrize("cut", [4, -4])
def test_a_damaged_gzip_file_is_refused(bench, cut):
    (bench.folder / "data.csv.gz").write_bytes(gzip.compress(TABLE.encode())[:cut])
    with pytest.raises(DataError, match="expected a whole gzip file"):
        bench.plan("data.csv.gz")


def test_a_second_file_must_be_like_the_first(bench):
    bench.text("a,c,y\n1,u,0\n2,v,1\n")
    bench.text("y,c,a,more\n1,w,5,0\n0,v,6,0\n", "test.csv")
    data = bench.open("data.csv", validation=0.0, test="test.csv")
    x, y = rows_of(data.test)
    # Columns are found by name; the colour no training row has is all zeros.
    np.testing.assert_array_equal(x, [[5, 0, 0], [6, 0, 1]])
    np.testing.assert_array_equal(y, [1, 0])
    bench.text("a,c,y\nten,u,0\n", "text.csv")
    with pytest.raises(DataError, match="line 2 column 'a': expected a number, as in the training data, found 'ten'"):
        bench.plan("data.csv", test="text.csv")
    bench.text("a,c,y\n1,u,7\n", "label.csv")
    with pytest.raises(DataError, match="row 0: expected one of the classes 0, 1, found '7'"):
        bench.plan("data.csv", test="label.csv")


def test_text_is_parsed_once(bench, monkeypatch):
    bench.text(TABLE)
    first = bench.plan("data.csv", missing="zero")
    from dptrain.data import delimited

    def fail(*_):
        raise AssertionError("parsed again")

    monkeypatch.setattr(delimited, "_parse_as", fail)
    assert bench.plan("data.csv", missing="zero") == first
    # Another seed is another split of the same table.
    assert bench.plan("data.csv", seed=2, missing="zero")["parts"]["train"]["x"] == first["parts"]["train"]["x"]
    bench.text(TABLE + "5,red,50,a\n")
    with pytest.raises(AssertionError, match="parsed again"):
        bench.plan("data.csv", missing="zero")
