import numpy as np
import pytest

from dptrain.errors import ModelError
from dptrain.job import spec
from dptrain.nn.chain import LayerSummary, build_chain
from dptrain.nn.layer import Workspace
from dptrain.random import Purpose, stream

from .passes import Collected, difference, make_run, spaced

IMAGE_NET = [
    spec.Conv2d(channels=3, kernel=2),
    spec.BatchNorm(),
    spec.Relu(),
    spec.MaxPool2d(),
    spec.Dropout(rate=0.2),
    spec.Flatten(),
    spec.Linear(units=5),
    spec.Gelu(),
    spec.Tanh(),
    spec.Dropout(rate=0.2),
    spec.Sigmoid(),
    spec.LayerNorm(),
    spec.LeakyRelu(),
    spec.Linear(units=3),
]
POOLED_NET = [
    spec.Conv2d(channels=6, padding="same"),
    spec.Relu(),
    spec.MaxPool2d(),
    spec.Conv2d(channels=3, padding=1),
    spec.Relu(),
    spec.Conv2d(channels=2, kernel=2),
    spec.MaxPool2d(),
    spec.Flatten(),
    spec.Linear(units=2),
]
TOKEN_NET = [spec.Embedding(vocabulary=7, units=4), spec.Linear(units=3), spec.Gelu(), spec.Flatten(), spec.Sigmoid()]


def started(layers, shape, dtype=np.float64, seed=1):
    chain = build_chain(layers, shape, dtype)
    vector = np.full(chain.layout.size, np.nan, dtype)
    chain.initialise(vector, seed)
    return chain, vector


def gradients(chain, vector, x, dz, run):
    z, backward = chain.forward(chain.layout.views(vector), x, run)
    z = z.copy()
    sink = Collected(chain.layout, len(x), vector.dtype)
    backward(dz, sink)
    assert sink.opened == sink.closed or set(sink.opened) == set(sink.closed)
    assert set(sink.closed) == set(chain.layout.entries)
    return z, sink.vectors


def batch(layers, rng, k, b, dtype=np.float64):
    if layers is TOKEN_NET:
        return rng.integers(0, 7, (k, b, 2)), (2,)
    return spaced(rng, (k, b, 7, 6, 2), dtype), (7, 6, 2)


@pytest.mark.parametrize("layers", [IMAGE_NET, POOLED_NET, TOKEN_NET], ids=["images", "pooled images", "tokens"])
def test_the_gradient_of_a_whole_chain_is_that_of_finite_differences(layers):
    rng = stream(1, Purpose.PROBE)
    k, b, counts = 2, 5, [5, 4]
    x, shape = batch(layers, rng, k, b)
    chain, vector = started(layers, shape)
    dz = rng.standard_normal((k, b, *chain.output_shape))
    dz *= (np.arange(b) < np.array(counts)[:, None])[:, :, None]
    _, vectors = gradients(chain, vector, x, dz, make_run(k, b, counts))

    def total(values):
        z, _ = chain.forward(chain.layout.views(values), x, make_run(k, b, counts))
        return float((z * dz).sum())

    u, expected = difference(total, vector, rng)
    parameters = chain.layout.parameters
    found = vectors.sum(axis=0)[:parameters] @ u[:parameters]
    assert found == pytest.approx(expected, rel=1e-6)
    assert np.isfinite(vectors).all()


@pytest.mark.parametrize("layers", [IMAGE_NET, POOLED_NET, TOKEN_NET], ids=["images", "pooled images", "tokens"])
@pytest.mark.parametrize("k", [2, 3, 8])
def test_a_chain_gives_the_same_bytes_together_and_one_by_one(layers, k):
    rng = stream(2, Purpose.PROBE)
    x, shape = batch(layers, rng, k, 4, np.float32)
    chain, vector = started(layers, shape, np.float32)
    dz = rng.standard_normal((k, 4, *chain.output_shape)).astype(np.float32)
    workspace = Workspace()
    counts = [4 - j % 3 for j in range(k)]
    z, together = gradients(chain, vector, x, dz, make_run(k, 4, counts, dtype=np.float32, workspace=workspace))
    for j in range(k):
        run = make_run(1, 4, [counts[j]], shards=[j], dtype=np.float32, workspace=workspace)
        z_one, one = gradients(chain, vector, x[j : j + 1], dz[j : j + 1], run)
        assert z_one.tobytes() == z[j].tobytes()
        assert one.tobytes() == together[j].tobytes()


def test_what_is_overwritten_is_never_the_callers():
    elementwise = [spec.Flatten(), spec.Relu(), spec.Dropout(), spec.Sigmoid(), spec.Linear(units=2), spec.Gelu()]
    rng = stream(3, Purpose.PROBE)
    for layers in (elementwise, IMAGE_NET, [spec.Dropout(), spec.Tanh(), spec.Flatten(), spec.Linear(units=1)]):
        x = rng.standard_normal((2, 3, 7, 6, 2))
        chain, vector = started(layers, (7, 6, 2))
        dz = rng.standard_normal((2, 3, *chain.output_shape))
        for array in (x, dz, vector):
            array.flags.writeable = False
        gradients(chain, vector, x, dz, make_run(2, 3))
        chain.forward(chain.layout.views(vector), x, make_run(2, 3, training=False))


def test_overwriting_changes_no_value():
    rng = stream(4, Purpose.PROBE)
    x, shape = batch(IMAGE_NET, rng, 2, 4)
    chain, vector = started(IMAGE_NET, shape)
    dz = rng.standard_normal((2, 4, 3))
    thrifty = gradients(chain, vector, x, dz, make_run(2, 4))
    layers = [step.layer for step in chain._steps]
    assert any(layer.overwrites_input for layer in layers)
    assert any(layer.overwrites_gradient for layer in layers)
    for layer in layers:
        layer.overwrites_input = layer.overwrites_gradient = False
        layer.dx_key = layer.name
    lavish = gradients(chain, vector, x, dz, make_run(2, 4))
    assert [part.tobytes() for part in thrifty] == [part.tobytes() for part in lavish]


def indices(chain):
    return [step.index for step in chain._steps]


def test_pooling_before_the_relu_changes_no_value():
    layers = [spec.BatchNorm(), spec.Relu(), spec.MaxPool2d(), spec.Flatten(), spec.Linear(units=2)]
    rng = stream(5, Purpose.PROBE)
    x = rng.standard_normal((2, 3, 8, 8, 1)).astype(np.float32)
    dz = rng.standard_normal((2, 3, 2)).astype(np.float32)
    chain, vector = started(layers, (8, 8, 1), np.float32)
    assert indices(chain) == [0, 2, 1, 3, 4]
    # A layer of slope 0 is a relu that the chain doesn't know as one.
    plain, _ = started([layers[0], spec.LeakyRelu(slope=0.0), *layers[2:]], (8, 8, 1), np.float32)
    assert indices(plain) == [0, 1, 2, 3, 4]
    z, vectors = gradients(chain, vector, x, dz, make_run(2, 3, dtype=np.float32))
    z_plain, vectors_plain = gradients(plain, vector, x, dz, make_run(2, 3, dtype=np.float32))
    np.testing.assert_array_equal(z, z_plain)
    np.testing.assert_array_equal(vectors, vectors_plain)
    assert vectors.any()


CONVOLUTIONS = [
    spec.Conv2d(channels=3, padding="same"),
    spec.Conv2d(channels=3, padding=2, stride=2, bias=False),
    spec.Conv2d(channels=3, kernel=1),
    spec.Conv2d(channels=3, kernel=2, padding=3),
]
FOLLOWERS = {
    "relu": [spec.Relu()],
    "pool": [spec.MaxPool2d()],
    "relu, pool": [spec.Relu(), spec.MaxPool2d(kernel=3)],
    "pool, relu": [spec.MaxPool2d(), spec.Relu()],
}


@pytest.mark.parametrize("followers", FOLLOWERS)
@pytest.mark.parametrize("channels", [1, 5])
@pytest.mark.parametrize("convolution", CONVOLUTIONS, ids=str)
def test_what_a_convolution_takes_in_changes_no_value(convolution, channels, followers):
    # Twice, so that one of them has to give an input gradient as well.
    layers = [convolution, *FOLLOWERS[followers], spec.Conv2d(channels=4, padding=1), *FOLLOWERS[followers]]
    rng = stream(8, Purpose.PROBE)
    k, b, counts = 2, 3, [3, 2]
    shape = (19, 22, channels)
    chain, vector = started(layers, shape)
    if channels > 1:
        assert indices(chain) == [0, 1 + len(FOLLOWERS[followers])]
    # The bias of a new layer is 0, and would not tell where it is added.
    vector += 0.1 * rng.standard_normal(vector.shape)
    x, dz = spaced(rng, (k, b, *shape)), rng.standard_normal((k, b, *chain.output_shape))
    # A dropout of rate 0 does nothing but stand between.
    apart_layers = [one for layer in layers for one in (layer, spec.Dropout(rate=0.0))]
    apart, _ = started(apart_layers, shape)
    assert len(apart._steps) == len(apart_layers)
    z, vectors = gradients(chain, vector, x, dz, make_run(k, b, counts))
    z_apart, vectors_apart = gradients(apart, vector, x, dz, make_run(k, b, counts))
    np.testing.assert_allclose(z, z_apart, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(vectors, vectors_apart, rtol=1e-10, atol=1e-12)
    assert vectors.any()
    evaluated, _ = chain.forward(chain.layout.views(vector), x, make_run(k, b, counts, training=False))
    np.testing.assert_array_equal(evaluated, z)


def test_a_convolution_takes_in_a_relu_and_a_pooling_that_is_worth_it():
    conv, wide = spec.Conv2d(channels=2), spec.MaxPool2d(kernel=6)
    assert indices(build_chain(POOLED_NET, (20, 20, 1))) == [0, 3, 5, 7, 8]
    # One window for all of the pool would be too large, with few channels; the pool has gaps, or overlaps.
    assert indices(build_chain([conv, wide], (20, 20, 1))) == [0, 1]
    assert indices(build_chain([conv, wide], (20, 20, 5))) == [0]
    for stride in (1, 3):
        assert indices(build_chain([conv, spec.MaxPool2d(kernel=2, stride=stride)], (20, 20, 1))) == [0, 1]
    assert indices(build_chain([conv, spec.MaxPool2d(kernel=16)], (40, 40, 5))) == [0, 1]


def test_the_summary_lists_the_jobs_layers_in_their_order():
    chain = build_chain(IMAGE_NET[:7], (7, 6, 2))
    assert chain.summary() == [
        LayerSummary("layers.0.conv2d", (6, 5, 3), 2 * 2 * 2 * 3 + 3),
        LayerSummary("layers.1.batch_norm", (6, 5, 3), 6),
        LayerSummary("layers.2.relu", (6, 5, 3), 0),
        LayerSummary("layers.3.max_pool2d", (3, 2, 3), 0),
        LayerSummary("layers.4.dropout", (3, 2, 3), 0),
        LayerSummary("layers.5.flatten", (18,), 0),
        LayerSummary("layers.6.linear", (5,), 18 * 5 + 5),
    ]
    assert list(chain.layout.entries) == [
        "layers.0.conv2d.W",
        "layers.0.conv2d.b",
        "layers.1.batch_norm.gamma",
        "layers.1.batch_norm.beta",
        "layers.6.linear.W",
        "layers.6.linear.b",
        "layers.1.batch_norm.running_mean",
        "layers.1.batch_norm.running_var",
    ]
    assert chain.layout.parameters == 27 + 6 + 95
    assert chain.input_dtype == np.float32
    assert build_chain(TOKEN_NET, (2,)).input_dtype == np.int64


@pytest.mark.parametrize(
    ("layers", "shape", "message"),
    [
        (
            [spec.Conv2d(channels=32), spec.Relu(), spec.Linear(units=10)],
            (14, 14, 3),
            r"layer 2 \(linear, 10 units\) after layer 1 \(relu\): expected a flat input, "
            r"found \(12, 12, 32\); put a flatten before it",
        ),
        ([spec.Conv2d(channels=4)], (28, 28), r"layer 0 \(conv2d, 4 channels\) after the data: expected an image"),
        (
            [spec.Flatten(), spec.MaxPool2d()],
            (4, 4, 1),
            r"layer 1 \(max_pool2d, 2 kernel\) after layer 0 \(flatten\): expected an image .* found \(16,\)",
        ),
        ([spec.Conv2d(channels=4, kernel=5)], (4, 9, 1), "an image of at least 5 x 5"),
        ([spec.AvgPool2d(kernel=5)], (4, 9, 1), "an image of at least 5 x 5"),
        ([spec.Linear(units=4), spec.Embedding(vocabulary=3, units=2)], (4,), "make the embedding the first layer"),
    ],
)
def test_layers_that_do_not_fit_are_both_named(layers, shape, message):
    with pytest.raises(ModelError, match=message):
        build_chain(layers, shape)


def test_the_start_is_a_function_of_the_seed():
    _, vector = started(IMAGE_NET, (7, 6, 2))
    assert np.isfinite(vector).all()
    np.testing.assert_array_equal(started(IMAGE_NET, (7, 6, 2))[1], vector)
    assert (started(IMAGE_NET, (7, 6, 2), seed=2)[1] != vector).any()
    np.testing.assert_array_equal(started(IMAGE_NET, (7, 6, 2), np.float32)[1], vector.astype(np.float32))


@pytest.mark.parametrize(
    ("init", "deviation", "bound"),
    [("he", np.sqrt(2 / 300), np.inf), ("glorot", np.sqrt(2 / 400), np.sqrt(6 / 400)), ("uniform", 1 / 30, 300**-0.5)],
)
def test_initialisers_have_the_spread_they_promise(init, deviation, bound):
    _, vector = started([spec.Linear(units=100, init=init)], (300,))
    W, b = vector[:-100], vector[-100:]
    assert not b.any()
    assert W.std() == pytest.approx(deviation, rel=0.02)
    assert abs(W.mean()) < 5 * deviation / np.sqrt(W.size)
    assert np.abs(W).max() <= bound
    _, conv = started([spec.Conv2d(channels=100, kernel=5, init=init, bias=False)], (9, 9, 12))
    fan_in, fan_out = 300, 2500
    expected = {"he": np.sqrt(2 / fan_in), "glorot": np.sqrt(2 / (fan_in + fan_out)), "uniform": 1 / 30}[init]
    assert conv.std() == pytest.approx(expected, rel=0.02)


def test_gradients_below_the_lowest_parameters_are_not_computed():
    chain, vector = started([spec.Flatten(), spec.Tanh(), spec.Linear(units=2)], (2, 2))
    asked = []
    linear = chain._steps[-1].layer
    linear.input_gradient = lambda run, dy: asked.append(True)
    x = np.ones((1, 3, 2, 2))
    _, vectors = gradients(chain, vector, x, np.ones((1, 3, 2)), make_run(1, 3))
    assert not asked
    np.testing.assert_allclose(vectors[0][:8], 3 * np.tanh(1))


def test_a_model_without_parameters_still_runs():
    chain, vector = started([spec.Flatten()], (2, 2))
    assert vector.size == 0
    z, _ = gradients(chain, vector, np.ones((1, 3, 2, 2)), np.ones((1, 3, 4)), make_run(1, 3))
    assert z.shape == (1, 3, 4)
