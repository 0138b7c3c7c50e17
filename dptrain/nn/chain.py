"""A model as a list of layers."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dptrain.errors import ModelError
from dptrain.job import spec
from dptrain.layout import Layout
from dptrain.nn.activation import Gelu, LeakyRelu, Relu, Sigmoid, Tanh
from dptrain.nn.bound import BoundLayer, Misfit
from dptrain.nn.convolution import Conv2d
from dptrain.nn.dropout import Dropout
from dptrain.nn.embedding import Embedding
from dptrain.nn.layer import Array, LayerBackward, ModelBackward, Pass, Sink
from dptrain.nn.linear import Flatten, Linear
from dptrain.nn.normalisation import BatchNorm, LayerNorm
from dptrain.nn.pooling import AvgPool2d, MaxPool2d
from dptrain.nn.products import Matmul, numpy_matmul
from dptrain.phases import Phase
from dptrain.random import Purpose, stream

LAYERS: dict[str, Callable[..., BoundLayer]] = {
    "linear": Linear,
    "conv2d": Conv2d,
    "max_pool2d": MaxPool2d,
    "avg_pool2d": AvgPool2d,
    "flatten": Flatten,
    "relu": Relu,
    "leaky_relu": LeakyRelu,
    "gelu": Gelu,
    "tanh": Tanh,
    "sigmoid": Sigmoid,
    "batch_norm": BatchNorm,
    "layer_norm": LayerNorm,
    "embedding": Embedding,
}


@dataclass(frozen=True, slots=True)
class LayerSummary:
    """One line of a model's description; ``parameters`` counts what the optimizer updates."""

    name: str
    output_shape: tuple[int, ...]
    parameters: int


@dataclass(frozen=True, slots=True)
class _Step:
    """A layer, its place in the job's list, and its tensors' names: the layer's own and the model's."""

    layer: BoundLayer
    index: int
    names: tuple[tuple[str, str], ...]


class Chain:
    """Layers one after another; implements ``dptrain.nn.layer.Model``.

    Each layer's backward runs between opening and closing its tensors in the sink, last layer first. The gradient of
    the input of the lowest layer with parameters, and of all below it, is never computed.
    """

    def __init__(self, layers: Sequence[BoundLayer], sample_shape: tuple[int, ...], dtype: npt.DTypeLike) -> None:
        self.sample_shape = sample_shape
        self.dtype = np.dtype(dtype)
        self.output_shape = layers[-1].output_shape if layers else sample_shape
        self._summary = [_summarise(layer) for layer in layers]
        steps = [_Step(layer, i, _names(layer)) for i, layer in enumerate(layers)]
        self.layout = Layout(
            ((f"{s.layer.name}.{name}", shape) for s in steps for name, shape in s.layer.parameters),
            ((f"{s.layer.name}.{name}", shape, m) for s in steps for name, shape, m in s.layer.buffers),
        )
        first = next((s.layer for s in steps if not isinstance(s.layer, Flatten)), None)
        self.input_dtype = np.dtype(np.int64) if isinstance(first, Embedding) else self.dtype
        self._steps = _taken_in(_pool_first(steps))
        self._lowest = next((i for i, s in enumerate(self._steps) if s.names), len(self._steps))
        _plan_memory([s.layer for s in self._steps], id(self))
        self._known: list[tuple[Mapping[str, Array], list[dict[str, Array]]]] = []

    def summary(self) -> list[LayerSummary]:
        """Every layer of the job, in its order."""
        return list(self._summary)

    def initialise(self, vector: Array, seed: int) -> None:
        """Fill a flat vector of ``layout.size`` elements: each layer from its own stream, rounded from float64."""
        tensors = self.layout.views(vector)
        for step in self._steps:
            rng = stream(seed, Purpose.INITIALISE, step.index)
            step.layer.initialise({name: tensors[full] for name, full in step.names}, rng)

    def forward(self, tensors: Mapping[str, Array], x: Array, run: Pass) -> tuple[Array, ModelBackward]:
        """(k, b, *sample_shape) -> (k, b, *output_shape), and the backward of a training pass.

        z lies in the workspace: it is good until the workspace's next pass.
        """
        backwards: list[LayerBackward] = []
        begin = run.phases.begin
        phase = Phase.FORWARD if run.training else Phase.EVALUATION
        for step, own in zip(self._steps, self._own(tensors), strict=True):
            begin(phase, step.layer.name)
            x, back = step.layer.forward(own, x, run)
            backwards.append(back)

        def backward(dz: Array, sink: Sink) -> None:
            dy: Array | None = dz
            for i in range(len(backwards) - 1, self._lowest - 1, -1):
                assert dy is not None, f"{self._steps[i].layer.name} has no gradient to work from"
                begin(Phase.BACKWARD, self._steps[i].layer.name)
                names = self._steps[i].names
                grads = {name: sink.open(full) for name, full in names}
                dy = backwards[i](dy, grads, i > self._lowest)
                for _, full in names:
                    sink.close(full)

        return x, backward

    def _own(self, tensors: Mapping[str, Array]) -> list[dict[str, Array]]:
        """Each step's tensors by their layer's own names; those of the last two mappings, two sides, are remembered."""
        for known, own in self._known:
            if known is tensors:
                return own
        own = [{name: tensors[full] for name, full in step.names} for step in self._steps]
        self._known = [*self._known[-1:], (tensors, own)]
        return own


def build_chain(
    layers: Sequence[spec.Layer],
    sample_shape: Sequence[int],
    dtype: npt.DTypeLike = np.float32,
    matmul: Matmul = numpy_matmul,
) -> Chain:
    """The model that the job's layers make over samples of ``sample_shape``, with products by ``matmul``.

    ModelError, naming both layers, where one doesn't fit the shape that comes from the one before.
    """
    shape = tuple(sample_shape)
    bound: list[BoundLayer] = []
    for i, settings in enumerate(layers):
        try:
            layer = _bind(settings, i, shape, dtype, bound)
        except Misfit as misfit:
            before = f"layer {i - 1} ({layers[i - 1].type})" if i else "the data"
            raise ModelError(
                f"layer {i} ({_describe(settings)}) after {before}",
                expected=misfit.expected,
                found=str(shape),
                cure=misfit.cure,
            ) from None
        layer.matmul = matmul
        bound.append(layer)
        shape = layer.output_shape
    return Chain(bound, tuple(sample_shape), dtype)


def _bind(
    settings: spec.Layer, i: int, shape: tuple[int, ...], dtype: npt.DTypeLike, below: Sequence[BoundLayer]
) -> BoundLayer:
    name = f"layers.{i}.{settings.type}"
    if isinstance(settings, spec.Dropout):
        return Dropout(settings, name, shape, dtype, i)
    if isinstance(settings, spec.Embedding) and not all(isinstance(layer, Flatten) for layer in below):
        raise Misfit("the integers of the data", "make the embedding the first layer")
    return LAYERS[settings.type](settings, name, shape, dtype)


def _describe(settings: spec.Layer) -> str:
    sizes: Any = {"units": "units", "channels": "channels", "kernel": "kernel"}
    found = [f"{getattr(settings, key)} {word}" for key, word in sizes.items() if hasattr(settings, key)]
    return ", ".join([settings.type, *found[:1]])


def _names(layer: BoundLayer) -> tuple[tuple[str, str], ...]:
    own = [name for name, _ in layer.parameters] + [name for name, *_ in layer.buffers]
    return tuple((name, f"{layer.name}.{name}") for name in own)


def _summarise(layer: BoundLayer) -> LayerSummary:
    count = sum(int(np.prod(shape)) for _, shape in layer.parameters)
    return LayerSummary(layer.name, layer.output_shape, count)


def _pool_first(steps: Sequence[_Step]) -> list[_Step]:
    """Where a relu is followed by a max pooling, pool first: the same values and gradients for a quarter of the work.

    The maximum of max(x, 0) is max(maximum of x, 0), and both give the gradient to the same pixel, or to none.
    """
    order = list(steps)
    for i in range(len(order) - 1):
        relu, pool = order[i].layer, order[i + 1].layer
        if isinstance(relu, Relu) and isinstance(pool, MaxPool2d):
            relu.input_shape = relu.output_shape = pool.output_shape
            order[i], order[i + 1] = order[i + 1], order[i]
    return order


def _taken_in(steps: Sequence[_Step]) -> list[_Step]:
    """Without the poolings and relus whose work the convolution before them does."""
    left: list[_Step] = []
    for step in steps:
        before = left[-1].layer if left else None
        if not (isinstance(before, Conv2d) and before.take_in(step.layer)):
            left.append(step)
    return left


def _plan_memory(layers: Sequence[BoundLayer], key: int) -> None:
    """Decide what each layer may overwrite, and give two alternating places to the gradients between layers."""
    for i, layer in enumerate(layers):
        below = layers[:i]
        while below and below[-1].hands_through and not below[-1].keeps_output:
            below = below[:-1]
        # Without a layer that made it, the input is the caller's batch.
        layer.overwrites_input = layer.can_overwrite and bool(below) and not below[-1].keeps_output
    place: int | None = None
    for layer in reversed(layers):
        if layer.hands_back:
            continue
        # The gradient that comes from the loss is the caller's; every other one lies in a place of the chain.
        layer.overwrites_gradient = layer.can_overwrite and place is not None
        if not layer.overwrites_gradient:
            place = 0 if place is None else 1 - place
            layer.dx_key = (key, "dx", place)
