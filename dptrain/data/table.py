"""A table on its way into the cache: columns of numbers and text, block by block, as one mapped matrix."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dptrain.data import cache
from dptrain.data.raw import Column, NpyWriter, Raw, Request, checked
from dptrain.data.store import describe_npy, shown
from dptrain.errors import DataError

MISSING = frozenset({"", "NA", "N/A", "NaN", "nan", "NULL", "null"})
"""How a text file says that a value is missing."""

Place = Callable[[int], str]
"""From a row's number within a block to its place in the file, for messages."""


class TableWriter:
    """Writes the columns of a table: features as one float64 matrix x.npy, the label as y.npy."""

    def __init__(self, folder: Path, columns: Sequence[Column], labelled: bool, where: str, most: int) -> None:
        self.columns = list(columns)
        self.where = where
        self.most = most
        self._labelled = labelled
        self._vocabularies: list[dict[str, int]] = [{} for _ in columns]
        self._folder = folder
        self.rows = 0
        with cache.writing(folder):
            self._x = NpyWriter(folder / "x.npy", np.float64, (len(columns) - labelled,))
            self._y = NpyWriter(folder / "y.npy", np.float64, ()) if labelled else None

    def append(self, blocks: Sequence[npt.NDArray[np.float64]], place: Place) -> None:
        """Add rows, one array for each column: numbers, or codes from :meth:`codes`."""
        for j, values in enumerate(blocks):
            self._note(j, values, place)
        features = blocks[:-1] if self._labelled else blocks
        with cache.writing(self._folder):
            self._x.append(np.stack(features, axis=1))
            if self._y is not None:
                self._y.append(blocks[-1])
        self.rows += len(blocks[0])

    def _note(self, j: int, values: npt.NDArray[np.float64], place: Place) -> None:
        column = self.columns[j]
        missing = np.isnan(values) if column.kind == "number" else values < 0
        if column.kind == "number" and not column.first_infinite and (infinite := np.isinf(values)).any():
            self.columns[j] = column = replace(column, first_infinite=place(int(infinite.argmax())))
        if missing.any():
            first = column.first_missing or place(int(missing.argmax()))
            self.columns[j] = replace(column, missing=column.missing + int(missing.sum()), first_missing=first)

    def codes(self, j: int, values: Sequence[str | None]) -> npt.NDArray[np.float64]:
        """Text as positions in the column's vocabulary, which grows; -1 for None and what MISSING lists."""
        known = self._vocabularies[j]
        found = [-1 if value is None or value in MISSING else known.setdefault(value, len(known)) for value in values]
        if len(known) > self.most:
            raise DataError(
                f"{self.where} column {self.columns[j].name!r}",
                expected=f"at most {self.most} different texts",
                found="more",
                cure="leave the column out of data.features or raise data.max_categories",
            )
        return np.array(found, dtype=np.float64)

    def finish(self) -> None:
        """Write headers and the columns' description."""
        if not self.rows:
            raise DataError(self.where, expected="at least one row", found="none", cure="give it some data")
        columns = [
            replace(column, vocabulary=tuple(known))
            for column, known in zip(self.columns, self._vocabularies, strict=True)
        ]
        with cache.writing(self._folder):
            self._x.finish()
            if self._y is not None:
                self._y.finish()
            (self._folder / "columns.json").write_text(json.dumps([asdict(column) for column in columns]))

    def close(self) -> None:
        """Close the files, finished or not."""
        self._x.close()
        if self._y is not None:
            self._y.close()


def column_of(plan: dict[str, object]) -> Column:
    """A column from its plain data."""
    return Column(**(plan | {"vocabulary": tuple(plan["vocabulary"])}))  # type: ignore[arg-type]


def wanted(names: Sequence[str], request: Request, where: str) -> tuple[list[str], str | None]:
    """Which of a file's columns are features and which is the label (None where no labels are wanted)."""
    if len(set(names)) != len(names):
        twice = next(name for name in names if list(names).count(name) > 1)
        raise DataError(where, expected="each column name once", found=f"{twice!r} twice", cure="rename one")
    if request.known:
        features = [column.name for column in request.known[:-1]]
        label = request.known[-1].name
    else:
        label = request.data.label or names[-1]
        features = list(request.data.features) or [name for name in names if name != label]
    for name in [*features, label] if request.labelled else features:
        if name not in names:
            raise DataError(
                where,
                expected=f"a column {name!r}",
                found=f"columns {', '.join(names)}",
                cure="correct data.features or data.label",
            )
    if not features or label in features:
        raise DataError(where, expected="features apart from the label", found=f"{features}", cure="see data.features")
    return features, label if request.labelled else None


def parsed(path: Path, request: Request, kind: str, parse: Callable[[Path, Path, Request], None]) -> Raw:
    """A table file, parsed into the cache once: ``parse(path, into, request)`` fills an entry by a TableWriter."""
    digest = cache.file_digest(path, request.cache, request.where)
    data = request.data
    known = [[column.name, column.kind] for column in request.known[:-1]]
    rules = [list(data.features), data.label, data.delimiter, data.max_categories, request.labelled, known]
    made = cache.entry(request.cache, f"{kind}-" + cache.key(digest, rules), lambda into: parse(path, into, request))
    columns = tuple(column_of(plan) for plan in json.loads((made / "columns.json").read_text()))
    return checked(
        Raw(
            shown(path, request.where),
            describe_npy(made / "x.npy")[0],
            describe_npy(made / "y.npy")[0] if request.labelled else None,
            (digest,),
            columns=columns[:-1] if request.labelled else columns,
            label=columns[-1] if request.labelled else None,
            label_name=columns[-1].name if request.labelled else request.data.label,
        )
    )
