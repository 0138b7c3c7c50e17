"""Parquet tables, read with pyarrow (the extra ``parquet``)."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dptrain.data.raw import Column, Raw, Request
from dptrain.data.store import shown
from dptrain.data.table import TableWriter, parsed, wanted
from dptrain.errors import DataError


def read_parquet(path: Path, request: Request) -> Raw:
    """A Parquet file of numbers, truth values and text, parsed into the cache once."""
    return parsed(path, request, "parquet", _parse)


def _parse(path: Path, into: Path, request: Request) -> None:
    where = shown(path, request.where)
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise DataError(
            where,
            expected="the package pyarrow, which reads Parquet",
            found="none installed",
            cure="pip install 'dptrain[parquet]'",
        ) from error
    try:
        with parquet.ParquetFile(path) as file:
            _write(file, into, request, where)
    except (pyarrow.ArrowException, OSError) as error:
        found = str(error).splitlines()[0].rstrip(".") if str(error) else "a damaged one"
        raise DataError(where, expected="a Parquet file", found=found, cure="write the file again") from error


def _write(file: Any, into: Path, request: Request, where: str) -> None:
    schema = file.schema_arrow
    features, label = wanted(schema.names, request, where)
    use = features if label is None else [*features, label]
    known = {column.name: column for column in request.known[:-1]}
    columns = [_column(name, schema.field(name).type, known.get(name), where) for name in use]
    declared = sum(file.metadata.row_group(i).total_byte_size for i in range(file.metadata.num_row_groups))
    if declared > request.data.max_bytes:
        raise DataError(
            where,
            expected=f"at most {request.data.max_bytes} bytes unpacked",
            found=f"{declared}",
            cure="raise data.max_bytes",
        )
    writer = TableWriter(into, columns, label is not None, where, request.data.max_categories)
    try:
        for batch in file.iter_batches(batch_size=65_536, columns=use):
            first = writer.rows
            blocks = [_block(writer, j, batch.column(name)) for j, name in enumerate(use)]
            if len(batch):
                writer.append(blocks, lambda i, first=first: f"row {first + i}")  # type: ignore[misc]
        writer.finish()
    finally:
        writer.close()


def _column(name: str, kind: Any, known: Column | None, where: str) -> Column:
    from pyarrow import types

    if types.is_dictionary(kind):
        kind = kind.value_type
    if types.is_string(kind) or types.is_large_string(kind):
        found = Column(name, "text")
    elif types.is_integer(kind) or types.is_boolean(kind):
        found = Column(name, "number", integer=True)
    elif types.is_floating(kind) or types.is_decimal(kind):
        found = Column(name, "number")
    else:
        raise DataError(
            f"{where} column {name!r}",
            expected="numbers or text",
            found=f"{kind}",
            cure="leave it out of data.features",
        )
    if known is not None and known.kind != found.kind:
        raise DataError(
            f"{where} column {name!r}",
            expected=f"{known.kind}, as in the training data",
            found=f"{kind}",
            cure="convert the column",
        )
    return found


def _block(writer: TableWriter, j: int, column: Any) -> npt.NDArray[np.float64]:
    if writer.columns[j].kind == "text":
        return writer.codes(j, column.to_pylist())
    numbers = column.cast("float64", safe=False).to_numpy(zero_copy_only=False)
    return np.asarray(numbers, dtype=np.float64)
