"""The encoding: fitted on the training rows once, plain data in the run, used again on whatever comes later."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from dptrain.errors import DataError
from dptrain.layout import Array

Lookup = Mapping[int, npt.NDArray[np.int64]]
"""For each text column of a file, from its codes to the training vocabulary's; the last element serves code -1."""


@dataclass(frozen=True)
class Target:
    """What is learned: one of ``classes`` classes called ``names`` (width 1), or ``width`` numbers (classes 0)."""

    kind: Literal["classes", "numbers"]
    classes: int
    width: int
    names: tuple[str, ...]


@dataclass(frozen=True)
class Affine:
    """(v - shift) * scale along the last axis. One element each means the same for all."""

    shift: tuple[float, ...] = (0.0,)
    scale: tuple[float, ...] = (1.0,)

    @cached_property
    def _constants(self) -> dict[tuple[Any, ...], tuple[np.dtype[Any], Array | None, Array | None]]:
        return {}

    def constants(
        self, raw: np.dtype[Any], out: np.dtype[Any], width: int
    ) -> tuple[np.dtype[Any], Array | None, Array | None]:
        """What is computed in; shift and scale in it, repeated to ``width``, or None where they change nothing."""
        found = self._constants.get((raw, out, width))
        if found is None:
            dtype = np.result_type(raw, out)
            shift = np.resize(np.array(self.shift, dtype), width) if any(self.shift) else None
            scale = np.resize(np.array(self.scale, dtype), width) if any(value != 1 for value in self.scale) else None
            found = self._constants[raw, out, width] = (dtype, shift, scale)
        return found

    @cached_property
    def identity(self) -> bool:
        """Whether values stay what they are."""
        return not any(self.shift) and all(value == 1 for value in self.scale)

    def apply(self, raw: Array, out: Array) -> None:
        """Fill ``out`` from ``raw`` of the same shape; they may be the same array."""
        if raw is out and self.identity:
            return
        if out.flags.c_contiguous and raw.flags.c_contiguous:
            # The constants of a sample's last axis, repeated for a row of some length: numpy is fast on long runs only.
            flat = (len(out), math.prod(out.shape[1:]))
            raw, out = raw.reshape(flat), out.reshape(flat)
        width = 1 if len(self.shift) == len(self.scale) == 1 else out.shape[-1]
        dtype, shift, scale = self.constants(raw.dtype, out.dtype, width)
        if dtype == out.dtype and raw.dtype != dtype:
            np.copyto(out, raw, casting="unsafe")
            raw = out
        if shift is not None:
            np.subtract(raw, shift, out=out, casting="unsafe")
            raw = out
        if scale is not None:
            np.multiply(raw, scale, out=out, casting="unsafe")
        elif raw is not out:
            np.copyto(out, raw, casting="unsafe")

    def undo(self, y: Array) -> Array:
        """The values that :meth:`apply` gave ``y`` for."""
        return np.asarray(y / np.asarray(self.scale, y.dtype) + np.asarray(self.shift, y.dtype))


@dataclass(frozen=True)
class Feature:
    """One column of a table. ``fill`` stands for a missing number; ``vocabulary`` is the training rows' text."""

    name: str
    kind: Literal["number", "text"]
    fill: float | None = None
    vocabulary: tuple[str, ...] = ()


@dataclass(frozen=True)
class Encoding:
    """From raw rows to what the model sees, and from what it says back to labels. Plain data by :meth:`plan`.

    Arrays (no ``features``): every value by ``affine``, whose constants go along the last axis of a sample: one for
    each column, or for each channel of an image. Tables: the numbers first, in the columns' order, by ``affine``;
    then each text column, as one column a category (``onehot``, an unknown one is all zeros) or as its number
    (an unknown one is -1). ``raw_shape`` is a raw row's shape, ``rules`` the job's [data] as plain data.
    """

    raw_shape: tuple[int, ...]
    sample_shape: tuple[int, ...]
    integer: bool
    target: Target
    affine: Affine = field(default_factory=Affine)
    label: Affine = field(default_factory=Affine)
    features: tuple[Feature, ...] = ()
    onehot: bool = True
    rules: Mapping[str, Any] = field(default_factory=dict)

    def plan(self) -> dict[str, Any]:
        """The encoding as plain data, the reverse of :func:`encoding_of`."""
        plan: dict[str, Any] = _listed(asdict(self))
        return plan

    @cached_property
    def _numbers(self) -> list[int]:
        return [j for j, feature in enumerate(self.features) if feature.kind == "number"]

    @cached_property
    def _fills(self) -> tuple[list[int], npt.NDArray[np.float64]]:
        at = [i for i, j in enumerate(self._numbers) if self.features[j].fill is not None]
        return at, np.array([self.features[self._numbers[i]].fill for i in at], dtype=np.float64)

    @property
    def direct(self) -> bool:
        """Whether a raw row needs nothing but its affine map."""
        return not self.features

    @property
    def names(self) -> tuple[str, ...]:
        """The names of a table's encoded columns; empty for arrays."""
        found = [self.features[j].name for j in self._numbers]
        for feature in self.features:
            if feature.kind == "text":
                found += [f"{feature.name}={word}" for word in feature.vocabulary] if self.onehot else [feature.name]
        return tuple(found)

    def lookup(self, vocabularies: Sequence[Sequence[str]]) -> dict[int, npt.NDArray[np.int64]]:
        """How a file's codes, with these vocabularies of its columns, become the training's."""
        found = {}
        for j, feature in enumerate(self.features):
            if feature.kind == "text":
                known = {word: i for i, word in enumerate(feature.vocabulary)}
                found[j] = np.array([*(known.get(word, -1) for word in vocabularies[j]), -1], dtype=np.int64)
        return found

    def write(self, raw: Array, x: Array, lookup: Lookup) -> None:
        """Fill ``x`` (n, *sample_shape) from raw rows of a file (n, ...)."""
        if self.direct:
            self.affine.apply(raw.reshape(x.shape), x)
            return
        width = len(self._numbers)
        flat = x.reshape(len(x), -1)
        if width:
            numbers = raw[:, self._numbers]
            at, fills = self._fills
            if at:
                part = numbers[:, at]
                numbers[:, at] = np.where(np.isnan(part), fills, part)
            self.affine.apply(numbers, flat[:, :width])
        for j, codes in lookup.items():
            found = codes[raw[:, j].astype(np.int64)]
            if not self.onehot:
                flat[:, width] = found
                width += 1
                continue
            size = len(self.features[j].vocabulary)
            flat[:, width : width + size] = 0
            known = np.flatnonzero(found >= 0)
            flat[known, width + found[known]] = 1
            width += size

    def encode(self, raw: npt.ArrayLike, dtype: npt.DTypeLike = np.float32) -> Array:
        """Raw rows (n, *raw_shape), or (n, *sample_shape), as the model's x (n, *sample_shape).

        A table's rows can be given so only where all its columns are numbers. DataError for any other shape.
        """
        rows = np.asarray(raw)
        if rows.shape[1:] not in (self.raw_shape, self.sample_shape) or rows.dtype.kind not in "biuf":
            raise DataError(
                "rows to encode",
                expected=f"numbers of shape (n, {', '.join(map(str, self.raw_shape))})",
                found=f"{rows.dtype} of shape {rows.shape}",
                cure="give rows as the training data has them",
            )
        text = next((feature.name for feature in self.features if feature.kind == "text"), None)
        if text is not None:
            raise DataError(
                "rows to encode",
                expected=f"text in column {text!r}",
                found="an array of numbers",
                cure="give a file of the training data's format",
            )
        x = np.empty((len(rows), *self.sample_shape), dtype)
        self.write(rows, x, {})
        return x

    def write_target(self, raw: Array, y: Array) -> None:
        """Fill ``y`` from raw labels: (n,) classes, or (n, width) numbers."""
        if self.target.kind == "classes":
            np.copyto(y, raw.reshape(y.shape), casting="unsafe")
        else:
            self.label.apply(raw.reshape(y.shape), y)

    def decode_target(self, y: Array) -> Array:
        """Numbers of the model, (..., width), in the labels' own unit. Classes stay as they are."""
        return y if self.label.identity else self.label.undo(y)


def _listed(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _listed(item) for key, item in value.items()}
    return [_listed(item) for item in value] if isinstance(value, (list, tuple)) else value


def encoding_of(plan: Mapping[str, Any]) -> Encoding:
    """An encoding from its plain data."""

    def affine(data: Mapping[str, Any]) -> Affine:
        return Affine(tuple(data["shift"]), tuple(data["scale"]))

    target = plan["target"]
    return Encoding(
        raw_shape=tuple(plan["raw_shape"]),
        sample_shape=tuple(plan["sample_shape"]),
        integer=plan["integer"],
        target=Target(target["kind"], target["classes"], target["width"], tuple(target["names"])),
        affine=affine(plan["affine"]),
        label=affine(plan["label"]),
        features=tuple(
            Feature(item["name"], item["kind"], item["fill"], tuple(item["vocabulary"])) for item in plan["features"]
        ),
        onehot=plan["onehot"],
        rules=plan["rules"],
    )
