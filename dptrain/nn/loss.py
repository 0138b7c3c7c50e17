"""Losses: the sum over the rows of each shard and its gradient, in one pass. Nothing is divided here.

The mean of a batch is the sum of ``loss`` over all shards divided by the sum of ``weight``; both travel, and are
divided once. Definitions are PyTorch's. Shards share no sum, so the bytes of one don't depend on the others.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Hashable
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from dptrain.errors import JobError
from dptrain.job import spec
from dptrain.nn.layer import Array, Workspace


class LossSums(NamedTuple):
    """Per shard, the sum of losses and of weights, (k,) in float64; and the gradient of the summed losses, as z."""

    loss: npt.NDArray[np.float64]
    weight: npt.NDArray[np.float64]
    dz: Array | None


class Memory:
    """Arrays of a loss in a workspace, planned once: the same name gives the same memory."""

    def __init__(self, workspace: Workspace, key: Hashable, like: Array) -> None:
        self._workspace, self._key = workspace, key
        self._shape, self._dtype = like.shape, like.dtype

    def __call__(self, name: str, shape: tuple[int, ...] | None = None, dtype: npt.DTypeLike | None = None) -> Array:
        """Of the shape and dtype of z unless told."""
        shape = self._shape if shape is None else shape
        return self._workspace.array((self._key, name), shape, self._dtype if dtype is None else dtype)

    def row_starts(self, shape: tuple[int, ...], length: int) -> Array:
        """Where each row begins in a flat array of rows of ``length``."""
        return self._workspace.made((self._key, "row starts", shape), lambda: _row_starts(shape, length))

    def rounded(self, name: str, values: npt.NDArray[np.float64]) -> Array:
        """The values in z's dtype; the same name stands for the same values."""
        return self._workspace.made((self._key, name, self._dtype), lambda: values.astype(self._dtype))


class Loss(ABC):
    """A loss over z, (k, b, outputs), against a target, with rows (k, b) of 1 (real) and 0 (padding).

    The gradient of padded rows is exactly 0 whatever they hold. ``dz`` lies in the workspace under ``key``; the sums
    are for reading.
    """

    _last: tuple[Array | None, npt.NDArray[np.float64], bool] = (None, np.zeros(0), False)

    def __call__(
        self,
        z: Array,
        target: Array,
        rows: Array,
        workspace: Workspace,
        key: Hashable,
        gradient: bool = True,
    ) -> LossSums:
        """The sums over the rows of each shard; ``dz`` is None without ``gradient``."""
        memory = Memory(workspace, key, z)
        counted, full = self._counted(rows)
        padding: Array | None = None
        if not full:
            padding = memory("padding", rows.shape, np.bool_)
            np.equal(rows, 0, out=padding)
            # Whatever a padded row holds, it takes part as zeros and its results are dropped.
            z = _without(padding, z, memory("real z"))
            target = _without(padding, target, memory("real target", target.shape, target.dtype))
        dz = memory("dz") if gradient else None
        losses = memory("losses", rows.shape, np.float64)
        weights = self._rows(z, target, losses, dz, memory)
        if padding is not None:
            np.copyto(losses, 0, where=padding)
            if weights is not None:
                np.copyto(weights, 0, where=padding)
            if dz is not None:
                np.copyto(dz, 0, where=padding[..., None])
        weight = counted if weights is None else np.add.reduce(weights, axis=1)
        return LossSums(np.add.reduce(losses, axis=1), weight, dz)

    def _counted(self, rows: Array) -> tuple[npt.NDArray[np.float64], bool]:
        """The real rows of each shard, and whether there are no others. Of rows that can't change, counted once."""
        if rows is self._last[0]:
            return self._last[1:]
        counted = np.add.reduce(rows, axis=1).astype(np.float64)
        found = counted, bool(np.add.reduce(counted) == rows.size)
        if not rows.flags.writeable:
            self._last = rows, *found
        return found

    @abstractmethod
    def _rows(self, z: Array, target: Array, losses: Array, dz: Array | None, memory: Memory) -> Array | None:
        """Write each row's loss and gradient; return its weight, (k, b) in float64, where that isn't 1.

        z and target are only read.
        """


def _row_starts(shape: tuple[int, ...], length: int) -> Array:
    return np.arange(math.prod(shape), dtype=np.int64).reshape(shape) * length


def _without(padding: Array, array: Array, copy: Array) -> Array:
    """A copy with zeros in the padded rows."""
    np.copyto(copy, array)
    np.copyto(copy, 0, where=padding.reshape(*padding.shape, *[1] * (array.ndim - 2)))
    return copy


class CrossEntropy(Loss):
    """-log softmax(z)[target], with label smoothing (Szegedy et al., 2016) and class weights; targets are (k, b).

    A row's weight is its class's, so that the mean is PyTorch's weighted one.
    """

    def __init__(self, classes: int, smoothing: float = 0.0, class_weights: tuple[float, ...] = ()) -> None:
        self.classes = classes
        self.smoothing = smoothing
        self.class_weights = np.array(class_weights, np.float64) if class_weights else None

    def _rows(self, z: Array, target: Array, losses: Array, dz: Array | None, memory: Memory) -> Array | None:
        log_p, p = memory("log p"), memory("p") if dz is None else dz
        of_row = memory("of row", (*z.shape[:2], 1))
        np.maximum.reduce(z, axis=-1, keepdims=True, out=of_row)
        np.subtract(z, of_row, out=log_p)
        np.exp(log_p, out=p)
        np.add.reduce(p, axis=-1, keepdims=True, out=of_row)
        if dz is not None:
            np.divide(p, of_row, out=dz)
        np.log(of_row, out=of_row)
        np.subtract(log_p, of_row, out=log_p)
        at = self._places(target, memory)
        hit = memory("hit", target.shape)
        np.take(log_p.reshape(-1), at, out=hit, mode="clip")
        keep = 1.0 - self.smoothing
        np.multiply(hit, -keep, out=losses)
        weights: Array | None = None
        if self.class_weights is not None:
            weights = memory("weights", target.shape, np.float64)
            np.take(self.class_weights, target, out=weights, mode="clip")
            np.multiply(losses, weights, out=losses)
        spread = self.smoothing / self.classes
        if spread:
            if weights is not None:
                assert self.class_weights is not None
                np.multiply(log_p, memory.rounded("class weights", self.class_weights), out=log_p)
            np.add.reduce(log_p, axis=-1, out=hit)
            np.multiply(hit, spread, out=hit)
            others = memory("others", target.shape, np.float64)
            np.copyto(others, hit)
            np.subtract(losses, others, out=losses)
        if dz is not None:
            self._gradient(dz, at, weights, keep, spread, memory)
        return weights

    def _places(self, target: Array, memory: Memory) -> Array:
        """Where in the flat outputs each row's target lies."""
        at = memory("at", target.shape, np.int64)
        np.add(memory.row_starts(target.shape, self.classes), target, out=at)
        return at

    def _gradient(
        self, dz: Array, at: Array, weights: Array | None, keep: float, spread: float, memory: Memory
    ) -> None:
        """dz holds p. Without class weights: p - keep at the target - spread everywhere."""
        flat = dz.reshape(-1)
        hit = memory("hit", at.shape)
        if weights is None:
            if spread:
                np.subtract(dz, spread, out=dz)
            np.take(flat, at, out=hit, mode="clip")
            np.subtract(hit, keep, out=hit)
            flat[at] = hit
            return
        assert self.class_weights is not None
        mass = memory("mass", at.shape, np.float64)
        np.multiply(weights, keep, out=mass)
        kept = memory("kept", at.shape)
        np.copyto(kept, mass, casting="same_kind")
        np.add(mass, spread * float(self.class_weights.sum()), out=mass)
        np.copyto(hit, mass, casting="same_kind")
        np.multiply(dz, hit[..., None], out=dz)
        if spread:
            np.subtract(dz, memory.rounded("spread weights", spread * self.class_weights), out=dz)
        np.take(flat, at, out=hit, mode="clip")
        np.subtract(hit, kept, out=hit)
        flat[at] = hit


class _Elementwise(Loss):
    """Losses that are a mean over the outputs of a row; targets are (k, b, outputs), or (k, b) for one output."""

    def _target(self, target: Array, z: Array, memory: Memory) -> Array:
        shaped = target.reshape(z.shape)
        if shaped.dtype == z.dtype:
            return shaped
        cast = memory("target")
        np.copyto(cast, shaped, casting="unsafe")
        return cast

    def _finish(self, each: Array, losses: Array, dz: Array | None, memory: Memory) -> None:
        """Means over the outputs: of the losses, row by row, and of the gradient, in place."""
        outputs = each.shape[-1]
        of_row = memory("of row", losses.shape)
        np.add.reduce(each, axis=-1, out=of_row)
        np.copyto(losses, of_row)
        if outputs > 1:
            np.divide(losses, outputs, out=losses)
            if dz is not None:
                np.divide(dz, outputs, out=dz)


class MeanSquaredError(_Elementwise):
    """(z - target)^2."""

    def _rows(self, z: Array, target: Array, losses: Array, dz: Array | None, memory: Memory) -> Array | None:
        d = memory("a")
        np.subtract(z, self._target(target, z, memory), out=d)
        if dz is not None:
            np.add(d, d, out=dz)
        np.multiply(d, d, out=d)
        self._finish(d, losses, dz, memory)
        return None


class Huber(_Elementwise):
    """d^2 / 2 up to |d| = delta, delta (|d| - delta / 2) beyond, for d = z - target (Huber, 1964)."""

    def __init__(self, delta: float) -> None:
        self.delta = delta

    def _rows(self, z: Array, target: Array, losses: Array, dz: Array | None, memory: Memory) -> Array | None:
        d, clipped = memory("a"), memory("b")
        np.subtract(z, self._target(target, z, memory), out=d)
        if dz is not None:
            np.clip(d, -self.delta, self.delta, out=dz)
        # With q = min(|d|, delta), both branches are q (|d| - q / 2).
        np.abs(d, out=d)
        np.minimum(d, self.delta, out=clipped)
        np.multiply(d, clipped, out=d)
        np.multiply(clipped, clipped, out=clipped)
        np.multiply(clipped, 0.5, out=clipped)
        np.subtract(d, clipped, out=d)
        self._finish(d, losses, dz, memory)
        return None


class BinaryCrossEntropy(_Elementwise):
    """-log sigmoid(z) for the share ``target`` and -log sigmoid(-z) for the rest."""

    def _rows(self, z: Array, target: Array, losses: Array, dz: Array | None, memory: Memory) -> Array | None:
        # max(z, 0) - z t + log(1 + exp(-|z|)) never overflows, nor does its gradient, sigmoid(z) - t.
        t = self._target(target, z, memory)
        e, part = memory("a"), memory("b")
        np.abs(z, out=e)
        np.negative(e, out=e)
        if dz is not None:
            # sigmoid(z) = exp(min(z, 0)) / (1 + exp(-|z|))
            np.minimum(z, 0, out=part)
            np.exp(part, out=dz)
        np.exp(e, out=e)
        if dz is not None:
            np.add(e, 1, out=part)
            np.divide(dz, part, out=dz)
            np.subtract(dz, t, out=dz)
        np.log1p(e, out=e)
        np.maximum(z, 0, out=part)
        np.add(e, part, out=e)
        np.multiply(z, t, out=part)
        np.subtract(e, part, out=e)
        self._finish(e, losses, dz, memory)
        return None


def make_loss(settings: spec.Loss, kind: Literal["classes", "numbers"], classes: int, width: int) -> Loss:
    """The job's loss for ``classes`` classes or ``width`` numbers a row. JobError where they don't go together."""
    name = resolve(settings, kind)
    if name == "cross_entropy" and kind != "classes":
        raise _mismatch(name, "labels that are classes", f"{width} numbers a row", 'use "mse" or "huber"')
    if name in ("mse", "huber") and kind == "classes":
        raise _mismatch(name, "labels that are numbers", f"{classes} classes", 'use "cross_entropy"')
    if name == "binary_cross_entropy" and kind == "classes" and classes != 2:
        raise _mismatch(name, "2 classes", f"{classes}", 'use "cross_entropy"')
    if name != "cross_entropy" and (settings.class_weights or settings.label_smoothing):
        key = "class_weights" if settings.class_weights else "label_smoothing"
        raise JobError(f"loss.{key}", expected='loss.type = "cross_entropy"', found=f'"{name}"', cure="remove it")
    if settings.class_weights and len(settings.class_weights) != classes:
        raise JobError(
            "loss.class_weights",
            expected=f"{classes} weights, one for each class",
            found=f"{len(settings.class_weights)}",
            cure="give every class its weight",
        )
    if name == "cross_entropy":
        return CrossEntropy(classes, settings.label_smoothing, settings.class_weights)
    if name == "huber":
        return Huber(settings.delta)
    return MeanSquaredError() if name == "mse" else BinaryCrossEntropy()


def resolve(settings: spec.Loss, kind: Literal["classes", "numbers"]) -> str:
    """The loss's name, with "auto" decided by what the labels are."""
    if settings.type == "auto":
        return "cross_entropy" if kind == "classes" else "mse"
    return settings.type


def _mismatch(name: str, expected: str, found: str, cure: str) -> JobError:
    return JobError(f'loss.type = "{name}"', expected=expected, found=found, cure=cure)
