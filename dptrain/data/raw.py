"""Rows as they come from their files, before labels are numbered and features encoded."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from dptrain.data import cache
from dptrain.data.store import Store
from dptrain.errors import DataError
from dptrain.job import spec
from dptrain.layout import Array

Role = Literal["train", "validation", "test"]

CHUNK_BYTES = 1 << 23
"""How much of a file is looked at in one go."""


@dataclass(frozen=True)
class Column:
    """One column of a table file as it was read. Numbers are themselves and NaN where missing; text is its position
    in ``vocabulary`` and -1 where missing. ``first_missing`` and ``first_infinite`` are places, for messages."""

    name: str
    kind: Literal["number", "text"]
    integer: bool = False
    vocabulary: tuple[str, ...] = ()
    missing: int = 0
    first_missing: str = ""
    first_infinite: str = ""


@dataclass(frozen=True)
class Raw:
    """One part's files. ``columns`` (of x) and ``label`` describe a table and are None for arrays.

    ``pixels`` is the largest value of a pixel where the format says that rows are images, else 0; ``shape`` a row's
    shape where the format knows a better one than the array's. ``digests`` are the files' contents.
    """

    where: str
    x: Store
    y: Store | None
    digests: tuple[str, ...]
    columns: tuple[Column, ...] | None = None
    label: Column | None = None
    label_name: str = "label"
    pixels: float = 0.0
    shape: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Request:
    """What is wanted of a file: for which part, by which rules, with or without labels.

    ``known`` are the training part's columns (features, then label), which every other file must match.
    """

    data: spec.Data
    cache: Path
    where: str = ""
    role: Role = "train"
    labelled: bool = True
    known: tuple[Column, ...] = field(default=())


def chunks(rows: int, row_bytes: int) -> Iterable[tuple[int, int]]:
    """Ranges that cover range(rows), each of about CHUNK_BYTES."""
    step = max(1, CHUNK_BYTES // max(1, row_bytes))
    return ((at, min(rows, at + step)) for at in range(0, rows, step))


class NpyWriter:
    """Writes rows to a new npy file whose number of rows is only known at the end; to be closed by ``finish``."""

    HEADER = 256

    def __init__(self, path: Path, dtype: npt.DTypeLike, sample: tuple[int, ...]) -> None:
        self.path = path
        self.dtype = np.dtype(dtype)
        self.sample = sample
        self.rows = 0
        self._file = open(path, "wb", buffering=0)  # noqa: SIM115 - closed by finish and close
        self._file.write(bytes(self.HEADER))

    def append(self, rows: Array) -> None:
        """Add rows of shape (n, *sample)."""
        block = np.ascontiguousarray(rows, dtype=self.dtype)
        view = memoryview(block.reshape(-1).view(np.uint8).data)
        while view:
            view = view[self._file.write(view) :]
        self.rows += len(rows)

    def finish(self) -> Store:
        """The store of what was written."""
        shape = (self.rows, *self.sample)
        text = repr({"descr": self.dtype.str, "fortran_order": False, "shape": shape})
        header = b"\x93NUMPY\x01\x00" + (self.HEADER - 10).to_bytes(2, "little")
        self._file.seek(0)
        self._file.write(header + text.ljust(self.HEADER - 11).encode() + b"\n")
        self._file.close()
        size = self.HEADER + math.prod(shape) * self.dtype.itemsize
        return Store(str(self.path), shape, self.dtype.str, self.HEADER, size)

    def close(self) -> None:
        """Close the file, finished or not."""
        self._file.close()


def written(folder: Path, name: str, dtype: npt.DTypeLike, sample: tuple[int, ...], rows: Iterable[Array]) -> None:
    """Write ``name``.npy into a cache entry that is being built."""
    with cache.writing(folder):
        writer = NpyWriter(folder / f"{name}.npy", dtype, sample)
    try:
        for block in rows:
            with cache.writing(folder):
                writer.append(block)
        with cache.writing(folder):
            writer.finish()
    finally:
        writer.close()


def checked(raw: Raw) -> Raw:
    """``raw`` itself; DataError where features are no numbers, or labels are more or fewer than rows."""
    if np.dtype(raw.x.dtype).kind not in "biuf":
        raise DataError(raw.where, expected="numbers as features", found=raw.x.dtype, cure="convert the array")
    if raw.y is not None and raw.x.rows != raw.y.rows:
        raise DataError(
            raw.where,
            expected=f"a label for each of the {raw.x.rows} rows",
            found=f"{raw.y.rows} labels",
            cure="give features and labels of one length",
        )
    return raw
