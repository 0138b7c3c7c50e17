import numpy as np
import pytest

from dptrain.errors import ModelError
from dptrain.job import spec
from dptrain.nn.chain import build_chain
from dptrain.nn.own import Own, digest_of, load_python
from dptrain.random import Purpose, stream

from .passes import Collected, make_run


class Affine:
    """y = x W + b by hand, with noise on y while training."""

    noise = 0.0

    def parameters(self, rng):
        return {"W": rng.standard_normal((3, 2)), "b": np.zeros(2)}

    def forward(self, params, x, rng):
        y = x @ params["W"] + params["b"]
        if rng is not None and self.noise:
            y = y + self.noise * rng.standard_normal(y.shape)

        def backward(dy):
            return {"W": x.T @ dy, "b": dy.sum(axis=0)}

        return y, backward


class Batched(Affine):
    batched = True

    def forward(self, params, x, rngs):
        y = x @ params["W"] + params["b"]
        if rngs is not None and self.noise:
            y = y + self.noise * np.stack([rng.standard_normal(part.shape) for rng, part in zip(rngs, y, strict=True)])
        return y, lambda dy: {"W": x.swapaxes(1, 2) @ dy, "b": dy.sum(axis=1)}


def passed(model, x, dz, vector=None, **run):
    if vector is None:
        vector = np.zeros(model.layout.size)
        model.initialise(vector, 1)
    z, backward = model.forward(model.layout.views(vector), x, make_run(*x.shape[:2], **run))
    sink = Collected(model.layout, len(x), np.float64)
    backward(dz, sink)
    assert set(sink.closed) == set(model.layout.entries)
    return z.copy(), sink.vectors


@pytest.mark.parametrize("kind", [Affine, Batched])
def test_a_model_of_ones_own_equals_the_layer_it_copies(kind):
    rng = stream(1, Purpose.PROBE)
    x, dz = rng.standard_normal((3, 4, 3)), rng.standard_normal((3, 4, 2))
    own, chain = Own(kind(), (3,), np.float64), build_chain([spec.Linear(units=2)], (3,), np.float64)
    assert own.output_shape == (2,)
    vector = rng.standard_normal(own.layout.size)
    for mine, theirs in zip(passed(own, x, dz, vector), passed(chain, x, dz, vector), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-12)


@pytest.mark.parametrize("kind", [Affine, Batched])
def test_its_noise_is_keyed_by_step_and_shard_and_off_when_evaluating(kind):
    model = kind()
    model.noise = 1.0
    own = Own(model, (3,), np.float64)
    x, dz = np.zeros((3, 4, 3)), np.zeros((3, 4, 2))
    together, _ = passed(own, x, dz)
    for j in range(3):
        one, _ = passed(own, x[:1], dz[:1], shards=[j])
        assert one.tobytes() == together[j].tobytes()
    expected = stream(7, Purpose.MODEL, 3, 1).standard_normal((4, 2))
    np.testing.assert_array_equal(together[1], expected)
    assert (passed(own, x, dz, step=4)[0] != together).all()
    assert not passed(own, x, dz, training=False)[0].any()


def test_its_start_is_a_function_of_the_seed():
    own = Own(Affine(), (3,), np.float32)
    first, again, other = np.zeros((3, own.layout.size), np.float32)
    own.initialise(first, 5)
    own.initialise(again, 5)
    own.initialise(other, 6)
    assert first.tobytes() == again.tobytes() != other.tobytes()


def test_its_parameters_are_read_only():
    class Writing(Affine):
        def forward(self, params, x, rng):
            params["W"][...] = 0
            return super().forward(params, x, rng)

    with pytest.raises(ValueError, match="read-only"):
        Own(Writing(), (3,), np.float64)


def broken(**methods):
    return type("Broken", (Affine,), methods)()


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (object(), "model object: expected a method 'parameters', found none"),
        (broken(parameters=lambda self, rng: [1]), "expected parameters to return a dict"),
        (broken(parameters=lambda self, rng: {}), "expected parameters to return a dict"),
        (broken(parameters=lambda self, rng: {"W": np.array(["x"])}), "the parameter 'W' of real numbers"),
        (broken(forward=lambda self, p, x, rng: x), r"expected forward to return \(y, backward\), found ndarray"),
        (broken(forward=lambda self, p, x, rng: (x[0], len)), r"an output y of shape \(2,\) and more, found \(3,\)"),
    ],
)
def test_what_it_hands_back_is_checked_at_once(model, message):
    with pytest.raises(ModelError, match=message):
        Own(model, (3,), np.float64)


@pytest.mark.parametrize(
    ("gradients", "message"),
    [
        ({"W": np.zeros((3, 2))}, r"expected gradients of \['W', 'b'\], found \['W'\]"),
        ({"W": np.zeros((2, 3)), "b": np.zeros(2)}, r"the gradient of 'W' of shape \(3, 2\), found \(2, 3\)"),
        (
            {"W": np.zeros((3, 2), complex), "b": np.zeros(2)},
            "the gradient of 'W' of real numbers, found dtype complex",
        ),
        (None, "expected backward to return a dict, found NoneType"),
    ],
)
def test_its_gradients_are_checked(gradients, message):
    model = broken(forward=lambda self, p, x, rng: (x @ p["W"] + p["b"], lambda dy: gradients))
    with pytest.raises(ModelError, match=message):
        passed(Own(model, (3,), np.float64), np.zeros((1, 4, 3)), np.zeros((1, 4, 2)))


def test_an_exception_of_its_own_goes_through():
    def fails(self, params, x, rng):
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        Own(broken(forward=fails), (3,), np.float64)


SOURCE = """
from dataclasses import dataclass

@dataclass
class Model:
    units: int

def build(units=3):
    return Model(units)
"""


def test_a_python_file_is_built_with_the_options_and_digested(tmp_path):
    (tmp_path / "my_model.py").write_text(SOURCE)
    model, digest = load_python("my_model.py:build", tmp_path, {"units": 5})
    assert model.units == 5
    assert digest.startswith("sha256:")
    assert load_python("my_model.py:build", tmp_path, {})[1] == digest
    (tmp_path / "my_model.py").write_text(SOURCE.replace("units=3", "units=4"))
    changed, other = load_python("my_model.py:build", tmp_path, {})
    assert changed.units == 4
    assert other != digest
    assert not (tmp_path / "__pycache__").exists()


@pytest.mark.parametrize(
    ("entry", "options", "message"),
    [
        ("my_model.py", {}, 'expected "file.py:function"'),
        ("none.py:build", {}, "expected a readable file .*none.py, found No such file"),
        ("my_model.py:make", {}, "expected a function 'make'"),
        ("my_model.py:build", {"depth": 1}, "found got an unexpected keyword argument 'depth'"),
        ("broken.py:build", {}, "broken.py to be imported, found ZeroDivisionError: division by zero"),
        ("syntax.py:build", {}, "syntax.py to be imported, found SyntaxError"),
    ],
)
def test_a_python_file_that_cannot_be_used_is_named(tmp_path, entry, options, message):
    (tmp_path / "my_model.py").write_text(SOURCE)
    (tmp_path / "broken.py").write_text("1 / 0")
    (tmp_path / "syntax.py").write_text("def")
    with pytest.raises(ModelError, match=message) as caught:
        load_python(entry, tmp_path, options)
    assert (caught.value.__cause__ is None) == (entry in ("my_model.py", "my_model.py:make"))


def test_objects_are_told_apart_by_their_source():
    assert digest_of(Affine()) == digest_of(Affine()) != digest_of(Batched())
