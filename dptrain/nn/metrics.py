"""Metrics that are made of sums, so that any number of workers finds the same figure: sums travel, one division."""

from collections.abc import Sequence
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from dptrain.errors import JobError
from dptrain.job import spec
from dptrain.nn.layer import Array
from dptrain.nn.loss import resolve

Sums = npt.NDArray[np.float64]


class Metric(Protocol):
    """A figure over z, (k, b, outputs), and its target; ``rows`` (k, b) are 1 for a real row and 0 for padding."""

    name: str
    width: int

    def sums(self, z: Array, target: Array, rows: Array) -> Sums:
        """(k, width) sums over the real rows of each shard."""

    def value(self, sums: Sums) -> float:
        """The figure from sums, (width,), that may be of many shards; NaN where there was no row."""


class Accuracy:
    """The share of rows whose largest output, the first of equals, is the target's.

    With a single output: the share whose output is positive where the target is 1 and not where it is 0.
    """

    name = "accuracy"
    width = 2

    def sums(self, z: Array, target: Array, rows: Array) -> Sums:
        """Right rows, rows."""
        if z.shape[-1] == 1 or target.ndim == z.ndim:
            right = ((z > 0) == (target.reshape(z.shape) > 0.5)).mean(axis=-1)
        else:
            right = z.argmax(axis=-1) == target
        return _pair(np.where(rows != 0, right, 0.0), rows)

    def value(self, sums: Sums) -> float:
        """Between 0 and 1."""
        return _ratio(sums)


class TopK:
    """The share of rows with fewer than k classes before the target's; of equal outputs, earlier classes come first."""

    name = "top_k"
    width = 2

    def __init__(self, k: int) -> None:
        self.k = k

    def sums(self, z: Array, target: Array, rows: Array) -> Sums:
        """Right rows, rows."""
        inside = np.where(rows != 0, target, 0)[..., None]
        own = np.take_along_axis(z, inside, axis=-1)
        earlier = np.arange(z.shape[-1]) < inside
        # A NaN is no answer: written this way round, it counts as being before whatever it is compared with.
        before = np.where(earlier, ~(z < own), ~(z <= own)).sum(axis=-1)
        right = (before < self.k) & ~np.isnan(own[..., 0])
        return _pair(np.where(rows != 0, right, 0.0), rows)

    def value(self, sums: Sums) -> float:
        """Between 0 and 1."""
        return _ratio(sums)


class MeanAbsoluteError:
    """The mean of |z - target| over rows and outputs."""

    name = "mae"
    width = 2

    def sums(self, z: Array, target: Array, rows: Array) -> Sums:
        """Sum over rows of the mean over outputs, rows."""
        error, _ = _errors(z, target, rows)
        return _pair(np.abs(error).mean(axis=-1), rows)

    def value(self, sums: Sums) -> float:
        """In the target's unit."""
        return _ratio(sums)


class R2:
    """1 - sum (y - z)^2 / sum (y - mean y)^2, averaged over the outputs.

    An output whose target never changes counts 1 where it is met exactly and 0 otherwise.
    """

    name = "r2"

    def __init__(self, outputs: int) -> None:
        self.outputs = outputs
        self.width = 1 + 3 * outputs

    def sums(self, z: Array, target: Array, rows: Array) -> Sums:
        """Rows; then for each output the sums of y, y^2 and the squared error."""
        error, y = _errors(z, target, rows)
        counted = rows.astype(np.float64).sum(axis=1)[:, None]
        return np.concatenate([counted, y.sum(axis=1), (y * y).sum(axis=1), (error * error).sum(axis=1)], axis=1)

    def value(self, sums: Sums) -> float:
        """At most 1."""
        n = sums[0]
        if n == 0:
            return float("nan")
        total, squares, errors = sums[1:].reshape(3, self.outputs)
        spread = squares - total * total / n
        # What rounding leaves of a constant target's spread is no spread.
        constant = spread <= 1e-12 * squares
        ratio = np.where(constant, np.where(errors == 0, 0.0, 1.0), errors / np.where(constant, 1.0, spread))
        return float(np.mean(1.0 - ratio))


def make_metrics(settings: spec.Loss, kind: Literal["classes", "numbers"], width: int) -> list[Metric]:
    """The job's metrics, or the usual ones of its loss. JobError for one that doesn't go with the labels."""
    known: dict[str, Metric] = {"mae": MeanAbsoluteError(), "r2": R2(width)}
    usual: Sequence[str] = ("mae", "r2")
    if resolve(settings, kind) == "binary_cross_entropy":
        known, usual = {"accuracy": Accuracy()}, ("accuracy",)
    elif kind == "classes":
        known, usual = {"accuracy": Accuracy(), "top_k": TopK(settings.top_k)}, ("accuracy",)
    for name in settings.metrics:
        if name not in known:
            raise JobError(
                "loss.metrics",
                expected=" or ".join(f'"{one}"' for one in known) + f" for labels that are {kind}",
                found=f'"{name}"',
                cure="remove it",
            )
    return [known[name] for name in settings.metrics or usual]


def _errors(z: Array, target: Array, rows: Array) -> tuple[Array, Array]:
    """z - target and target in float64, 0 in padded rows."""
    real = (rows != 0)[..., None]
    y = np.where(real, target.reshape(z.shape), 0).astype(np.float64)
    return np.where(real, z, 0).astype(np.float64) - y, y


def _pair(figure: Array, rows: Array) -> Sums:
    wide = figure.astype(np.float64)
    return np.stack([wide.sum(axis=1), rows.astype(np.float64).sum(axis=1)], axis=1)


def _ratio(sums: Sums) -> float:
    return float(sums[0] / sums[1]) if sums[1] else float("nan")
