"""What every layer owes: right gradients, the same bytes together and one by one, nothing from padding."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dptrain.job import spec
from dptrain.nn.chain import LAYERS as REGISTERED
from dptrain.nn.convolution import TOGETHER
from dptrain.nn.layer import Workspace
from dptrain.random import Purpose, stream

from .cases import LAYERS
from .passes import bind, difference, make_run, make_tensors, run_layer, spaced

OFTEN = settings(max_examples=60, deadline=None, derandomize=True)
seeds = st.integers(0, 2**32)


def rng_of(seed):
    return stream(seed, Purpose.PROBE)


def test_every_layer_has_a_case():
    assert {*REGISTERED, "dropout"} == {*LAYERS, "embedding"} == set(spec.LAYERS)


@pytest.mark.parametrize("kind", LAYERS)
@OFTEN
@given(data=st.data(), seed=seeds)
def test_gradients_are_those_of_finite_differences(kind, data, seed):
    config, shape = data.draw(LAYERS[kind])
    rng = rng_of(seed)
    k, b = 2, 4
    counts = [4, 3] if kind == "batch_norm" else [4, 4]
    layer = bind(config, shape, np.float64)
    tensors = make_tensors(layer, rng, np.float64)
    run = make_run(k, b, counts)
    x = spaced(rng, (k, b, *shape))
    dy = rng.standard_normal((k, b, *layer.output_shape)) * run.rows.reshape(k, b, *[1] * len(layer.output_shape))
    found = run_layer(layer, tensors, x, dy, run)

    def total(values):
        return float((layer.forward(tensors, values, make_run(k, b, counts))[0] * dy).sum())

    u, expected = difference(total, x, rng)
    assert (found.dx * u).sum() == pytest.approx(expected, rel=1e-5, abs=1e-6)
    for name, _ in layer.parameters:

        def moved(values, name=name):
            y, _ = layer.forward({**tensors, name: values}, x, make_run(k, b, counts))
            return float((y * dy).sum())

        u, expected = difference(moved, tensors[name], rng)
        assert (found.grads[name].sum(axis=0) * u).sum() == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_finite_differences_notice_a_wrong_gradient():
    rng = rng_of(1)
    x = spaced(rng, (5,))
    u, expected = difference(lambda v: float(np.tanh(v).sum()), x, rng)
    assert ((1 - np.tanh(x) ** 2) * u).sum() == pytest.approx(expected, rel=1e-5)
    assert ((1 - np.tanh(x)) * u).sum() != pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("kind", LAYERS)
@OFTEN
@given(data=st.data(), seed=seeds, k=st.sampled_from([1, 2, 3, 8]), b=st.integers(1, 9), wide=st.booleans())
def test_together_and_one_by_one_give_the_same_bytes(kind, data, seed, k, b, wide):
    config, shape = data.draw(LAYERS[kind])
    dtype = np.float64 if wide else np.float32
    rng = rng_of(seed)
    layer = bind(config, shape, dtype)
    tensors = make_tensors(layer, rng, dtype)
    x = rng.standard_normal((k, b, *shape)).astype(dtype)
    dy = rng.standard_normal((k, b, *layer.output_shape)).astype(dtype)
    counts = [b - j % min(3, b + 1) for j in range(k)]
    workspace = Workspace()
    together = run_layer(layer, tensors, x, dy, make_run(k, b, counts, dtype=dtype, workspace=workspace))
    for j in range(k):
        run = make_run(1, b, [counts[j]], shards=[j], dtype=dtype, workspace=workspace)
        one = run_layer(layer, tensors, x[j : j + 1], dy[j : j + 1], run)
        assert one.y.tobytes() == together.y[j].tobytes()
        assert one.dx.tobytes() == together.dx[j].tobytes()
        for name, grad in one.grads.items():
            assert grad.tobytes() == together.grads[name][j].tobytes(), name


@pytest.mark.parametrize("kind", ["linear", "conv2d", "batch_norm", "layer_norm", "max_pool2d"])
def test_together_and_one_by_one_where_arrays_outgrow_the_cache(kind):
    config, shape = {
        "linear": (spec.Linear(units=33), (257,)),
        "conv2d": (spec.Conv2d(channels=9, padding=1), (30, 29, 5)),
        "batch_norm": (spec.BatchNorm(), (30, 29, 5)),
        "layer_norm": (spec.LayerNorm(), (300,)),
        "max_pool2d": (spec.MaxPool2d(), (64, 65, 5)),
    }[kind]
    rng = rng_of(2)
    layer = bind(config, shape, np.float32)
    tensors = make_tensors(layer, rng, np.float32)
    k, b = 3, 37
    x = rng.standard_normal((k, b, *shape)).astype(np.float32)
    dy = rng.standard_normal((k, b, *layer.output_shape)).astype(np.float32)
    together = run_layer(layer, tensors, x, dy, make_run(k, b, dtype=np.float32))
    for j in range(k):
        one = run_layer(layer, tensors, x[j : j + 1], dy[j : j + 1], make_run(1, b, shards=[j], dtype=np.float32))
        assert one.y.tobytes() == together.y[j].tobytes()
        assert one.dx.tobytes() == together.dx[j].tobytes()
        for name, grad in one.grads.items():
            assert grad.tobytes() == together.grads[name][j].tobytes(), name


def test_a_merged_product_may_give_other_bytes():
    """The control: without a product per shard the comparison above would not hold."""
    rng = rng_of(3)
    differing = 0
    for b in range(1, 12):
        x = rng.standard_normal((8, b, 301)).astype(np.float32)
        W = rng.standard_normal((301, 7)).astype(np.float32)
        merged = x.reshape(-1, 301) @ W
        differing += merged.tobytes() != (x @ W).tobytes()
    assert differing


@pytest.mark.parametrize("kind", LAYERS)
@OFTEN
@given(data=st.data(), seed=seeds)
def test_padded_rows_give_nothing(kind, data, seed):
    config, shape = data.draw(LAYERS[kind])
    if kind == "dropout":
        config = spec.Dropout(rate=0)
    rng = rng_of(seed)
    layer = bind(config, shape, np.float64)
    tensors = make_tensors(layer, rng, np.float64)
    x = rng.standard_normal((1, 5, *shape))
    dy = rng.standard_normal((1, 5, *layer.output_shape))
    dy[:, 3:] = 0
    padded = run_layer(layer, tensors, x, dy, make_run(1, 5, [3]))
    small = run_layer(layer, tensors, x[:, :3], dy[:, :3], make_run(1, 3))
    close = {"rtol": 1e-9, "atol": 1e-9}
    np.testing.assert_allclose(padded.y[:, :3], small.y, **close)
    np.testing.assert_allclose(padded.dx[:, :3], small.dx, **close)
    assert not padded.dx[:, 3:].any()
    for name, grad in small.grads.items():
        np.testing.assert_allclose(padded.grads[name], grad, **close)


@pytest.mark.parametrize("kind", LAYERS)
@settings(OFTEN, max_examples=5)
@given(data=st.data(), seed=seeds)
def test_inputs_and_tensors_stay_as_they_are(kind, data, seed):
    config, shape = data.draw(LAYERS[kind])
    rng = rng_of(seed)
    layer = bind(config, shape, np.float32)
    tensors = make_tensors(layer, rng, np.float32)
    x = rng.standard_normal((2, 3, *shape)).astype(np.float32)
    dy = rng.standard_normal((2, 3, *layer.output_shape)).astype(np.float32)
    for array in (x, dy, *tensors.values()):
        array.flags.writeable = False
    for training in (True, False):
        run_layer(layer, tensors, x, dy if training else None, make_run(2, 3, training=training, dtype=np.float32))


@pytest.mark.parametrize("kind", LAYERS)
def test_without_need_of_dx_the_gradients_are_the_same(kind):
    shape = (5, 5, 2) if "2d" in kind else (5,)
    config = {"linear": spec.Linear(units=3), "conv2d": spec.Conv2d(channels=3)}.get(kind)
    config = config or spec.LAYERS[kind]()
    rng = rng_of(4)
    layer = bind(config, shape, np.float32)
    tensors = make_tensors(layer, rng, np.float32)
    x = rng.standard_normal((2, 3, *shape)).astype(np.float32)
    dy = rng.standard_normal((2, 3, *layer.output_shape)).astype(np.float32)
    with_dx = run_layer(layer, tensors, x, dy, make_run(2, 3, dtype=np.float32))
    without = run_layer(layer, tensors, x, dy, make_run(2, 3, dtype=np.float32), need_dx=False)
    for name, grad in with_dx.grads.items():
        assert grad.tobytes() == without.grads[name].tobytes()


def test_the_steady_state_takes_no_new_memory():
    rng = rng_of(5)
    layer = bind(spec.Conv2d(channels=3, padding=1), (6, 6, 2), np.float32)
    tensors = make_tensors(layer, rng, np.float32)
    workspace = Workspace()
    held = []
    for k in (2, 1, 2, 2):
        x = rng.standard_normal((k, 4, 6, 6, 2)).astype(np.float32)
        dy = rng.standard_normal((k, 4, 6, 6, 3)).astype(np.float32)
        run_layer(layer, tensors, x, dy, make_run(k, 4, dtype=np.float32, workspace=workspace))
        held.append(workspace.nbytes)
    assert held == [held[0]] * 4


def naive_convolution(x, W, stride, top, left, oh, ow):
    y = np.zeros((len(x), oh, ow, W.shape[-1]))
    for n, r, c in np.ndindex(len(x), oh, ow):
        for i, j in np.ndindex(W.shape[:2]):
            row, column = r * stride + i - top, c * stride + j - left
            if 0 <= row < x.shape[1] and 0 <= column < x.shape[2]:
                y[n, r, c] += x[n, row, column] @ W[i, j]
    return y


@pytest.mark.parametrize(
    ("side", "kernel", "stride", "padding", "before", "out"),
    [(5, 3, 1, 0, 0, 3), (6, 3, 2, 1, 1, 3), (5, 2, 1, "same", 0, 5), (7, 4, 3, "same", 1, 3), (4, 1, 2, 0, 0, 2)],
)
def test_convolution_is_the_sum_it_says(side, kernel, stride, padding, before, out):
    rng = rng_of(6)
    config = spec.Conv2d(channels=2, kernel=kernel, stride=stride, padding=padding, bias=False)
    layer = bind(config, (side, side, 3), np.float64)
    assert layer.output_shape == (out, out, 2)
    x = rng.standard_normal((1, 2, side, side, 3))
    W = rng.standard_normal((kernel, kernel, 3, 2))
    y, _ = layer.forward({"W": W}, x, make_run(1, 2))
    np.testing.assert_allclose(y[0], naive_convolution(x[0], W, stride, before, before, out, out), atol=1e-12)


def test_of_equal_maxima_the_first_gets_the_gradient():
    layer = bind(spec.MaxPool2d(), (2, 2, 1), np.float64)
    for values, winner in [([0, 1, 1, 0], 1), ([2, 2, 2, 2], 0), ([0, 0, 3, 3], 2), ([1, 0, 0, 1], 0)]:
        x = np.array(values, float).reshape(1, 1, 2, 2, 1)
        found = run_layer(layer, {}, x, np.full((1, 1, 1, 1, 1), 5.0), make_run(1, 1))
        assert found.dx.ravel().tolist() == [5.0 if i == winner else 0.0 for i in range(4)]


def test_activations_at_the_edges_of_their_range():
    x = np.array([-1e30, -200.0, -0.0, 0.0, 200.0, 1e30], np.float32).reshape(1, 1, 6)
    expected = {
        "relu": [0, 0, 0, 0, 200, 1e30],
        "tanh": [-1, -1, 0, 0, 1, 1],
        "sigmoid": [0, 0, 0.5, 0.5, 1, 1],
    }
    for kind, values in expected.items():
        layer = bind(spec.LAYERS[kind](), (6,), np.float32)
        found = run_layer(layer, {}, x, np.ones_like(x), make_run(1, 1, dtype=np.float32))
        np.testing.assert_allclose(found.y.ravel(), np.array(values, np.float32), atol=1e-30)
        assert np.isfinite(found.dx).all()
    relu = run_layer(bind(spec.Relu(), (6,), np.float32), {}, x, np.ones_like(x), make_run(1, 1, dtype=np.float32))
    assert relu.dx.ravel().tolist() == [0, 0, 0, 0, 1, 1]


def test_a_convolution_in_several_parts_is_the_sum_of_its_images():
    rng = rng_of(8)
    layer = bind(spec.Conv2d(channels=4), (40, 40, 6), np.float64)
    assert layer.image_bytes * 2 < TOGETHER < layer.image_bytes * 5
    tensors = make_tensors(layer, rng, np.float64)
    x, dy = rng.standard_normal((1, 5, 40, 40, 6)), rng.standard_normal((1, 5, *layer.output_shape))
    whole = run_layer(layer, tensors, x, dy, make_run(1, 5))
    images = [run_layer(layer, tensors, x[:, [i]], dy[:, [i]], make_run(1, 1)) for i in range(5)]
    for name, grad in whole.grads.items():
        np.testing.assert_allclose(grad, sum(image.grads[name] for image in images), rtol=1e-9, atol=1e-9)
    for i, image in enumerate(images):
        np.testing.assert_allclose(whole.y[:, [i]], image.y, rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(whole.dx[:, [i]], image.dx, rtol=1e-9, atol=1e-9)
