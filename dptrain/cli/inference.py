"""``dptrain eval`` and ``dptrain predict``: a run's weights applied to rows."""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dptrain.cli.progress import pairs
from dptrain.errors import DataError, StorageError, UsageError

if TYPE_CHECKING:
    import numpy.typing as npt

    from dptrain.api import Trained

    Array = npt.NDArray[Any]


def evaluate(run: Path, data: Path | None, as_json: bool) -> None:
    """Print the loss and metrics of a run's weights on its test part, or on the rows of ``data``."""
    from dptrain.api import load

    figures = load(run).evaluate(data)
    print(json.dumps(figures) if as_json else pairs(figures))


def predict(run: Path, data: Path, out: Path, classes: bool) -> None:
    """Write the model's output for every row of ``data`` (.npy) to ``out``, or each row's class.

    A class is written by its name where the labels had names, else by its number.
    """
    from dptrain.api import load

    trained = load(run)
    rows = _read(data)
    _write(out, _classes(trained, rows) if classes else trained.predict(rows))
    print(f"{len(rows)} rows: {out}")


def _classes(trained: "Trained", rows: "Array") -> "Array":
    import numpy as np

    target = trained.encoding.target
    if target.kind != "classes":
        raise UsageError(
            "--classes",
            expected="a model of classes",
            found=f"one of {target.width} numbers a row",
            cure="leave --classes out",
        )
    z = trained.predict(rows)
    # A single output is the logit of the second of two classes.
    likeliest: Array = (z[:, 0] > 0).astype(np.int64) if z.shape[1:] == (1,) else z.argmax(axis=-1)
    return np.array(target.names)[likeliest] if target.names else likeliest


def _read(path: Path) -> "Array":
    import numpy as np

    cure = "write it with numpy.save(path, array)"
    try:
        with path.open("rb") as file:
            if file.read(6) != b"\x93NUMPY":
                raise DataError(str(path), expected="a .npy file", found="something else", cure=cure)
        rows: Array = np.load(path, mmap_mode="r", allow_pickle=False)
    except OSError as error:
        raise DataError(
            str(path), expected="a readable .npy file", found=error.strerror or str(error), cure="check the path"
        ) from None
    except (ValueError, EOFError) as error:
        raise DataError(
            str(path), expected="a whole .npy file of numbers", found=str(error).split(".")[0], cure=cure
        ) from None
    if rows.ndim < 1:
        raise DataError(str(path), expected="rows of features", found="a single value", cure="one row a sample")
    return rows


def _write(path: Path, values: "Array") -> None:
    import numpy as np

    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            np.save(file, values, allow_pickle=False)
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise StorageError(
            str(path), expected="to be written", found=error.strerror or str(error), cure="choose another --out"
        ) from None
