import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from dptrain.data.encoding import Affine, Encoding, Feature, Target, encoding_of
from dptrain.data.fit import Moments
from dptrain.errors import DataError

from .conftest import rows_of

RNG = np.random.default_rng(7)
NUMBERS = Target("numbers", 0, 1, ("y",))
floats = st.floats(-1e6, 1e6, width=32)


@given(
    raw=hnp.arrays(np.float64, hnp.array_shapes(min_dims=2, max_dims=2, max_side=6), elements=floats),
    data=st.data(),
)
def test_affine_maps_as_the_formula_says_and_back(raw, data):
    width = raw.shape[1]
    numbers = st.lists(st.floats(-100, 100), min_size=width, max_size=width)
    shift = tuple(data.draw(numbers))
    scale = tuple(abs(s) + 0.5 for s in data.draw(numbers))
    affine = Affine(shift, scale)
    out = np.empty_like(raw)
    affine.apply(raw, out)
    np.testing.assert_array_equal(out, (raw - np.array(shift)) * np.array(scale))
    np.testing.assert_allclose(affine.undo(out), raw, rtol=1e-12, atol=1e-9)
    same = raw.copy()
    affine.apply(same, same)
    np.testing.assert_array_equal(same, out)


@pytest.mark.parametrize("raw", [np.uint8, np.int64, np.float32, ">f8", np.float16])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_affine_keeps_the_precision_of_the_wider_type(raw, dtype):
    values = np.array([[3, 100]], raw)
    out = np.empty((1, 2), dtype)
    Affine((1.0, 2.0), (0.1, 3.0)).apply(values, out)
    np.testing.assert_allclose(out, [[0.2, 294]], rtol=3 * np.finfo(dtype).eps)


def test_a_large_mean_does_not_eat_a_small_spread():
    raw = 1e9 + np.array([[0.25], [0.5]])
    out = np.empty((2, 1), np.float32)
    Affine((1e9,), (4.0,)).apply(raw, out)
    np.testing.assert_array_equal(out, [[1], [2]])


@given(
    hnp.arrays(
        np.float64, st.tuples(st.integers(1, 40), st.integers(1, 3)), elements=st.one_of(floats, st.just(np.nan))
    ),
    st.lists(st.integers(0, 40), max_size=4),
)
def test_moments_are_those_of_the_whole_however_it_is_cut(rows, cuts):
    found = Moments.none(rows.shape[1])
    for block in np.split(rows, sorted(min(cut, len(rows)) for cut in cuts)):
        if len(block):
            found.add(block)
    for j, column in enumerate(rows.T):
        real = column[~np.isnan(column)]
        assert found.count[j] == len(real)
        if len(real):
            size = max(1.0, float(np.abs(real).max()))
            assert found.mean[j] == pytest.approx(real.mean(), abs=1e-9 * size)
            assert np.sqrt(found.squares[j] / len(real)) == pytest.approx(real.std(), abs=1e-7 * size)
            assert (found.low[j], found.high[j]) == (real.min(), real.max())


@pytest.mark.parametrize(("kind", "expected"), [("standard", (0, 1)), ("minmax", (0, 1))])
def test_a_constant_column_becomes_zero_and_not_nan(kind, expected):
    found = Moments.none(2)
    found.add(np.column_stack([np.full(1000, 0.1), np.arange(1000.0)]))
    out = np.empty((1, 2))
    found.affine(kind).apply(np.array([[0.1, 999.0]]), out)
    assert abs(out[0, 0]) < 1e-12
    assert out[0, 1] == pytest.approx(1 if kind == "minmax" else 1.7303, abs=1e-3)


words = st.text("ab ,é", max_size=3)


@st.composite
def encodings(draw):
    features = tuple(
        Feature(f"c{i}", "text", None, tuple(sorted(draw(st.sets(words, max_size=4)))))
        if draw(st.booleans())
        else Feature(f"c{i}", "number", draw(st.none() | floats))
        for i in range(draw(st.integers(1, 5)))
    )
    onehot = draw(st.booleans())
    width = sum(len(f.vocabulary) if f.kind == "text" and onehot else 1 for f in features)
    numbers = sum(f.kind == "number" for f in features)
    affine = Affine(tuple(draw(floats) for _ in range(numbers)) or (0.0,), tuple(2.0 for _ in range(numbers)) or (1.0,))
    return Encoding((len(features),), (width,), False, NUMBERS, affine, Affine(), features, onehot)


@given(encodings())
def test_an_encoding_survives_json(encoding):
    assert encoding_of(json.loads(json.dumps(encoding.plan()))) == encoding


@given(encodings(), st.data())
def test_tables_are_encoded_as_row_by_row_rules_say(encoding, data):
    n = data.draw(st.integers(1, 5))
    vocabularies = [sorted({*f.vocabulary, "new"}) if f.kind == "text" else [] for f in encoding.features]
    raw = np.empty((n, len(encoding.features)))
    for j, vocabulary in enumerate(vocabularies):
        choice = st.integers(-1, len(vocabulary) - 1) if vocabulary else floats | st.just(np.nan)
        raw[:, j] = [data.draw(choice) for _ in range(n)]
    x = np.full((n, *encoding.sample_shape), -7.0)
    encoding.write(raw, x, encoding.lookup(vocabularies))
    for i in range(n):
        expected, k = [], 0
        for j, feature in enumerate(encoding.features):
            if feature.kind == "number":
                value = feature.fill if np.isnan(raw[i, j]) and feature.fill is not None else raw[i, j]
                expected.append((value - encoding.affine.shift[k]) * encoding.affine.scale[k])
                k += 1
        for j, feature in enumerate(encoding.features):
            if feature.kind == "text":
                word = vocabularies[j][int(raw[i, j])] if raw[i, j] >= 0 else None
                if encoding.onehot:
                    expected += [float(word == known) for known in feature.vocabulary]
                else:
                    expected.append(feature.vocabulary.index(word) if word in feature.vocabulary else -1)
        np.testing.assert_allclose(x[i], expected, rtol=1e-12)


@pytest.mark.parametrize("rule", ["standard", "minmax"])
@pytest.mark.parametrize("shape", [(6,), (2, 3), (3, 1, 2)])
def test_only_training_rows_shape_the_encoding(bench, rule, shape):
    x = RNG.standard_normal((200, *shape)) * 5 + 3
    y = RNG.standard_normal(200)
    bench.npz(x=x, y=y)
    keys = {"normalise": rule, "label_normalise": "standard", "validation": 0.2, "test": 0.2}
    data = bench.open("data.npz", **keys)
    rows = data.train.file_rows(np.arange(120))
    last = x.reshape(-1, shape[-1])
    train = x[rows].reshape(-1, shape[-1])
    shift, spread = (train.mean(0), train.std(0)) if rule == "standard" else (train.min(0), np.ptp(train, axis=0))
    np.testing.assert_allclose(data.encoding.affine.shift, shift, rtol=1e-12)
    np.testing.assert_allclose(data.encoding.affine.scale, 1 / spread, rtol=1e-12)
    np.testing.assert_allclose(data.encoding.label.shift, y[rows].mean(), rtol=1e-12)
    # The control: the statistics of all rows are others.
    assert not np.allclose(
        data.encoding.affine.shift, last.mean(0) if rule == "standard" else last.min(0) - 1, rtol=1e-6
    )
    encoded, labels = rows_of(data.test)
    kept = data.test.file_rows(np.arange(40))
    np.testing.assert_allclose(encoded, (x[kept] - shift) / spread, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(data.encoding.decode_target(labels)[:, 0], y[kept], rtol=1e-12)
    # Changing rows outside the training part changes nothing of the encoding.
    others = np.setdiff1d(np.arange(200), rows)
    x[others] *= 100
    bench.npz("other.npz", x=x, y=y)
    assert bench.open("other.npz", **keys).encoding.affine == data.encoding.affine


def test_only_training_rows_make_the_vocabulary(bench):
    # Every row has a word of its own: a row outside the training part has none of the known ones.
    bench.text("w,y\n" + "".join(f"w{i:03},{i / 2}\n" for i in range(100)))
    data = bench.open("data.csv", validation=0.0, test=0.3)
    assert data.sample_shape == (70,)
    assert (rows_of(data.train)[0].sum(axis=1) == 1).all()
    assert (rows_of(data.test)[0] == 0).all()
    ordinal = bench.open("data.csv", validation=0.0, test=0.3, categories="ordinal")
    assert (rows_of(ordinal.test)[0] == -1).all()
    assert sorted(rows_of(ordinal.train)[0][:, 0]) == list(range(70))


@pytest.mark.parametrize("rule", ["mean", "median"])
def test_only_training_rows_fill_gaps(bench, rule):
    values = RNG.permutation(100) ** 2
    bench.text("a,y\n" + "".join(f"{'' if i % 9 == 0 else v},{i / 2}\n" for i, v in enumerate(values)))
    data = bench.open("data.csv", validation=0.0, test=0.5, missing=rule)
    rows = data.train.file_rows(np.arange(50))
    real = values[rows[rows % 9 != 0]]
    expected = real.mean() if rule == "mean" else np.median(real)
    assert data.encoding.features[0].fill == pytest.approx(expected, rel=1e-12)
    x, _ = rows_of(data.test)
    gaps = data.test.file_rows(np.arange(50)) % 9 == 0
    np.testing.assert_allclose(x[gaps, 0], expected)


def test_encode_takes_raw_rows(bench):
    x = RNG.standard_normal((50, 2, 3))
    bench.npz(x=x, y=x[:, 0, 0])
    encoding = bench.open("data.npz", normalise="standard", shape=(6,)).encoding
    expected = (x.reshape(50, 6) - encoding.affine.shift) * np.array(encoding.affine.scale)
    np.testing.assert_allclose(encoding.encode(x, np.float64), expected)
    np.testing.assert_allclose(encoding.encode(x.reshape(50, 6)), expected, rtol=1e-4, atol=1e-6)
    for wrong in (x[:, :1], x[0], x.astype(str)):
        with pytest.raises(DataError, match=r"expected numbers of shape \(n, 2, 3\)"):
            encoding.encode(wrong)


def test_numbers_alone_cannot_stand_for_text():
    encoding = Encoding((1,), (1,), False, NUMBERS, features=(Feature("c", "text", None, ("u",)),))
    with pytest.raises(DataError, match="expected text in column 'c'"):
        encoding.encode([[1.0]])


@pytest.mark.parametrize(
    ("dtype", "keys", "integer"),
    [(np.int32, {}, True), (np.uint8, {}, True), (np.float32, {}, False), (np.int32, {"normalise": "scale"}, False)],
)
def test_integers_are_for_an_embedding(bench, dtype, keys, integer):
    bench.npz(x=np.arange(20, dtype=dtype).reshape(10, 2), y=np.zeros(10))
    data = bench.open("data.npz", **keys)
    assert data.integer is integer
    if integer:
        x, _ = rows_of(data.train, np.int64, np.float32)
        np.testing.assert_array_equal(x[:, 0] // 2, data.train.file_rows(np.arange(data.train.rows)))
