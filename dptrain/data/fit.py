"""Fitting the encoding, on the training rows only."""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dptrain.data.encoding import Affine, Encoding, Feature, Target
from dptrain.data.raw import Raw, chunks
from dptrain.data.store import Opened, Store
from dptrain.errors import DataError
from dptrain.job import spec
from dptrain.layout import Array

Mask = npt.NDArray[np.bool_]


@dataclass
class Moments:
    """Count, mean, sum of squared differences, least and largest of each column, gathered block by block.

    Blocks join by Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample
    variances", 1979. NaN does not count.
    """

    count: Array
    mean: Array
    squares: Array
    low: Array
    high: Array

    @classmethod
    def none(cls, width: int) -> "Moments":
        """The moments of no rows."""
        return cls(np.zeros(width), np.zeros(width), np.zeros(width), np.full(width, np.inf), np.full(width, -np.inf))

    def add(self, block: Array) -> None:
        """Take in rows (n, width)."""
        values = np.asarray(block, dtype=np.float64)
        real = ~np.isnan(values)
        count = real.sum(axis=0)
        total = self.count + count
        safe = np.maximum(count, 1)
        mean = np.where(real, values, 0).sum(axis=0) / safe
        squares = np.where(real, (values - mean) ** 2, 0).sum(axis=0)
        gap = mean - self.mean
        share = count / np.maximum(total, 1)
        self.squares += squares + np.where(count > 0, gap**2 * self.count * share, 0)
        self.mean += np.where(count > 0, gap * share, 0)
        self.low = np.minimum(self.low, np.where(real, values, np.inf).min(axis=0, initial=np.inf))
        self.high = np.maximum(self.high, np.where(real, values, -np.inf).max(axis=0, initial=-np.inf))
        self.count = total

    def affine(self, kind: str) -> Affine:
        """The map to mean 0 and deviation 1 (``standard``) or to 0..1 (``minmax``); a constant column goes to 0."""
        known = self.count > 0
        if kind == "standard":
            shift = self.mean
            spread = np.sqrt(self.squares / np.maximum(self.count, 1))
            # The rounding of a mean leaves a constant column with a tiny deviation.
            spread = np.where(spread <= 1e-12 * np.abs(shift), 0, spread)
        else:
            shift = np.where(known, self.low, 0)
            spread = np.where(known, self.high, 0) - shift
        scale = 1 / np.where(spread > 0, spread, 1)
        return Affine(tuple(shift.tolist()), tuple(scale.tolist()))


def moments(array: Array, rows: Mask | None, width: int, columns: list[int] | None = None) -> Moments:
    """The moments over the marked rows (None: all) of what lies along the last axis of ``width``."""
    found = Moments.none(width)
    for lo, hi in chunks(len(array), array[0].nbytes):
        block = array[lo:hi] if rows is None else array[lo:hi][rows[lo:hi]]
        if len(block):
            found.add(block[:, columns] if columns is not None else block.reshape(-1, width))
    return found


def fit(raw: Raw, y: Store, target: Target, data: spec.Data, rows: Mask | None, rules: dict[str, object]) -> Encoding:
    """The encoding of ``raw`` as its marked training rows (None: all) give it."""
    label = Affine()
    if target.kind == "numbers" and data.label_normalise == "standard":
        labels = Opened(y).array
        label = moments(labels.reshape(len(labels), -1), rows, target.width).affine("standard")
    if raw.columns is not None:
        return _fit_table(raw, target, data, rows, rules, label)
    stored = raw.x.shape[1:]
    shape = _shaped(data.shape or raw.shape or stored or (1,), math.prod(stored), raw)
    kind, pixels = data.normalise, data.scale
    if kind == "auto":
        kind, pixels = ("scale", raw.pixels) if raw.pixels else ("none", 1.0)
    affine = Affine(scale=(1 / pixels,)) if kind == "scale" else Affine()
    if kind in ("standard", "minmax"):
        affine = moments(Opened(raw.x).array, rows, shape[-1]).affine(kind)
    integer = np.dtype(raw.x.dtype).kind in "iu" and affine.identity
    return Encoding(raw.x.shape[1:], shape, integer, target, affine, label, rules=rules)


def _shaped(shape: tuple[int, ...], width: int, raw: Raw) -> tuple[int, ...]:
    if math.prod(shape) != width or not width:
        raise DataError(
            f"{raw.where} with data.shape = {list(shape)}",
            expected=f"{math.prod(shape)} values a row",
            found=f"{width}",
            cure="correct data.shape",
        )
    return tuple(shape)


def _fit_table(
    raw: Raw, target: Target, data: spec.Data, rows: Mask | None, rules: dict[str, object], label: Affine
) -> Encoding:
    columns = raw.columns or ()
    table = Opened(raw.x).array
    numbers = [j for j, column in enumerate(columns) if column.kind == "number"]
    if data.categories == "error" and len(numbers) < len(columns):
        name = next(column.name for column in columns if column.kind == "text")
        raise DataError(
            f"{raw.where} column {name!r}",
            expected="numbers",
            found="text",
            cure='leave it out of data.features or set data.categories to "onehot" or "ordinal"',
        )
    affine = Affine()
    needs = data.normalise in ("standard", "minmax")
    found = moments(table, rows, len(numbers), numbers) if needs or data.missing == "mean" else None
    fills = _fills(table, rows, numbers, data.missing, found)
    if found is not None and needs and numbers:
        affine = found.affine(data.normalise)
    elif data.normalise == "scale":
        affine = Affine(scale=(1 / data.scale,))
    features = tuple(
        Feature(column.name, "number", fills[j])
        if column.kind == "number"
        else Feature(column.name, "text", None, _words(table, rows, j, column.vocabulary))
        for j, column in enumerate(columns)
    )
    onehot = data.categories == "onehot"
    width = len(numbers) + sum(len(f.vocabulary) if onehot else 1 for f in features if f.kind == "text")
    integer = (
        affine.identity
        and all(columns[j].integer and fills[j] is None for j in numbers)
        and (not onehot or len(numbers) == len(columns))
    )
    shape = _shaped(data.shape or (width,), width, raw)
    return Encoding((len(columns),), shape, integer, target, affine, label, features, onehot, rules)


def _fills(
    table: Array, rows: Mask | None, numbers: list[int], rule: str, found: Moments | None
) -> dict[int, float | None]:
    if rule == "mean" and found is not None:
        return {j: float(found.mean[i]) for i, j in enumerate(numbers)}
    if rule == "zero":
        return dict.fromkeys(numbers, 0.0)
    if rule != "median":
        return dict.fromkeys(numbers)
    fills: dict[int, float | None] = {}
    for j in numbers:
        values = table[:, j] if rows is None else table[rows, j]
        values = values[~np.isnan(values)]
        fills[j] = float(np.median(values)) if len(values) else 0.0
    return fills


def _words(table: Array, rows: Mask | None, j: int, vocabulary: tuple[str, ...]) -> tuple[str, ...]:
    codes = table[:, j] if rows is None else table[rows, j]
    seen = np.unique(codes[codes >= 0]).astype(np.int64)
    return tuple(sorted(vocabulary[code] for code in seen))
