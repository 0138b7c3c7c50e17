"""Data that comes after training, read by the stored encoding: to predict for, or to evaluate on."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dptrain.data import cache, scan, source
from dptrain.data.dataset import Part, open_part
from dptrain.data.encoding import Encoding, encoding_of
from dptrain.data.prepare import check_like_training, part_plan
from dptrain.data.raw import Column, Raw, Request, chunks
from dptrain.data.store import Opened
from dptrain.errors import DataError
from dptrain.job import spec
from dptrain.layout import Array


def _raw(path: Path, encoding: Encoding, folder: Path | None, where: str, labelled: bool) -> tuple[Raw, Request]:
    data = spec.rebuild(spec.Data, {**encoding.rules, "format": "auto"})
    kind = source.format_of(str(path), path, data, where)
    table = kind in ("csv", "parquet")
    if table != (not encoding.direct):
        raise DataError(
            f"{where}: {path}" if where else str(path),
            expected="a table" if not encoding.direct else "arrays or images, as for training",
            found="arrays" if not table else "a table",
            cure="give data of the training data's format",
        )
    known = (*(Column(f.name, f.kind) for f in encoding.features), Column(data.label, "text")) if table else ()
    request = Request(data, cache.locate(folder), where, "test", labelled=labelled, known=known)
    return source.read(kind, str(path), path, request, 0), request


def read_for_prediction(
    path: Path,
    encoding: Encoding,
    *,
    dtype: npt.DTypeLike = np.float32,
    cache: Path | None = None,
    where: str = "",
) -> tuple[Array, npt.NDArray[np.int64]]:
    """Unlabelled rows of a file as the model's x (n, *sample_shape), and their row numbers in the file.

    The numbers differ from range(n) only where the stored rules leave rows out. DataError as for training data.
    """
    raw, request = _raw(path, encoding, cache, where, labelled=False)
    check_like_training(raw, encoding)
    kept = scan.keep(raw, request)
    rows = np.arange(raw.x.rows) if kept is None else kept
    opened = Opened(raw.x)
    lookup = encoding.lookup([column.vocabulary for column in raw.columns or ()])
    x = np.empty((len(rows), *encoding.sample_shape), dtype)
    for lo, hi in chunks(len(rows), opened.array[0].nbytes):
        opened.check()
        encoding.write(opened.array[rows[lo:hi]], x[lo:hi], lookup)
    return x, rows


def open_for_evaluation(path: Path, plan: Mapping[str, Any], *, cache: Path | None = None, where: str = "") -> Part:
    """Labelled rows of a new file as a part, by the encoding of a prepared plan. DataError as for training data."""
    encoding = encoding_of(plan["encoding"])
    raw, request = _raw(path, encoding, cache, where, labelled=True)
    return open_part(part_plan(raw, request, encoding), encoding, 0, {})
