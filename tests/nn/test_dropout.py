import numpy as np

from dptrain.job import spec
from dptrain.random import Purpose, bits

from .passes import bind, make_run, run_layer

SIZE = 5_001


def mask_of(layer, **run):
    x = np.ones((1, 2, SIZE), np.float32)
    return run_layer(layer, {}, x, None, make_run(1, 2, dtype=np.float32, **run)).y


def test_a_mask_is_a_function_of_seed_step_shard_and_layer():
    layer = bind(spec.Dropout(rate=0.25), (SIZE,), np.float32)
    mask = mask_of(layer, shards=[5], step=9)
    raw = bits(7, Purpose.DROPOUT, 9, 5, layer.index).random_raw(SIZE).view(np.uint16)[: 2 * SIZE]
    expected = np.where(raw < 0.75 * 2**16, np.float32(1 / 0.75), 0).reshape(mask.shape)
    np.testing.assert_array_equal(mask, expected)
    assert (mask_of(layer, shards=[6], step=9) != mask).any()
    assert (mask_of(layer, shards=[5], step=10) != mask).any()
    np.testing.assert_array_equal(mask_of(layer, shards=[5], step=9, counts=[1]), mask)


def test_the_share_of_zeros_is_the_rate_and_the_mean_stays():
    for rate in (0.1, 0.5, 0.9):
        mask = mask_of(bind(spec.Dropout(rate=rate), (SIZE,), np.float32))
        spread = 5 * np.sqrt(rate * (1 - rate) / mask.size)
        assert abs((mask == 0).mean() - rate) < spread
        assert abs(mask.mean() - 1) < spread / (1 - rate)


def test_without_training_or_rate_it_is_x_itself():
    x = np.ones((1, 2, 3), np.float32)
    for rate, training in ((0.5, False), (0.0, True)):
        layer = bind(spec.Dropout(rate=rate), (3,), np.float32)
        y, _ = layer.forward({}, x, make_run(1, 2, training=training))
        assert y is x
