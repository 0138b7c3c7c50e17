"""Losses: the sum over the rows of each shard and its gradient, in one pass. Nothing is divided here.

The mean of a batch is the sum of ``loss`` over all shards divided by the sum of ``weight``; both travel, and are
divided once. Definitions are PyTorch's. Shards share no sum, so the bytes of one don't depend on the others.
"""

from abc import ABC, abstractmethod
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from dptrain.errors import JobError
from dptrain.job import spec
from dptrain.nn.layer import Array, Workspace


@dataclass(frozen=True, slots=True)
class LossSums:
    """Per shard, the sum of losses and of weights, (k,) in float64; and the gradient of the summed losses, as z."""

    loss: npt.NDArray[np.float64]
    weight: npt.NDArray[np.float64]
    dz: Array | None


class Loss(ABC):
    """A loss over z, (k, b, outputs), against a target, with rows (k, b) of 1 (real) and 0 (padding).

    The gradient of padded rows is exactly 0 whatever they hold. ``dz`` lies in the workspace under ``key``.
    """

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

        def array(name: str, shape: tuple[int, ...], dtype: npt.DTypeLike = z.dtype) -> Array:
            return workspace.array((key, name), shape, dtype)

        memory = _Memory(array("z", z.shape), array("a", z.shape), array("losses", rows.shape, np.float64))
        np.copyto(memory.z, z)
        padding = None if rows.all() else rows == 0
        if padding is not None:
            # Whatever a padded row holds, it takes part as zeros and its results are dropped.
            memory.z[padding] = 0
            target = np.where(padding.reshape(*padding.shape, *[1] * (target.ndim - 2)), 0, target)
        dz = array("dz", z.shape) if gradient else None
        weights = self._rows(target, memory, dz)
        if weights is None:
            weights = rows.astype(np.float64)
        elif padding is not None:
            weights[padding] = 0
        if padding is not None:
            memory.losses[padding] = 0
            if dz is not None:
                dz[padding] = 0
        return LossSums(memory.losses.sum(axis=1), weights.sum(axis=1), dz)

    @abstractmethod
    def _rows(self, target: Array, memory: "_Memory", dz: Array | None) -> Array | None:
        """Write each row's loss and gradient; return its weight, (k, b) in float64, where that isn't 1."""


@dataclass(frozen=True, slots=True)
class _Memory:
    """``z``: a copy of the output that may be overwritten. ``a``: scratch like it. ``losses``: (k, b), float64."""

    z: Array
    a: Array
    losses: npt.NDArray[np.float64]


class CrossEntropy(Loss):
    """-log softmax(z)[target], with label smoothing (Szegedy et al., 2016) and class weights; targets are (k, b).

    A row's weight is its class's, so that the mean is PyTorch's weighted one.
    """

    def __init__(self, classes: int, smoothing: float = 0.0, class_weights: tuple[float, ...] = ()) -> None:
        self.classes = classes
        self.smoothing = smoothing
        self.class_weights = np.array(class_weights, np.float64) if class_weights else None

    def _rows(self, target: Array, memory: _Memory, dz: Array | None) -> Array | None:
        log_p, e = memory.z, memory.a
        np.subtract(log_p, log_p.max(axis=-1, keepdims=True), out=log_p)
        np.exp(log_p, out=e)
        total = e.sum(axis=-1, keepdims=True)
        np.subtract(log_p, np.log(total), out=log_p)
        at = np.arange(target.size) * self.classes + target.reshape(-1)
        hit = log_p.reshape(-1)[at].reshape(target.shape)
        keep = 1.0 - self.smoothing
        weights = None if self.class_weights is None else self.class_weights[target]
        np.multiply(hit, -keep, out=memory.losses)
        if weights is not None:
            np.multiply(memory.losses, weights, out=memory.losses)
        spread = self.smoothing / self.classes
        if spread:
            others = log_p.sum(axis=-1) if weights is None else log_p @ self._cast(log_p)
            np.subtract(memory.losses, spread * others, out=memory.losses)
        if dz is not None:
            np.divide(e, total, out=dz)
            self._gradient(dz, at, weights, keep, spread)
        return weights

    def _cast(self, like: Array) -> Array:
        assert self.class_weights is not None
        return self.class_weights.astype(like.dtype)

    def _gradient(self, dz: Array, at: Array, weights: Array | None, keep: float, spread: float) -> None:
        """dz holds p. Without class weights: p - keep at the target - spread everywhere."""
        flat = dz.reshape(-1)
        if weights is None:
            if spread:
                np.subtract(dz, spread, out=dz)
            flat[at] -= keep
            return
        w = self._cast(dz)
        mass = keep * weights + spread * float(w.sum(dtype=np.float64))
        np.multiply(dz, mass.astype(dz.dtype)[..., None], out=dz)
        if spread:
            np.subtract(dz, spread * w, out=dz)
        flat[at] -= (keep * weights).astype(dz.dtype).reshape(-1)


class _Elementwise(Loss):
    """Losses that are a mean over the outputs of a row; targets are (k, b, outputs), or (k, b) for one output."""

    def _target(self, target: Array, memory: _Memory) -> Array:
        shaped = target.reshape(memory.z.shape)
        if shaped.dtype == memory.z.dtype:
            return shaped
        np.copyto(memory.a, shaped, casting="unsafe")
        return memory.a

    def _finish(self, losses: Array, memory: _Memory, dz: Array | None) -> None:
        """Means over the outputs: of the losses, into the memory, and of the gradient, in place."""
        outputs = losses.shape[-1]
        np.divide(losses.sum(axis=-1), outputs, out=memory.losses)
        if dz is not None and outputs > 1:
            np.divide(dz, outputs, out=dz)


class MeanSquaredError(_Elementwise):
    """(z - target)^2."""

    def _rows(self, target: Array, memory: _Memory, dz: Array | None) -> Array | None:
        d = memory.z
        np.subtract(d, self._target(target, memory), out=d)
        if dz is not None:
            np.add(d, d, out=dz)
        np.multiply(d, d, out=d)
        self._finish(d, memory, dz)
        return None


class Huber(_Elementwise):
    """d^2 / 2 up to |d| = delta, delta (|d| - delta / 2) beyond, for d = z - target (Huber, 1964)."""

    def __init__(self, delta: float) -> None:
        self.delta = delta

    def _rows(self, target: Array, memory: _Memory, dz: Array | None) -> Array | None:
        d, clipped = memory.z, memory.a
        np.subtract(d, self._target(target, memory), out=d)
        if dz is not None:
            np.clip(d, -self.delta, self.delta, out=dz)
        # With q = min(|d|, delta), both branches are q (|d| - q / 2).
        np.abs(d, out=d)
        np.minimum(d, self.delta, out=clipped)
        np.subtract(d, clipped / 2, out=d)
        np.multiply(d, clipped, out=d)
        self._finish(d, memory, dz)
        return None


class BinaryCrossEntropy(_Elementwise):
    """-log sigmoid(z) for the share ``target`` and -log sigmoid(-z) for the rest."""

    def _rows(self, target: Array, memory: _Memory, dz: Array | None) -> Array | None:
        # max(z, 0) - z t + log(1 + exp(-|z|)) never overflows, nor does its gradient, sigmoid(z) - t.
        z = memory.z
        t = np.array(self._target(target, memory))
        e = memory.a
        np.exp(np.negative(np.abs(z, out=e), out=e), out=e)
        if dz is not None:
            np.add(e, 1, out=dz)
            np.divide(np.where(z >= 0, z.dtype.type(1), e), dz, out=dz)
            np.subtract(dz, t, out=dz)
        np.log1p(e, out=e)
        np.add(e, np.maximum(z, 0), out=e)
        np.subtract(e, np.multiply(z, t, out=z), out=e)
        self._finish(e, memory, dz)
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
