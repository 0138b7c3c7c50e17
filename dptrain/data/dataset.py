"""What every process opens: the parts of a prepared data set, and reading rows of them."""

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dptrain.data.encoding import Encoding, Lookup, Target, encoding_of
from dptrain.data.store import Opened, Store, store_of
from dptrain.layout import Array
from dptrain.random import Permutation, Purpose

Positions = npt.NDArray[np.int64]

_SMALL = 8_192
"""Up to so many rows the split's whole order is kept; above, only what is asked for is ever computed."""

__all__ = ["Dataset", "Part", "Target", "open_dataset", "open_part"]


class Part:
    """The training, validation or test rows, at positions 0 to ``rows`` - 1.

    ``rows_read`` counts the rows read so far; ``mapped`` is True where reading may touch the disk. Positions are
    mapped to rows of the files by the split's permutation and the list of kept rows, for the asked ones only.
    """

    def __init__(
        self,
        x: Opened,
        y: Opened,
        encoding: Encoding,
        *,
        rows: int,
        start: int = 0,
        permutation: Permutation | None = None,
        kept: Opened | None = None,
        lookup: Lookup | None = None,
    ) -> None:
        self.rows = rows
        self.rows_read = 0
        self.encoding = encoding
        self._x, self._y, self._kept = x, y, kept
        self._start = start
        self._permutation = permutation
        self._order: Positions | None = None
        self._lookup = lookup or {}
        # One row of an array source is one sample, whatever shape it was stored in.
        self._source = x.array.reshape(len(x.array), *encoding.sample_shape) if encoding.direct else x.array
        self._scratch = threading.local()

    @property
    def mapped(self) -> bool:
        """True where reading may touch the disk."""
        return self._x.mapped or self._y.mapped

    @property
    def waits(self) -> bool:
        """True where reading may wait for the disk: files too large to be asked for as a whole."""
        return self._x.waits or self._y.waits

    def file_rows(self, positions: Positions) -> Positions:
        """Where in the files the rows at ``positions`` lie. IndexError for a position outside the part."""
        if len(positions) and (int(positions.min()) < 0 or int(positions.max()) >= self.rows):
            raise IndexError(f"positions reach outside range({self.rows})")
        rows = positions + self._start
        if self._permutation is not None:
            rows = self._permuted(self._permutation, rows)
        if self._kept is not None:
            self._kept.check()
            rows = self._kept.array[rows].astype(np.int64, copy=False)
        return rows

    def _permuted(self, permutation: Permutation, rows: Positions) -> Positions:
        if permutation.n > _SMALL:
            return permutation.at(rows)
        if self._order is None:
            self._order = permutation.at(np.arange(permutation.n))
        return self._order[rows]

    def read(self, positions: Positions, x: Array, y: Array) -> None:
        """Fill x[:n] with the encoded rows at the n ``positions`` and y[:n] with their labels.

        ``x`` is C-contiguous (>= n, *sample_shape), ``y`` (>= n,) int64 for classes or (>= n, width) for numbers.
        Rows from n on stay untouched. DataError where a file changed its size since it was opened.
        """
        self.read_rows(self.file_rows(positions), x, y)

    def read_rows(self, rows: Positions, x: Array, y: Array) -> None:
        """As :meth:`read`, for rows that :meth:`file_rows` gave."""
        n = len(rows)
        self._x.check()
        self._y.check()
        self.rows_read += n
        source, out = self._source, x[:n]
        # mode="clip" spares a buffered copy; file_rows saw to it that no row is outside.
        if not source.flags.aligned:
            # take would copy the whole file into alignment first.
            self.encoding.write(source[rows], out, self._lookup)
        elif self.encoding.direct and source.dtype == x.dtype:
            np.take(source, rows, axis=0, out=out, mode="clip")
            self.encoding.affine.apply(out, out)
        else:
            self.encoding.write(self._taken("x", source, rows), out, self._lookup)
        labels = self._y.array
        taken = self._taken("y", labels, rows) if labels.flags.aligned else labels[rows]
        self.encoding.write_target(taken, y[:n])

    def _taken(self, what: str, source: Array, rows: Positions) -> Array:
        # Kept between reads, one for each reading thread.
        n = len(rows)
        memory: Array | None = getattr(self._scratch, what, None)
        if memory is None or len(memory) < n:
            memory = np.empty((n, *source.shape[1:]), source.dtype)
            setattr(self._scratch, what, memory)
        return np.take(source, rows, axis=0, out=memory[:n], mode="clip")


@dataclass(frozen=True)
class Dataset:
    """A prepared data set. ``integer`` says that features are integers for an embedding; ``digest`` what it holds."""

    sample_shape: tuple[int, ...]
    integer: bool
    target: Target
    train: Part
    validation: Part
    test: Part
    digest: str
    encoding: Encoding


def open_part(plan: Mapping[str, Any], encoding: Encoding, seed: int, opened: dict[Store, Opened]) -> Part:
    """A part from its plan. ``opened`` remembers what is open already, as parts share files."""

    def opening(store_plan: Mapping[str, Any]) -> Opened:
        store = store_of(store_plan)
        if store not in opened:
            opened[store] = Opened(store, scattered=True)
        return opened[store]

    return Part(
        opening(plan["x"]),
        opening(plan["y"]),
        encoding,
        rows=plan["rows"],
        start=plan["start"],
        permutation=Permutation(plan["permuted"], seed, Purpose.SPLIT) if plan["permuted"] else None,
        kept=opening(plan["kept"]) if plan["kept"] else None,
        lookup={int(j): np.array(codes, dtype=np.int64) for j, codes in plan["lookup"].items()},
    )


def open_dataset(plan: Mapping[str, Any]) -> Dataset:
    """The data set that :func:`dptrain.data.prepare.prepare` planned; quick, as all checking is done.

    Raises DataError where a file is gone or has another size than it had then.
    """
    encoding = encoding_of(plan["encoding"])
    opened: dict[Store, Opened] = {}
    train, validation, test = (
        open_part(plan["parts"][role], encoding, plan["seed"], opened) for role in ("train", "validation", "test")
    )
    return Dataset(
        encoding.sample_shape, encoding.integer, encoding.target, train, validation, test, plan["digest"], encoding
    )
