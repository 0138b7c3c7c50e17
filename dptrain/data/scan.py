"""Looking at every row once: which of them can be used, and which must be refused."""

import numpy as np
import numpy.typing as npt

from dptrain.data.raw import Column, Raw, Request, chunks
from dptrain.data.store import Opened
from dptrain.errors import DataError

Rows = npt.NDArray[np.int64]


def keep(raw: Raw, request: Request) -> Rows | None:
    """The rows that can be used, in order; None where all can.

    By the job's rules NaN, infinities and missing values are refused (DataError with the place of the first) or
    their rows left out.
    """
    bad = _bad_in_table(raw, request) if raw.columns is not None else _bad_in_arrays(raw, request)
    if not len(bad):
        return None
    kept = np.setdiff1d(np.arange(raw.x.rows), bad, assume_unique=False)
    if not len(kept):
        raise DataError(raw.where, expected="a row without NaN or gaps", found="none", cure="clean the data")
    return kept


def _bad_in_arrays(raw: Raw, request: Request) -> Rows:
    found = []
    for what, store in (("column", raw.x), ("label column", raw.y)):
        if store is None or np.dtype(store.dtype).kind != "f":
            continue
        array = Opened(store).array
        flat = array.reshape(len(array), -1)
        for lo, hi in chunks(len(flat), flat.nbytes // len(flat)):
            finite = np.isfinite(flat[lo:hi])
            if finite.all():
                continue
            rows = np.flatnonzero(~finite.all(axis=1))
            if request.data.nan == "error":
                row, column = lo + int(rows[0]), int(finite[rows[0]].argmin())
                raise DataError(
                    f"{raw.where} row {row} {what} {column}",
                    expected="a finite number",
                    found=_spelt(flat[row, column]),
                    cure='clean it or set data.nan = "skip"',
                )
            found.append(lo + rows)
    return np.unique(np.concatenate(found)) if found else np.zeros(0, np.int64)


def _spelt(value: float) -> str:
    return "NaN" if np.isnan(value) else "infinity" if value > 0 else "-infinity"


def _bad_in_table(raw: Raw, request: Request) -> Rows:
    columns = [(column, False) for column in raw.columns or ()]
    columns += [(raw.label, True)] if raw.label is not None else []
    for column, label in columns:
        _check(raw, request, column, label)
    drop = request.data.missing == "drop" and any(column.missing for column, _ in columns)
    skip = any(column.first_infinite for column, _ in columns)
    if not drop and not skip:
        return np.zeros(0, np.int64)
    text = np.array([column.kind == "text" for column, _ in columns])
    x = Opened(raw.x).array
    y = Opened(raw.y).array if raw.y is not None else None
    found = []
    for lo, hi in chunks(len(x), x[0].nbytes):
        block = x[lo:hi] if y is None else np.column_stack([x[lo:hi], y[lo:hi]])
        bad = np.isinf(block).any(axis=1)
        if drop:
            bad |= (np.isnan(block) | (text & (block < 0))).any(axis=1)
        found.append(lo + np.flatnonzero(bad))
    return np.concatenate(found)


def _check(raw: Raw, request: Request, column: Column, label: bool) -> None:
    place = f"column {column.name!r}"
    if column.missing and (request.data.missing == "error" or (label and request.data.missing != "drop")):
        raise DataError(
            f"{raw.where} {column.first_missing} {place}",
            expected="a value",
            found=f"none, as in {column.missing} of {raw.x.rows} rows",
            cure='fill it in or set data.missing = "drop"'
            if label
            else "fill it in or set data.missing to mean, median, zero or drop",
        )
    if column.first_infinite and request.data.nan == "error":
        raise DataError(
            f"{raw.where} {column.first_infinite} {place}",
            expected="a finite number",
            found="infinity",
            cure='clean it or set data.nan = "skip"',
        )
