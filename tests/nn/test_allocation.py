"""In the steady state a step takes no new memory: every array is planned once, from the shapes."""

import tracemalloc

import numpy as np
import pytest

from dptrain.data.batches import Batches, Loaded, Reader
from dptrain.data.dataset import open_dataset
from dptrain.data.prepare import prepare
from dptrain.errors import ArithmeticMismatch
from dptrain.job import spec
from dptrain.nn.accumulate import Accumulator
from dptrain.nn.bound import BoundLayer
from dptrain.nn.chain import Chain, build_chain
from dptrain.nn.loss import make_loss
from dptrain.nn.products import maker
from dptrain.random import Purpose, stream

LIMIT = 16 << 10
"""Bytes of Python objects that a step may have at a time. Every array of the tests' rows is several times larger."""

ROWS = 64
IMAGES = {"conv2d", "max_pool2d", "avg_pool2d"}
LAYERS = {
    "linear": spec.Linear(units=512),
    "conv2d": spec.Conv2d(channels=6, padding="same"),
    "max_pool2d": spec.MaxPool2d(kernel=3, stride=2),
    "avg_pool2d": spec.AvgPool2d(),
    "embedding": spec.Embedding(vocabulary=50, units=16),
}


@pytest.fixture
def small_buffers():
    """numpy's own buffers, of a fixed length for each operation, made as short as they go: what is left is ours."""
    before = np.setbufsize(16)
    yield
    np.setbufsize(before)


def peak(accumulator, weights, plan, load):
    """Bytes by which a step goes beyond what is held between steps, after the first ones."""
    outbox = np.zeros((plan.slots, len(weights)), weights.dtype)
    with np.errstate(all="ignore"):
        for step in range(3):
            accumulator.accumulate(weights, plan, outbox, step, lambda lo, hi, step=step: load(step, lo, hi))
        tracemalloc.start()
        try:
            highest = []
            for step in range(3, 8):
                before = tracemalloc.get_traced_memory()[0]
                tracemalloc.reset_peak()
                accumulator.accumulate(weights, plan, outbox, step, lambda lo, hi, step=step: load(step, lo, hi))
                highest.append(tracemalloc.get_traced_memory()[1] - before)
        finally:
            tracemalloc.stop()
    # The first of them fills what Python keeps for itself, such as free lists.
    return max(highest[1:])


def peak_of(model, loss, x, y, k, padded=0):
    """That of a model over ``k`` shards at once, the last with some rows of padding."""
    rows = np.ones((k, ROWS), np.float32)
    rows[-1, ROWS - padded :] = 0
    loaded = Loaded(x, y, rows, (ROWS,) * (k - 1) + (ROWS - padded,))
    accumulator = Accumulator(model, loss, seed=1, shards=k, at_once=k)
    weights = np.zeros(model.layout.size, np.float32)
    model.initialise(weights, 1)
    return peak(accumulator, weights, accumulator.schedule(0, k), lambda step, lo, hi: loaded)


def batch(shape, k, integers=False):
    rng = stream(1, Purpose.PROBE)
    x = rng.integers(0, 50, (k, ROWS, *shape)) if integers else rng.standard_normal((k, ROWS, *shape), np.float32)
    return x, rng.integers(0, 4, (k, ROWS))


CROSS_ENTROPY = make_loss(spec.Loss(), "classes", 4, 1)


def chain_of(kind):
    """The layer above and below one with parameters, so that it has both gradients to make."""
    layer = LAYERS.get(kind) or spec.LAYERS[kind]()
    if kind == "embedding":
        layers, shape = [layer], (64,)
    elif kind in IMAGES:
        layers, shape = [spec.Conv2d(channels=5), layer, spec.Tanh(), layer], (16, 16, 2)
    else:
        layers, shape = [spec.Linear(units=512), layer, spec.LayerNorm(), layer], (512,)
    return build_chain([*layers, spec.Flatten(), spec.Linear(units=4)], shape), shape


@pytest.mark.usefixtures("small_buffers")
@pytest.mark.parametrize("padded", [0, 3])
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("kind", sorted(spec.LAYERS))
def test_a_layer_takes_no_new_memory(kind, k, padded):
    model, shape = chain_of(kind)
    x, y = batch(shape, k, kind == "embedding")
    assert x[0].nbytes >= 2 * LIMIT
    assert peak_of(model, CROSS_ENTROPY, x, y, k, padded) < LIMIT


@pytest.fixture
def by_mkl():
    """MKL's products, where it is installed; its own memory is its own, and kept by it from call to call."""
    try:
        return maker(spec.Arithmetic(products="mkl"))
    except ArithmeticMismatch as why:
        pytest.skip(str(why))


@pytest.mark.usefixtures("small_buffers")
@pytest.mark.parametrize("padded", [0, 3])
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_products_by_mkl_take_no_new_memory(kind, k, padded, by_mkl):
    if kind == "linear":
        layers, shape = [spec.Linear(units=512), spec.Relu(), spec.Linear(units=256)], (512,)
    else:
        layers, shape = (
            [spec.Conv2d(channels=16, padding="same"), spec.Conv2d(channels=16, padding="same")],
            (16, 16, 8),
        )
    model = build_chain([*layers, spec.Flatten(), spec.Linear(units=4)], shape, matmul=by_mkl)
    x, y = batch(shape, k)
    assert peak_of(model, CROSS_ENTROPY, x, y, k, padded) < LIMIT
    assert any(plan is not None for plan in by_mkl._plans.values())


@pytest.mark.usefixtures("small_buffers")
@pytest.mark.parametrize("k", [1, 3])
def test_what_a_convolution_takes_in_takes_no_new_memory(k):
    block = [spec.Conv2d(channels=6, padding="same"), spec.Relu(), spec.MaxPool2d()]
    model = build_chain([*block, *block, spec.Flatten(), spec.Linear(units=4)], (16, 16, 2))
    x, y = batch((16, 16, 2), k)
    assert peak_of(model, CROSS_ENTROPY, x, y, k) < LIMIT


LOSSES = {
    "cross entropy": spec.Loss(),
    "smoothed": spec.Loss(label_smoothing=0.1),
    "weighted": spec.Loss(class_weights=tuple(1 + i % 3 for i in range(512))),
    "weighted and smoothed": spec.Loss(label_smoothing=0.1, class_weights=tuple(1 + i % 3 for i in range(512))),
    "mse": spec.Loss(type="mse"),
    "huber": spec.Loss(type="huber"),
    "binary cross entropy": spec.Loss(type="binary_cross_entropy"),
}


@pytest.mark.usefixtures("small_buffers")
@pytest.mark.parametrize("padded", [0, 3])
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_takes_no_new_memory(name, k, padded):
    kind = "classes" if LOSSES[name].type == "auto" else "numbers"
    x, y = batch((8,), k)
    if kind == "numbers":
        y = np.abs(np.sin(np.arange(k * ROWS * 512.0))).astype(np.float32).reshape(k, ROWS, 512)
    loss = make_loss(LOSSES[name], kind, 512, 512)
    assert peak_of(build_chain([spec.Linear(units=512)], (8,)), loss, x, y, k, padded) < LIMIT


SOURCES = {
    "numbers as they are": {},
    "bytes to be normalised": {"normalise": "standard"},
    "numbers to be normalised": {"normalise": "standard"},
}


@pytest.mark.usefixtures("small_buffers")
@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("label", ["classes", "numbers"])
@pytest.mark.parametrize("source", SOURCES)
def test_reading_takes_no_new_memory(source, label, k, tmp_path):
    """Between the steps that compute the places of the next few thousand rows, a function of no array's size."""
    shards, n = 4, 1024
    rng = stream(2, Purpose.PROBE)
    x = rng.integers(0, 255, (n, 16, 16, 3), np.uint8) if "bytes" in source else rng.random((n, 768), np.float32)
    y = rng.integers(0, 4, n) if label == "classes" else rng.random((n, 4), np.float32)
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "y.npy", y)
    settings = spec.Data(source=str(tmp_path), validation=0.0, test=0.0, **SOURCES[source])
    data = open_dataset(prepare(settings, directory=tmp_path, seed=1, cache=None))
    model = build_chain([spec.Flatten(), spec.Linear(units=4)], data.sample_shape)
    loss = make_loss(spec.Loss(), data.target.kind, 4, 4)
    batches = Batches(data.train, seed=1, batch_size=shards * 16, shards=shards, shuffle=True, drop_last=False)
    y_shape, y_dtype = ((), np.int64) if label == "classes" else ((4,), np.float32)
    with Reader(batches, data.sample_shape, np.float32, y_shape, y_dtype, prefetch=False) as reader:
        accumulator = Accumulator(model, loss, seed=1, shards=shards, at_once=k)
        weights = np.zeros(model.layout.size, np.float32)
        assert peak(accumulator, weights, accumulator.schedule(0, shards), reader.load) < LIMIT
    assert data.train.rows_read == 8 * shards * 16


class Wasteful(BoundLayer):
    """Twice x, in new memory."""

    def forward(self, tensors, x, run):
        def backward(dy, grads, need_dx):
            return np.add(dy, dy, out=self.input_gradient(run, dy))

        return x + x, backward


@pytest.mark.usefixtures("small_buffers")
def test_a_layer_that_takes_new_memory_is_seen():
    x, y = batch((512,), 1)
    parts = [build_chain([spec.Linear(units=units)], (512,)) for units in (512, 4)]
    first, last = (part._steps[0].layer for part in parts)
    last.name = "last"
    wasteful = Wasteful("wasteful", (512,), (512,), np.float32)
    assert peak_of(Chain([first, last], (512,), np.float32), CROSS_ENTROPY, x, y, 1) < LIMIT
    found = peak_of(Chain([first, wasteful, last], (512,), np.float32), CROSS_ENTROPY, x, y, 1)
    assert x.nbytes <= found < x.nbytes + LIMIT
