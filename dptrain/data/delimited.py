"""Delimited text (CSV), plain or gzipped, with a first line of column names."""

import contextlib
import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import numpy.typing as npt

from dptrain.data.raw import Column, Raw, Request
from dptrain.data.store import shown, unreadable
from dptrain.data.table import MISSING, Place, TableWriter, parsed, wanted
from dptrain.errors import DataError

_ROWS = 16_384


class _Text(Exception):
    """Columns taken for numbers hold text: the file is to be read again with them as text."""

    def __init__(self, names: set[str]) -> None:
        self.names = names


class _Limited(io.RawIOBase):
    """Passes bytes on and refuses more than ``limit`` of them."""

    def __init__(self, source: IO[bytes], limit: int, where: str) -> None:
        self._source = source
        self._left = limit
        self._where = where

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        block = self._source.read(len(buffer))
        self._left -= len(block)
        if self._left < 0:
            raise DataError(
                self._where,
                expected="no more bytes unpacked than data.max_bytes",
                found="more",
                cure="raise data.max_bytes if the file is to be trusted",
            )
        buffer[: len(block)] = block
        return len(block)


def read_csv(path: Path, request: Request) -> Raw:
    """A CSV file. Columns in which every value is a number are numbers, all others text."""
    return parsed(path, request, "csv", _parse)


@contextlib.contextmanager
def _rows(path: Path, request: Request) -> Iterator[Any]:
    import gzip
    import zlib

    where = shown(path, request.where)
    if len(request.data.delimiter) != 1:
        raise DataError(
            where, expected="one character", found=repr(request.data.delimiter), cure="correct data.delimiter"
        )
    reader = None
    try:
        with cast("IO[bytes]", gzip.open(path) if path.suffix == ".gz" else open(path, "rb")) as file:
            limited = io.BufferedReader(_Limited(file, request.data.max_bytes, where), 1 << 20)
            with io.TextIOWrapper(limited, encoding="utf-8-sig", newline="") as text:
                reader = csv.reader(text, delimiter=request.data.delimiter, strict=True)
                yield reader
    except (csv.Error, UnicodeDecodeError) as error:
        line = f" line {reader.line_num + 1}" if reader else ""
        found = "bytes that are none" if isinstance(error, UnicodeDecodeError) else str(error)
        raise DataError(where + line, expected="UTF-8 text in columns", found=found, cure="correct it") from error
    except (EOFError, zlib.error) as error:
        raise DataError(where, expected="a whole gzip file", found="a damaged one", cure="write it again") from error
    except OSError as error:
        raise unreadable(error, path, request.where) from error


def _parse(path: Path, into: Path, request: Request) -> None:
    kinds = {column.name: column.kind for column in request.known[:-1]}
    text = {name for name, kind in kinds.items() if kind == "text"}
    fixed = {name for name, kind in kinds.items() if kind == "number"}
    while True:
        try:
            _parse_as(path, into, request, text, fixed)
            return
        except _Text as more:
            text |= more.names


def _parse_as(path: Path, into: Path, request: Request, text: set[str], fixed: set[str]) -> None:
    where = shown(path, request.where)
    with _rows(path, request) as reader:
        names: list[str] = next(reader, [])
        _check_names(names, where)
        features, label = wanted(names, request, where)
        use = features if label is None else [*features, label]
        at = [names.index(name) for name in use]
        columns = [Column(name, "text" if name in text else "number", integer=name not in text) for name in use]
        writer = TableWriter(into, columns, label is not None, where, request.data.max_categories)
        try:
            start = reader.line_num
            while block := list(islice(reader, _ROWS)):
                rows, lines = _even(block, len(names), start, where)
                start = reader.line_num
                if rows:
                    _append(writer, list(zip(*rows, strict=True)), at, fixed, lines)
            writer.finish()
        finally:
            writer.close()


def _check_names(names: list[str], where: str) -> None:
    if not names:
        raise DataError(where, expected="a line of column names", found="an empty file", cure="give it some data")
    if all(_numbers(name.split()) is not None for name in names if name):
        raise DataError(
            f"{where} line 1",
            expected="the names of the columns",
            found="numbers",
            cure="put a line of names first",
        )


def _even(block: list[list[str]], width: int, start: int, where: str) -> tuple[list[list[str]], Place]:
    """The rows of a block that are not blank, and their lines; DataError for one of another width."""

    def line(index: int) -> int:
        above = sum(1 + sum(value.count("\n") for value in row) for row in block[:index])
        return start + 1 + above

    rows = block
    real: Sequence[int] = range(len(block))
    if set(map(len, block)) != {width}:
        ragged = next((i for i, row in enumerate(block) if row and len(row) != width), None)
        if ragged is not None:
            raise DataError(
                f"{where} line {line(ragged)}",
                expected=f"{width} columns",
                found=f"{len(block[ragged])}",
                cure="correct that line; a value with the delimiter in it needs quotes",
            )
        real = [i for i, row in enumerate(block) if row]
        rows = [block[i] for i in real]
    return rows, lambda i: f"line {line(real[i])}"


def _append(writer: TableWriter, values: list[Any], at: list[int], fixed: set[str], place: Place) -> None:
    blocks, turned = [], set()
    for j, index in enumerate(at):
        column = writer.columns[j]
        if column.kind == "text":
            blocks.append(writer.codes(j, values[index]))
            continue
        numbers = _numbers(values[index])
        if numbers is None and column.name in fixed:
            i, value = next((i, v) for i, v in enumerate(values[index]) if _numbers((v,)) is None)
            raise DataError(
                f"{writer.where} {place(i)} column {column.name!r}",
                expected="a number, as in the training data",
                found=repr(value),
                cure="correct that value",
            )
        if numbers is None:
            turned.add(column.name)
        elif column.integer and not _integers(numbers, values[index]):
            writer.columns[j] = replace(column, integer=False)
        blocks.append(numbers if numbers is not None else np.zeros(0))
    if turned:
        raise _Text(turned)
    writer.append(blocks, place)


def _numbers(values: Sequence[str]) -> npt.NDArray[np.float64] | None:
    """The values as numbers, NaN where missing; None where one is text."""
    if "_" in "".join(values):  # Python reads 1_000 as a number; no table means it so
        return None
    try:
        return np.fromiter(map(float, values), np.float64, len(values))
    except ValueError:
        pass
    try:
        return np.fromiter(
            (np.nan if value.strip() in MISSING else float(value) for value in values), np.float64, len(values)
        )
    except ValueError:
        return None


def _integers(numbers: npt.NDArray[np.float64], values: Sequence[str]) -> bool:
    real = numbers[np.isfinite(numbers)]
    if not np.array_equal(real, np.trunc(real)):
        return False
    written = "".join(value for value in values if value.strip() not in MISSING)
    return not any(mark in written for mark in ".eE")
