import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dptrain.errors import ModelError
from dptrain.job import spec
from dptrain.random import Purpose, stream

from .passes import bind, make_run, make_tensors, run_layer


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    shape=st.sampled_from([(1,), (3,), (2, 4)]),
    vocabulary=st.integers(1, 6),
    units=st.integers(1, 3),
    k=st.sampled_from([1, 2, 3, 8]),
    seed=st.integers(0, 2**32),
)
def test_rows_of_a_table_and_the_sums_of_their_gradients(shape, vocabulary, units, k, seed):
    rng = stream(seed, Purpose.PROBE)
    layer = bind(spec.Embedding(vocabulary=vocabulary, units=units), shape, np.float32)
    tensors = make_tensors(layer, rng, np.float32)
    x = rng.integers(0, vocabulary, (k, 5, *shape))
    dy = rng.standard_normal((k, 5, *shape, units)).astype(np.float32)
    found = run_layer(layer, tensors, x, dy, make_run(k, 5, dtype=np.float32))
    np.testing.assert_array_equal(found.y, tensors["W"][x])
    assert found.dx is None
    for j in range(k):
        expected = np.zeros((vocabulary, units))
        np.add.at(expected, x[j], dy[j])
        np.testing.assert_allclose(found.grads["W"][j], expected, rtol=1e-5, atol=1e-5)
        one = run_layer(layer, tensors, x[j : j + 1], dy[j : j + 1], make_run(1, 5, dtype=np.float32))
        assert one.grads["W"].tobytes() == found.grads["W"][j].tobytes()


@pytest.mark.parametrize("wrong", [-1, 3])
def test_an_integer_outside_the_table_is_named(wrong):
    layer = bind(spec.Embedding(vocabulary=3, units=2), (2,), np.float32)
    x = np.array([[[0, wrong]]])
    with pytest.raises(ModelError, match=f"expected integers from 0 to 2, found {wrong}"):
        layer.forward({"W": np.zeros((3, 2), np.float32)}, x, make_run(1, 1))
