"""Every layer, over shapes that hypothesis chooses."""

from hypothesis import strategies as st

from dptrain.job import spec

sides = st.integers(1, 6)
widths = st.integers(1, 7)
flat = st.tuples(widths)
sequences = st.tuples(st.integers(1, 4), widths)
images = st.tuples(sides, sides, st.sampled_from([1, 2, 4, 5, 6]))
anything = st.one_of(flat, sequences, images)


@st.composite
def linear(draw):
    shape = draw(st.one_of(flat, sequences))
    return spec.Linear(units=draw(widths), bias=draw(st.booleans())), shape


@st.composite
def conv2d(draw):
    height, width, channels = draw(images)
    padding = draw(st.sampled_from([0, 1, 2, "same"]))
    room = min(height, width) + (2 * padding if isinstance(padding, int) else 0)
    layer = spec.Conv2d(
        channels=draw(st.integers(1, 5)),
        kernel=draw(st.integers(1, min(4, room))),
        stride=draw(st.integers(1, 3)),
        padding=padding,
        bias=draw(st.booleans()),
    )
    return layer, (height, width, channels)


@st.composite
def pool(draw, kind):
    height, width, channels = draw(images)
    kernel = draw(st.integers(1, min(3, height, width)))
    return kind(kernel=kernel, stride=draw(st.integers(0, 3))), (height, width, channels)


@st.composite
def plain(draw, settings):
    return settings, draw(anything)


LAYERS = {
    "linear": linear(),
    "conv2d": conv2d(),
    "max_pool2d": pool(spec.MaxPool2d),
    "avg_pool2d": pool(spec.AvgPool2d),
    "flatten": plain(spec.Flatten()),
    "relu": plain(spec.Relu()),
    "leaky_relu": plain(spec.LeakyRelu(slope=0.2)),
    "gelu": plain(spec.Gelu()),
    "tanh": plain(spec.Tanh()),
    "sigmoid": plain(spec.Sigmoid()),
    "dropout": plain(spec.Dropout(rate=0.3)),
    "batch_norm": plain(spec.BatchNorm()),
    "layer_norm": plain(spec.LayerNorm(eps=1e-3)),
}
