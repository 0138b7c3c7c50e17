import sys

import numpy as np
import pytest

from dptrain.errors import DataError

from .conftest import rows_of

WHOLE = {"validation": 0.0, "test": 0.0}


def save(path, **columns):
    pyarrow = pytest.importorskip("pyarrow", reason="the extra parquet is not installed")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table(columns), path, row_group_size=2)


def test_numbers_text_and_gaps(bench):
    save(
        bench.folder / "t.parquet",
        a=[1, 2, 3, None],
        b=["u", None, "v", "u"],
        c=[True, False, True, True],
        y=["p", "q", "p", "q"],
    )
    data = bench.open("t.parquet", missing="median", **WHOLE)
    x, y = rows_of(data.train)
    assert data.encoding.names == ("a", "c", "b=u", "b=v")
    np.testing.assert_array_equal(x, [[1, 1, 1, 0], [2, 0, 0, 0], [3, 1, 0, 1], [2, 1, 1, 0]])
    np.testing.assert_array_equal(y, [0, 1, 0, 1])
    with pytest.raises(DataError, match="row 3 column 'a': expected a value"):
        bench.plan("t.parquet")


def test_the_same_rows_as_csv_give_the_same_data(bench):
    rng = np.random.default_rng(2)
    a, y = rng.standard_normal(50), rng.standard_normal(50)
    c = [["u", "v", "w"][i] for i in rng.integers(0, 3, 50)]
    save(bench.folder / "t.parquet", a=a, c=c, y=y)
    bench.text("a,c,y\n" + "".join(f"{a[i]!r},{c[i]},{y[i]!r}\n" for i in range(50)).replace("np.float64", ""))
    (bench.folder / "data.csv").write_text((bench.folder / "data.csv").read_text().replace("(", "").replace(")", ""))
    keys = {"normalise": "standard", "label_normalise": "standard"}
    one, other = bench.open("t.parquet", **keys), bench.open("data.csv", **keys)
    for part in ("train", "validation", "test"):
        for left, right in zip(rows_of(getattr(one, part)), rows_of(getattr(other, part)), strict=True):
            np.testing.assert_array_equal(left, right)


def test_whole_numbers_are_classes_and_integers_for_an_embedding(bench):
    save(bench.folder / "t.parquet", a=[1, 5, 3], y=[4, 7, 4])
    data = bench.open("t.parquet", **WHOLE)
    assert data.integer
    assert data.target.names == ("4", "7")
    np.testing.assert_array_equal(rows_of(data.train, np.int64)[0], [[1], [5], [3]])


def test_what_is_no_table_of_numbers_and_text_is_refused(bench):
    import datetime

    save(bench.folder / "t.parquet", a=[datetime.date(2020, 1, 1)], y=[1])
    with pytest.raises(DataError, match="column 'a': expected numbers or text, found date32"):
        bench.plan("t.parquet")
    (bench.folder / "no.parquet").write_bytes(b"PAR1 and nothing more")
    with pytest.raises(DataError, match="expected a Parquet file"):
        bench.plan("no.parquet")


def test_without_pyarrow_the_extra_is_named(bench, monkeypatch):
    (bench.folder / "t.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match=r"expected the package pyarrow.*pip install 'dptrain\[parquet\]'"):
        bench.plan("t.parquet")
