"""A model of a user's own: three functions over plain arrays, one shard at a time."""

import hashlib
import inspect
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from dptrain.errors import ModelError
from dptrain.layout import Layout
from dptrain.nn.layer import Array, ModelBackward, Pass, Sink
from dptrain.random import Purpose, stream

OwnBackward = Callable[[Array], Mapping[str, Array]]
"""dy -> the gradient of every parameter, by name."""


class OwnModel(Protocol):
    """What a model of one's own has to offer. numpy alone is enough; nothing of dptrain need be imported.

    ``forward`` is called once for each shard of a batch. x is (rows, *sample), rows of padding included (zeros, at
    the end; dy is zero there); y is (rows, *output). ``rng`` is a ``numpy.random.Generator`` that is a function of
    the job's seed, the step and the shard: draw from it and from nothing else, and the result is the same wherever
    the shard is computed. It is None when evaluating, so that dropout and the like are off. The parameters are
    read-only views. Arrays handed back are copied before the next call.

    ``backward(dy)`` gives, for every parameter, the gradient of sum(dy * y): a sum over the rows, not their mean.

    Two attributes are optional. ``batched = True``: k shards at a time; x is (k, rows, *sample), y alike, rng a list
    of k generators or None, gradients are (k, *shape); no number of a shard may depend on the others.
    ``input_dtype``: what x is converted to, where it isn't the job's floating-point type.
    """

    def parameters(self, rng: np.random.Generator) -> Mapping[str, Array]:
        """The initial values by name, always the same names and shapes, the values a function of rng alone."""

    def forward(self, params: Mapping[str, Array], x: Array, rng: Any) -> tuple[Array, OwnBackward]:
        """y and its backward."""


class Own:
    """Makes a model of a user's own into a ``dptrain.nn.layer.Model``.

    ModelError, naming the model, the tensor, and the shapes expected and found, where it hands back something else
    than it should; an exception in the user's code goes through as it is.
    """

    def __init__(self, model: Any, sample_shape: Sequence[int], dtype: npt.DTypeLike = np.float32) -> None:
        self._model = model
        self._name = f"model {type(model).__name__}"
        for method in ("parameters", "forward"):
            if not callable(getattr(model, method, None)):
                raise self._wrong(f"a method {method!r}", "none", "see OwnModel in dptrain.nn.own")
        self.batched = bool(getattr(model, "batched", False))
        self.dtype = np.dtype(dtype)
        self.input_dtype = np.dtype(getattr(model, "input_dtype", self.dtype))
        self.sample_shape = tuple(sample_shape)
        shapes = self._initial(0)
        self.layout = Layout((name, values.shape) for name, values in shapes.items())
        self.output_shape = self._probe(shapes)

    def initialise(self, vector: Array, seed: int) -> None:
        """Fill a flat vector of ``layout.size`` elements with the model's own start."""
        tensors = self.layout.views(vector)
        for name, values in self._initial(seed).items():
            self._check_shape(name, values, self.layout.entries[name].shape)
            tensors[name][...] = values

    def forward(self, tensors: Mapping[str, Array], x: Array, run: Pass) -> tuple[Array, ModelBackward]:
        """z of shape (k, b, *output_shape) and its backward."""
        params = {name: _read_only(tensors[name]) for name in self.layout.entries}
        k, b = x.shape[:2]
        z = run.workspace.array((id(self), "z"), (k, b, *self.output_shape), self.dtype)
        rngs = None
        if run.training:
            rngs = [stream(run.seed, Purpose.MODEL, run.step, shard) for shard in run.shards]
        parts: list[Any] = [np.s_[:]] if self.batched else list(range(k))
        backwards: list[tuple[Any, OwnBackward]] = []
        for part in parts:
            y, back = self._call(params, x[part], None if rngs is None else rngs[part])
            self._check_shape("the output y", y, z[part].shape)
            z[part] = y
            backwards.append((part, back))

        def backward(dz: Array, sink: Sink) -> None:
            grads = {name: sink.open(name) for name in self.layout.entries}
            for part, back in backwards:
                self._collect(back(dz[part]), {name: grad[part] for name, grad in grads.items()}, grads, part)
            for name in grads:
                sink.close(name)

        return z, backward

    def _call(self, params: Mapping[str, Array], x: Array, rng: Any) -> tuple[Array, OwnBackward]:
        result = self._model.forward(params, x, rng)
        if not (isinstance(result, tuple) and len(result) == 2 and callable(result[1])):
            raise self._wrong("forward to return (y, backward)", type(result).__name__, "return both")
        return np.asarray(result[0]), result[1]

    def _collect(self, found: Any, shapes: Mapping[str, Array], grads: Mapping[str, Array], part: Any) -> None:
        if not isinstance(found, Mapping):
            raise self._wrong("backward to return a dict", type(found).__name__, "return the gradients by name")
        if set(found) != set(grads):
            names = f"gradients of {sorted(grads)}"
            raise self._wrong(names, f"{sorted(map(str, found))}", "return one for every parameter and no other")
        for name, grad in grads.items():
            values = np.asarray(found[name])
            self._check_shape(f"the gradient of {name!r}", values, shapes[name].shape)
            grad[part] = values

    def _initial(self, seed: int) -> dict[str, Array]:
        found = self._model.parameters(stream(seed, Purpose.INITIALISE, 0))
        if not isinstance(found, Mapping) or not found or not all(isinstance(name, str) for name in found):
            raise self._wrong("parameters to return a dict of named arrays", repr(found)[:80], "return at least one")
        initial = {name: np.asarray(values) for name, values in found.items()}
        for name, values in initial.items():
            self._check_shape(f"the parameter {name!r}", values, values.shape)
        if hasattr(self, "layout") and set(initial) != set(self.layout.entries):
            names = f"the parameters {sorted(self.layout.entries)} as before"
            raise self._wrong(names, f"{sorted(initial)}", "return the same names whatever rng gives")
        return initial

    def _probe(self, initial: Mapping[str, Array]) -> tuple[int, ...]:
        """The shape of an output, from two rows of zeros."""
        lead = (1, 2) if self.batched else (2,)
        params = {name: _read_only(values.astype(self.dtype)) for name, values in initial.items()}
        with np.errstate(all="ignore"):
            y, _ = self._call(params, np.zeros((*lead, *self.sample_shape), self.input_dtype), None)
        if y.shape[: len(lead)] != lead:
            raise self._wrong(f"an output y of shape {lead} and more", f"{y.shape}", "keep the rows apart")
        return tuple(y.shape[len(lead) :])

    def _check_shape(self, what: str, values: Array, shape: tuple[int, ...]) -> None:
        if values.shape != shape:
            raise self._wrong(f"{what} of shape {shape}", f"{values.shape}", "return the shape that is documented")
        if values.dtype.kind not in "fiub":
            raise self._wrong(f"{what} of real numbers", f"dtype {values.dtype}", "convert it")

    def _wrong(self, expected: str, found: str, cure: str) -> ModelError:
        return ModelError(self._name, expected=expected, found=found, cure=cure)


def _read_only(array: Array) -> Array:
    view = array.view()
    view.flags.writeable = False
    return view


def load_python(entry: str, directory: Path, options: Mapping[str, Any]) -> tuple[Any, str]:
    """The object that ``"file.py:function"`` makes with ``options``, and the digest of the file's source.

    The path is meant from ``directory``. Only this file's source is covered by the digest, so a model belongs in one
    file. ModelError for a missing file or function, wrong options, or an exception at import (chained).
    """
    file, _, function = entry.rpartition(":")
    where = f'model.python = "{entry}"'
    path = directory / file
    if not file or not function.isidentifier():
        raise ModelError(where, expected='"file.py:function"', found=f'"{entry}"', cure="name both")
    try:
        source = path.read_bytes()
    except OSError as error:
        raise ModelError(
            where, expected=f"a readable file {path}", found=str(error.strerror), cure="check the path"
        ) from error
    digest = hashlib.sha256(source).hexdigest()
    module = _execute(source, path, f"dptrain_own_{digest[:16]}", where)
    build = getattr(module, function, None)
    if not callable(build):
        raise ModelError(where, expected=f"a function {function!r} in {path}", found="none", cure="define it")
    try:
        inspect.signature(build).bind(**options)
    except TypeError as error:
        raise ModelError(
            where, expected=f"model.options that {function} takes", found=str(error), cure="change model.options"
        ) from error
    return build(**options), f"sha256:{digest}"


def _execute(source: bytes, path: Path, name: str, where: str) -> types.ModuleType:
    """The very bytes that were hashed, as a module; registered, since dataclasses look their module up."""
    module = types.ModuleType(name)
    module.__file__ = str(path)
    sys.modules[name] = module
    try:
        exec(compile(source, str(path), "exec"), module.__dict__)
    except Exception as error:
        del sys.modules[name]
        line = f"{type(error).__name__}: {error}"
        raise ModelError(where, expected=f"{path} to be imported", found=line, cure="mend the file") from error
    return module


def digest_of(model: Any) -> str:
    """A digest of the source of an object's class, or of its name where there is no source to be had."""
    try:
        source = inspect.getsource(type(model))
    except (OSError, TypeError):
        source = f"{type(model).__module__}.{type(model).__qualname__}"
    return "sha256:" + hashlib.sha256(source.encode()).hexdigest()
