"""Models as ONNX graphs, held to our own outputs by onnx's reference evaluator."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx.reference import ReferenceEvaluator

from dptrain.data.encoding import Affine, Encoding, Feature, Target
from dptrain.job import spec
from dptrain.layout import Array
from dptrain.nn.chain import build_chain
from dptrain.nn.layer import Workspace
from dptrain.onnx_graph import onnx_model
from tests.nn import cases
from tests.nn.passes import make_run

PLAIN = Target("numbers", 0, 1, ())
few = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def direct(shape: tuple[int, ...], **more: Any) -> Encoding:
    return Encoding(**{"raw_shape": shape, "sample_shape": shape, "integer": False, "target": PLAIN, **more})


def random_tensors(model: Any, rng: np.random.Generator) -> tuple[Array, dict[str, Array]]:
    vector = np.zeros(model.layout.size, model.dtype)
    tensors = model.layout.views(vector)
    for name, view in tensors.items():
        view[...] = rng.standard_normal(view.shape)
        if name.endswith("running_var"):
            view[...] = np.abs(view) + 0.5
    return vector, tensors


def both(layers: Any, encoding: Encoding, x: Array, dtype: Any, inputs: dict[str, Array]) -> tuple[Array, Array]:
    """What our model says of encoded rows, and what the graph says of the raw ones."""
    model = build_chain(layers, encoding.sample_shape, dtype)
    _, tensors = random_tensors(model, np.random.default_rng(5))
    run = make_run(1, len(x), training=False, dtype=dtype, workspace=Workspace())
    ours = encoding.decode_target(model.forward(tensors, x[None].copy(), run)[0][0].copy())
    graph = onnx.load(io.BytesIO(onnx_model(layers, encoding, tensors, dtype, {})))
    return ours, ReferenceEvaluator(graph).run(None, inputs)[0]


def agree(ours: Array, theirs: Array, dtype: Any) -> None:
    assert theirs.dtype == ours.dtype
    assert theirs.shape == ours.shape
    scale = max(1.0, float(np.abs(ours).max(initial=0)))
    tolerance = (2e-5 if dtype is np.float32 else 1e-12) * scale
    np.testing.assert_allclose(theirs, ours, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", sorted(cases.LAYERS))
@given(data=st.data())
@few
def test_every_layer_gives_our_outputs(kind: str, data: Any) -> None:
    layer, shape = data.draw(cases.LAYERS[kind])
    dtype = data.draw(st.sampled_from([np.float32, np.float64]))
    x = np.random.default_rng(data.draw(st.integers(0, 99))).standard_normal((3, *shape)).astype(dtype)
    agree(*both([layer], direct(shape), x, dtype, {"x": x}), dtype)


@st.composite
def models(draw: Any) -> tuple[list[Any], tuple[int, ...]]:
    """A convolutional net of random depth, then a perceptron."""
    side, channels = draw(st.integers(6, 10)), draw(st.integers(1, 3))
    between = st.lists(
        st.sampled_from(
            [spec.Relu(), spec.Gelu(), spec.BatchNorm(), spec.LayerNorm(), spec.Dropout(), spec.LeakyRelu()]
        ),
        max_size=3,
    )
    layers: list[Any] = [*draw(between)]
    for _ in range(draw(st.integers(1, 2))):
        layers += [spec.Conv2d(channels=draw(st.integers(1, 4)), padding="same"), *draw(between)]
        layers += draw(st.sampled_from([[], [spec.MaxPool2d()], [spec.AvgPool2d(stride=1)]]))
        layers += draw(between)
    layers += [spec.Flatten(), *draw(between), spec.Linear(units=draw(st.integers(1, 5)))]
    return layers, (side, side, channels)


@given(drawn=models(), dtype=st.sampled_from([np.float32, np.float64]))
@few
def test_random_models_give_our_outputs(drawn: Any, dtype: Any) -> None:
    layers, shape = drawn
    x = np.random.default_rng(1).standard_normal((4, *shape)).astype(dtype)
    agree(*both(layers, direct(shape), x, dtype, {"x": x}), dtype)


@pytest.mark.parametrize("units", [1, 4])
def test_tokens_are_looked_up(units: int) -> None:
    layers = [spec.Embedding(vocabulary=9, units=units), spec.LayerNorm(), spec.Flatten(), spec.Linear(units=2)]
    x = np.random.default_rng(0).integers(0, 9, (5, 6))
    agree(*both(layers, direct((6,), integer=True), x, np.float32, {"x": x}), np.float32)


def test_the_encoding_and_the_labels_unit_are_part_of_the_graph() -> None:
    rng = np.random.default_rng(2)
    encoding = Encoding(
        raw_shape=(48,),
        sample_shape=(4, 4, 3),
        integer=False,
        target=PLAIN,
        affine=Affine((1.0, 2.0, 3.0), (0.5, 0.25, 2.0)),
        label=Affine((100.0,), (0.1,)),
    )
    raw = rng.standard_normal((5, 48)).astype(np.float32)
    layers = [spec.Conv2d(channels=2), spec.Relu(), spec.Flatten(), spec.Linear(units=1)]
    ours, theirs = both(layers, encoding, encoding.encode(raw), np.float32, {"x": raw})
    agree(ours, theirs, np.float32)
    assert abs(float(ours.mean())) > 20


@pytest.mark.parametrize("onehot", [True, False])
@pytest.mark.parametrize("known", [True, False])
def test_a_table_with_text_takes_strings(onehot: bool, known: bool) -> None:
    words = ("blue", "grün", "red") if known else ()
    features = (
        Feature("colour", "text", None, words),
        Feature("width", "number", 2.5),
        Feature("shape", "text", None, ("", "round")),
        Feature("height", "number"),
    )
    width = 2 + ((len(words) + 2) if onehot else 2)
    affine = Affine((1.0, 0.0), (2.0, 1.0))
    encoding = Encoding((4,), (width,), False, PLAIN, affine, features=features, onehot=onehot)
    texts = {"colour": ["red", "grün", "none", ""], "shape": ["round", "", "square", "round"]}
    numbers = np.array([[1, 2], [np.nan, 3], [4, 5], [6, 7]], np.float32)
    raw = np.zeros((4, 4))
    raw[:, [1, 3]] = numbers
    raw[:, 0], raw[:, 2] = range(4), range(4)
    x = np.empty((4, width), np.float32)
    encoding.write(raw, x, encoding.lookup([texts["colour"], (), texts["shape"], ()]))
    inputs: dict[str, Array] = {"numbers": numbers}
    inputs |= {f"text:{name}": np.array(column, dtype=object) for name, column in texts.items()}
    agree(*both([spec.Linear(units=3)], encoding, x, np.float32, inputs), np.float32)


def test_a_wrong_graph_would_be_seen() -> None:
    x = np.random.default_rng(1).standard_normal((4, 3)).astype(np.float32)
    ours, theirs = both([spec.Gelu()], direct((3,)), x, np.float32, {"x": x})
    with pytest.raises(AssertionError):
        agree(ours, theirs + np.float32(1e-3), np.float32)


def test_classes_and_facts_are_told(tmp_path: Path) -> None:
    encoding = direct((3,), target=Target("classes", 2, 1, ("no", "yes")))
    model = build_chain([spec.Linear(units=2)], (3,), np.float32)
    _, tensors = random_tensors(model, np.random.default_rng(5))
    content = onnx_model([spec.Linear(units=2)], encoding, tensors, np.float32, {"weights_sha256": "abc"})
    told = {item.key: item.value for item in onnx.load_from_string(content).metadata_props}
    assert told == {"weights_sha256": "abc", "classes": '["no", "yes"]'}
