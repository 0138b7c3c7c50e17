import numpy as np
import pytest

from dptrain.data.encoding import encoding_of
from dptrain.data.unseen import open_for_evaluation, read_for_prediction
from dptrain.errors import DataError

from .conftest import rows_of
from .test_idx import IMAGES, LABELS, mnist

RNG = np.random.default_rng(9)
X = RNG.standard_normal((60, 4))
Y = RNG.standard_normal(60)
TRAIN = "a,c,b,y\n" + "".join(f"{i},{'uvw'[i % 3]},{i * i},{'no' if i % 2 else 'yes'}\n" for i in range(30))


def predict(bench, plan, name):
    return read_for_prediction(bench.folder / name, encoding_of(plan["encoding"]), dtype=np.float64, cache=bench.cache)


def test_the_training_file_itself_gives_the_training_rows(bench):
    bench.npz(x=X, y=Y)
    keys = {"normalise": "standard", "label_normalise": "standard"}
    plan, data = bench.plan("data.npz", **keys), bench.open("data.npz", **keys)
    np.save(bench.folder / "X.npy", X.astype(np.float64))
    x, ids = predict(bench, plan, "X.npy")
    np.testing.assert_array_equal(ids, np.arange(60))
    at = data.test.file_rows(np.arange(data.test.rows))
    np.testing.assert_array_equal(x[at], rows_of(data.test)[0])
    part = open_for_evaluation(bench.folder / "data.npz", plan, cache=bench.cache)
    whole, y = rows_of(part)
    np.testing.assert_array_equal(whole, x)
    np.testing.assert_allclose(data.encoding.decode_target(y)[:, 0], Y, rtol=1e-12)


def test_tables_are_matched_by_name(bench):
    bench.text(TRAIN)
    plan = bench.plan("data.csv", normalise="minmax", validation=0.0, test=0.0)
    bench.text("b,c,a\n0,w,29\n841,x,0\n", "new.csv")
    x, ids = predict(bench, plan, "new.csv")
    np.testing.assert_allclose(x, [[1, 0, 0, 0, 1], [0, 1, 0, 0, 0]])
    assert ids.tolist() == [0, 1]
    bench.text("y,b,c,a\nno,0,w,29\nyes,1,u,3\nno,1,u,3\n", "labelled.csv")
    part = open_for_evaluation(bench.folder / "labelled.csv", plan, cache=bench.cache)
    np.testing.assert_array_equal(rows_of(part)[1], [0, 1, 0])
    assert part.encoding.target.names == ("no", "yes")
    bench.text("y,b,c,a\nmaybe,0,w,29\n", "labelled.csv")
    with pytest.raises(DataError, match="expected one of the classes no, yes, found 'maybe'"):
        open_for_evaluation(bench.folder / "labelled.csv", plan, cache=bench.cache)


def test_gaps_follow_the_stored_rule(bench):
    bench.text(TRAIN)
    bench.text("b,c,a\n1,w,2\n,u,3\n4,u,5\n", "new.csv")
    drop = bench.plan("data.csv", missing="drop")
    x, ids = predict(bench, drop, "new.csv")
    assert ids.tolist() == [0, 2]
    np.testing.assert_array_equal(x[:, :2], [[2, 1], [5, 4]])
    with pytest.raises(DataError, match="line 3 column 'b': expected a value"):
        predict(bench, bench.plan("data.csv"), "new.csv")


def test_images_of_a_folder(bench):
    folder = mnist(bench.folder / "mnist")
    plan = bench.plan(folder, classes=4)
    x, _ = predict(bench, plan, "mnist")
    np.testing.assert_allclose(x, IMAGES[20:, ..., None] / 255)
    part = open_for_evaluation(folder, plan, cache=bench.cache)
    np.testing.assert_array_equal(rows_of(part)[1], LABELS[20:])


@pytest.mark.parametrize(
    ("array", "match"),
    [
        (X[:, :3], r"expected rows of shape \(4,\), as in the training data, found \(3,\)"),
        (X[0], r"found \(\)"),
        (np.array([[1, np.nan, 2, 3]]), "row 0 column 1: expected a finite number, found NaN"),
        (X.astype(str), "expected numbers as features"),
    ],
)
def test_rows_unlike_the_training_rows_are_refused(bench, array, match):
    bench.npz(x=X, y=Y)
    np.save(bench.folder / "X.npy", array)
    with pytest.raises(DataError, match=match):
        predict(bench, bench.plan("data.npz"), "X.npy")


def test_another_kind_of_file_is_refused(bench):
    bench.npz(x=X, y=Y)
    bench.text(TRAIN)
    np.save(bench.folder / "X.npy", X)
    with pytest.raises(DataError, match="expected arrays or images, as for training, found a table"):
        predict(bench, bench.plan("data.npz"), "data.csv")
    with pytest.raises(DataError, match="expected a table, found arrays"):
        predict(bench, bench.plan("data.csv"), "X.npy")


def test_digits_are_given_as_pixels(bench):
    plan = bench.plan("digits")
    np.save(bench.folder / "X.npy", np.full((2, 64), 8))
    x, _ = predict(bench, plan, "X.npy")
    assert (x == 0.5).all()
    np.save(bench.folder / "images.npy", np.full((2, 8, 8), 4.0))
    assert (predict(bench, plan, "images.npy")[0] == 0.25).all()
