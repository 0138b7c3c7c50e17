import numpy as np
import pytest

from dptrain.job import spec
from dptrain.random import Purpose, stream

from .passes import bind, make_run, make_tensors, run_layer

CLOSE = {"rtol": 1e-10, "atol": 1e-10}


@pytest.mark.parametrize("shape", [(3,), (4, 5, 2), (2, 1)])
def test_batch_norm_normalises_the_real_rows_of_each_shard(shape):
    rng = stream(1, Purpose.PROBE)
    layer = bind(spec.BatchNorm(eps=1e-3), shape, np.float64)
    tensors = make_tensors(layer, rng, np.float64)
    counts = [4, 2, 1, 0]
    x = rng.standard_normal((4, 4, *shape)) * 3 + 5
    dy = rng.standard_normal(x.shape)
    found = run_layer(layer, tensors, x, dy, make_run(4, 4, counts))
    for j, n in enumerate(counts):
        real = x[j, :n].reshape(-1, shape[-1])
        if n == 0:
            assert not any(grad[j].any() for grad in found.grads.values())
            assert not found.dx[j].any()
            continue
        mean, var = real.mean(axis=0), real.var(axis=0)
        y = (real - mean) / np.sqrt(var + 1e-3) * tensors["gamma"] + tensors["beta"]
        np.testing.assert_allclose(found.y[j, :n].reshape(y.shape), y, **CLOSE)
        unbiased = real.var(axis=0, ddof=1) if len(real) > 1 else var
        np.testing.assert_allclose(found.grads["running_mean"][j], n * mean, **CLOSE)
        np.testing.assert_allclose(found.grads["running_var"][j], n * unbiased, **CLOSE)
        np.testing.assert_allclose(found.grads["beta"][j], dy[j, :n].reshape(-1, shape[-1]).sum(axis=0), **CLOSE)
    assert not found.dx[1, 2:].any()


def test_what_padded_rows_hold_does_not_matter():
    rng = stream(2, Purpose.PROBE)
    layer = bind(spec.BatchNorm(), (3,), np.float64)
    tensors = make_tensors(layer, rng, np.float64)
    x, dy = rng.standard_normal((2, 1, 4, 3))
    results = []
    for filler in (0.0, 1e9, np.nan):
        x[:, 2:] = dy[:, 2:] = filler
        result = run_layer(layer, tensors, x, dy, make_run(1, 4, [2]))
        results.append(result.bytes())
    assert results[0] == results[1] == results[2]
    x[:, 1] += 1
    assert run_layer(layer, tensors, x, dy, make_run(1, 4, [2])).bytes() != results[0]


def test_batch_norm_evaluates_with_the_running_statistics():
    rng = stream(3, Purpose.PROBE)
    layer = bind(spec.BatchNorm(eps=0.25), (2, 3), np.float64)
    tensors = make_tensors(layer, rng, np.float64)
    x = rng.standard_normal((2, 4, 2, 3))
    y = run_layer(layer, tensors, x, None, make_run(2, 4, training=False)).y
    scale = tensors["gamma"] / np.sqrt(tensors["running_var"] + 0.25)
    np.testing.assert_allclose(y, (x - tensors["running_mean"]) * scale + tensors["beta"], **CLOSE)


def test_batch_norm_keeps_its_precision_far_from_zero():
    rng = stream(4, Purpose.PROBE)
    layer = bind(spec.BatchNorm(), (30, 30, 2), np.float32)
    tensors = {"gamma": np.ones(2, np.float32), "beta": np.zeros(2, np.float32)}
    x = (rng.standard_normal((1, 40, 30, 30, 2)) + 1000).astype(np.float32)
    found = run_layer(layer, tensors, x, x, make_run(1, 40, dtype=np.float32))
    wide = x.astype(np.float64)
    np.testing.assert_allclose(found.grads["running_mean"][0] / 40, wide.mean(axis=(0, 1, 2, 3)), rtol=1e-6)
    np.testing.assert_allclose(found.grads["running_var"][0] / 40, wide.var(axis=(0, 1, 2, 3)), rtol=1e-3)


def test_layer_norm_normalises_each_last_axis():
    rng = stream(5, Purpose.PROBE)
    layer = bind(spec.LayerNorm(eps=1e-2), (3, 8), np.float64)
    tensors = make_tensors(layer, rng, np.float64)
    x = rng.standard_normal((2, 4, 3, 8)) + 2
    y = run_layer(layer, tensors, x, None, make_run(2, 4)).y
    normal = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-2)
    np.testing.assert_allclose(y, normal * tensors["gamma"] + tensors["beta"], **CLOSE)


@pytest.mark.parametrize("kind", ["batch_norm", "layer_norm"])
def test_they_start_as_the_identity(kind):
    layer = bind(spec.LAYERS[kind](), (3,), np.float64)
    tensors = make_tensors(layer, stream(6, Purpose.PROBE), np.float64)
    layer.initialise(tensors, stream(6, Purpose.INITIALISE))
    expected = {"gamma": 1, "beta": 0, "running_mean": 0, "running_var": 1}
    assert all((values == expected[name]).all() for name, values in tensors.items())
