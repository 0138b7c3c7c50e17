"""A trained model of layers as an ONNX model, from raw rows to outputs in their own unit (extra ``onnx``).

The graph begins with the encoding and ends with the labels' unit, so its inputs are what ``predict`` takes. Arrays and
tables of numbers are one input ``x`` of shape (rows, *raw_shape). A table with text has an input ``numbers`` (rows,
columns of numbers, in their order), where it has such columns, and for each other column an input of strings,
``text:NAME``. The output is ``y``: logits, or numbers in the labels' own unit. What is no function of one row stays
outside: leaving rows out, and an integer beyond an embedding's table, which is an error of ours and undefined there.

Operators and their attributes as in https://onnx.ai/onnx/operators/, opset 19. An attribute is a float32, which is too
coarse for a model of float64: what has an eps or a slope is put together from simpler operators, as runtimes expect it.
"""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from dptrain.data.encoding import Affine, Encoding
from dptrain.errors import UsageError
from dptrain.job import spec
from dptrain.layout import Array
from dptrain.nn.activation import Gelu
from dptrain.nn.chain import LAYERS
from dptrain.nn.convolution import Conv2d

OPSET, IR = 19, 9
"""The first operator set that compares strings, and the file version that goes with it."""

ELEMENTWISE = {"relu": "Relu", "tanh": "Tanh", "sigmoid": "Sigmoid"}


def onnx_model(
    layers: Sequence[spec.Layer],
    encoding: Encoding,
    tensors: Mapping[str, Array],
    dtype: npt.DTypeLike,
    facts: Mapping[str, Any],
) -> bytes:
    """The model's file. ``facts`` and the classes' names go into its metadata.

    Raises UsageError where the extra is not installed.
    """
    try:
        import onnx
    except ModuleNotFoundError:
        raise UsageError(
            "export to ONNX", expected="the package onnx", found="none", cure="pip install 'dptrain[onnx]'"
        ) from None
    graph = _Graph(onnx, np.dtype(dtype))
    graph.encode(encoding)
    shape = encoding.sample_shape
    for i, settings in enumerate(layers):
        shape = graph.layer(settings, f"layers.{i}.{settings.type}", shape, tensors)
    graph.decode(encoding.label, shape)
    model = graph.model()
    names = {"classes": list(encoding.target.names)} if encoding.target.names else {}
    onnx.helper.set_model_props(model, {key: _text(value) for key, value in {**facts, **names}.items()})
    onnx.checker.check_model(model, full_check=True)
    return bytes(model.SerializeToString())


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


class _Graph:
    """A graph under construction. ``at`` is the value that the next operator takes.

    ONNX has an image's channels first, we have them last: ``first`` says how the value lies, and it is turned only
    where the next layer wants it otherwise.
    """

    def __init__(self, onnx: Any, dtype: np.dtype[Any]) -> None:
        self.onnx, self.dtype = onnx, dtype
        self.at = ""
        self.first = False
        self.integer = False
        self._inputs: list[Any] = []
        self._outputs: list[Any] = []
        self._nodes: list[Any] = []
        self._constants: list[Any] = []

    def encode(self, encoding: Encoding) -> None:
        """Inputs, and all between them and the first layer."""
        self.integer = encoding.integer
        texts = [feature for feature in encoding.features if feature.kind == "text"]
        kind = np.dtype(np.int64) if encoding.integer else self.dtype
        if not texts:
            self.at = self._input("x", kind, encoding.raw_shape)
            self._fill(encoding)
            if encoding.raw_shape != encoding.sample_shape:
                self._reshape(encoding.sample_shape)
            self._affine(encoding.affine)
            return
        columns = []
        numbers = len(encoding.features) - len(texts)
        if numbers:
            self.at = self._input("numbers", kind, (numbers,))
            self._fill(encoding)
            self._affine(encoding.affine)
            columns.append(self.at)
        for feature in texts:
            text = self._input(f"text:{feature.name}", np.dtype(np.str_), ())
            if feature.vocabulary or not encoding.onehot:
                columns.append(self._category(text, feature.vocabulary, encoding.onehot, kind))
        self.at = self._node("Concat", *columns, axis=1)
        self._reshape(encoding.sample_shape)

    def layer(
        self, settings: spec.Layer, name: str, shape: tuple[int, ...], tensors: Mapping[str, Array]
    ) -> tuple[int, ...]:
        """Add a layer that takes ``shape``; what it gives."""
        if settings.type == "dropout":
            return shape
        if self.integer and settings.type not in ("embedding", "flatten"):
            self._cast(self.dtype)
        bound = LAYERS[settings.type](settings, name, shape, self.dtype)
        names = [key for key, _ in bound.parameters] + [key for key, *_ in bound.buffers]
        own = {key: tensors[f"{name}.{key}"] for key in names}
        if isinstance(settings, (spec.Conv2d, spec.MaxPool2d, spec.AvgPool2d)):
            self._channels(first=True)
            self._window(settings, bound, shape, own)
        elif isinstance(settings, spec.BatchNorm):
            self._batch_norm(settings, own)
        elif isinstance(settings, spec.LeakyRelu):
            self._then("Max", self._node("Mul", self.at, self._number(settings.slope)))
        elif isinstance(settings, spec.Gelu):
            self._gelu()
        elif settings.type in ELEMENTWISE:
            self._then(ELEMENTWISE[settings.type])
        else:
            self._channels(first=False)
            self._last_axis(settings, own, bound.output_shape)
        return bound.output_shape

    def decode(self, label: Affine, shape: tuple[int, ...]) -> None:
        """From the last layer to the output ``y``."""
        self._channels(first=False)
        if self.integer:
            self._cast(self.dtype)
        if not label.identity:
            self._then("Div", self._constant(np.asarray(label.scale, self.dtype)))
            self._then("Add", self._constant(np.asarray(label.shift, self.dtype)))
        self._nodes.append(self.onnx.helper.make_node("Identity", [self.at], ["y"]))
        self._outputs.append(self._value("y", self.dtype, shape))

    def model(self) -> Any:
        """What was built, whole."""
        helper = self.onnx.helper
        graph = helper.make_graph(self._nodes, "dptrain", self._inputs, self._outputs, self._constants)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], producer_name="dptrain")
        model.ir_version = IR
        return model

    def _window(self, settings: Any, bound: Any, shape: tuple[int, ...], own: Mapping[str, Array]) -> None:
        kernel = [settings.kernel] * 2
        if isinstance(bound, Conv2d):
            top, left = bound.top, bound.left
            bottom, right = bound.padded[0] - shape[0] - top, bound.padded[1] - shape[1] - left
            tensors = [self._constant(np.ascontiguousarray(own["W"].transpose(3, 2, 0, 1)))]
            tensors += [self._constant(own["b"])] if "b" in own else []
            pads, strides = [top, left, bottom, right], [bound.stride] * 2
            self._then("Conv", *tensors, kernel_shape=kernel, strides=strides, pads=pads)
            return
        operator = "MaxPool" if isinstance(settings, spec.MaxPool2d) else "AveragePool"
        self._then(operator, kernel_shape=kernel, strides=[bound.stride] * 2)

    def _batch_norm(self, settings: spec.BatchNorm, own: Mapping[str, Array]) -> None:
        factor = own["gamma"] / np.sqrt(own["running_var"] + self.dtype.type(settings.eps))
        for operator, vector in (("Sub", own["running_mean"]), ("Mul", factor), ("Add", own["beta"])):
            self._then(operator, self._constant(vector.reshape(-1, 1, 1) if self.first else vector))

    def _gelu(self) -> None:
        x = self.at
        self._then("Mul", x)
        self._then("Mul", self._number(Gelu.CUBIC))
        self._then("Add", self._number(1))
        self._then("Mul", x)
        self._then("Mul", self._number(Gelu.INNER))
        self._then("Tanh")
        self._then("Add", self._number(1))
        self._then("Mul", self._number(0.5))
        self._then("Mul", x)

    def _layer_norm(self, eps: float, own: Mapping[str, Array]) -> None:
        axis = self._constant(np.array([-1], np.int64))
        self._then("Sub", self._node("ReduceMean", self.at, axis, keepdims=1))
        variance = self._node("ReduceMean", self._node("Mul", self.at, self.at), axis, keepdims=1)
        self._then("Div", self._node("Sqrt", self._node("Add", variance, self._number(eps))))
        self._then("Mul", self._constant(own["gamma"]))
        self._then("Add", self._constant(own["beta"]))

    def _last_axis(self, settings: spec.Layer, own: Mapping[str, Array], shape: tuple[int, ...]) -> None:
        if isinstance(settings, spec.Linear):
            self._then("MatMul", self._constant(own["W"]))
            if "b" in own:
                self._then("Add", self._constant(own["b"]))
        elif isinstance(settings, spec.LayerNorm):
            self._layer_norm(settings.eps, own)
        elif isinstance(settings, spec.Flatten):
            self._reshape(shape)
        elif isinstance(settings, spec.Embedding):
            if not self.integer:
                self._cast(np.dtype(np.int64))
            self.at, self.integer = self._node("Gather", self._constant(own["W"]), self.at, axis=0), False
        else:
            raise NotImplementedError(settings.type)

    def _fill(self, encoding: Encoding) -> None:
        fills = [feature.fill for feature in encoding.features if feature.kind == "number"]
        if any(fill is not None for fill in fills):
            values = np.array([np.nan if fill is None else fill for fill in fills], self.dtype)
            missing = self._node("IsNaN", self.at)
            self.at = self._node("Where", missing, self._constant(values), self.at)

    def _affine(self, affine: Affine) -> None:
        if any(affine.shift):
            self._then("Sub", self._constant(np.asarray(affine.shift, self.dtype)))
        if any(value != 1 for value in affine.scale):
            self._then("Mul", self._constant(np.asarray(affine.scale, self.dtype)))

    def _category(self, text: str, vocabulary: Sequence[str], onehot: bool, kind: np.dtype[Any]) -> str:
        """(rows,) strings -> (rows, words) of 0 and 1, or (rows, 1) numbers, -1 for an unknown word."""
        column = self._node("Unsqueeze", text, self._constant(np.array([1], np.int64)))
        words = vocabulary or ("",)
        same = self._cast_of(self._node("Equal", column, self._strings(words)), kind)
        if onehot:
            return same
        # Where no word is known every one is unknown, the empty one too.
        numbers = np.arange(1, len(words) + 1, dtype=kind).reshape(-1, 1) * bool(vocabulary)
        numbers = numbers.astype(kind)
        return self._node("Sub", self._node("MatMul", same, self._constant(numbers)), self._constant(np.ones(1, kind)))

    def _channels(self, *, first: bool) -> None:
        if self.first != first:
            self._then("Transpose", perm=[0, 3, 1, 2] if first else [0, 2, 3, 1])
            self.first = first

    def _reshape(self, shape: tuple[int, ...]) -> None:
        self._then("Reshape", self._constant(np.array([-1, *shape], np.int64)))

    def _cast(self, dtype: np.dtype[Any]) -> None:
        self.at, self.integer = self._cast_of(self.at, dtype), dtype.kind == "i"

    def _cast_of(self, value: str, dtype: np.dtype[Any]) -> str:
        return self._node("Cast", value, to=self.onnx.helper.np_dtype_to_tensor_dtype(dtype))

    def _then(self, operator: str, *more: str, **attributes: Any) -> None:
        self.at = self._node(operator, self.at, *more, **attributes)

    def _node(self, operator: str, *inputs: str, **attributes: Any) -> str:
        output = f"{operator}.{len(self._nodes)}"
        self._nodes.append(self.onnx.helper.make_node(operator, list(inputs), [output], **attributes))
        return output

    def _constant(self, values: Array) -> str:
        name = f"constant.{len(self._constants)}"
        self._constants.append(self.onnx.numpy_helper.from_array(np.array(values, order="C"), name))
        return name

    def _number(self, value: float) -> str:
        return self._constant(np.array(value, self.dtype))

    def _strings(self, words: Sequence[str]) -> str:
        name = f"constant.{len(self._constants)}"
        kind = self.onnx.TensorProto.STRING
        encoded = [word.encode() for word in words]
        self._constants.append(self.onnx.helper.make_tensor(name, kind, (len(words),), encoded))
        return name

    def _input(self, name: str, dtype: np.dtype[Any], shape: tuple[int, ...]) -> str:
        self._inputs.append(self._value(name, dtype, shape))
        return name

    def _value(self, name: str, dtype: np.dtype[Any], shape: tuple[int, ...]) -> Any:
        string = self.onnx.TensorProto.STRING
        kind = string if dtype.kind == "U" else self.onnx.helper.np_dtype_to_tensor_dtype(dtype)
        assert math.prod(shape) or not shape
        return self.onnx.helper.make_tensor_value_info(name, kind, ["rows", *shape])
