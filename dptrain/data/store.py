"""Arrays in files: described once from their headers, mapped by every process, checked before every read."""

import io
import math
import mmap
import os
import threading
import warnings
import weakref
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, BinaryIO

import numpy as np

from dptrain.errors import DataError
from dptrain.layout import Array

LONGEST_HEADER = 10_000
LARGE = 1 << 28
"""Bytes up to which the system is asked to read a file as a whole; above, rows are read as they are wanted."""
EMBEDDED = {"digits": "digits.npz"}


def shown(path: str | os.PathLike[str], where: str = "") -> str:
    """How a message names a file: with the caller's place before it."""
    return f"{where}: {os.fspath(path)}" if where else os.fspath(path)


def unreadable(error: OSError, path: str | os.PathLike[str], where: str = "") -> DataError:
    """The sentence for a file that the system won't open or read."""
    return DataError(
        shown(path, where),
        expected="a readable file",
        found=(error.strerror or str(error)).lower(),
        cure="correct the path or its permissions",
    )


@dataclass(frozen=True, slots=True)
class Store:
    """One array of rows: ``shape`` and ``dtype`` at ``offset`` of a file of ``size`` bytes, in C order.

    An embedded array has a ``path`` of the form ``embedded:name/member`` and neither offset nor size.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    offset: int = 0
    size: int = 0

    @property
    def rows(self) -> int:
        """The length of the first axis."""
        return self.shape[0]

    def plan(self) -> dict[str, Any]:
        """The store as plain data, the reverse of :func:`store_of`."""
        return asdict(self) | {"shape": list(self.shape)}


def store_of(plan: Mapping[str, Any]) -> Store:
    """A store from its plain data."""
    return Store(**(dict(plan) | {"shape": tuple(plan["shape"])}))


class Opened:
    """A store opened for reading: ``array`` is a read-only view of its rows; ``mapped`` tells a file from memory.

    ``scattered`` says that rows will be read in random order. ``waits`` tells that reading may wait for the disk, so
    that it is worth reading ahead.
    """

    def __init__(self, store: Store, *, scattered: bool = False) -> None:
        self.store = store
        self.mapped = not store.path.startswith("embedded:")
        self.waits = self.mapped and store.size > LARGE
        self._map: mmap.mmap | None = None
        if not self.mapped:
            self.array = _embedded(store)
            return
        try:
            self._handle = os.open(store.path, os.O_RDONLY | os.O_CLOEXEC)
            weakref.finalize(self, os.close, self._handle)
            self._modified = os.fstat(self._handle).st_mtime_ns
            self._map = mmap.mmap(self._handle, 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise unreadable(error if isinstance(error, OSError) else OSError(str(error)), store.path) from error
        self.check()
        if not self.waits and hasattr(mmap, "MADV_WILLNEED"):
            self._map.madvise(mmap.MADV_WILLNEED)
        elif scattered and hasattr(mmap, "MADV_RANDOM"):
            # A page for each row is enough; more would be read around it in vain.
            self._map.madvise(mmap.MADV_RANDOM)
        count = math.prod(store.shape)
        flat = np.frombuffer(self._map, dtype=store.dtype, count=count, offset=store.offset)
        self.array = flat.reshape(store.shape)

    def check(self) -> None:
        """Raise DataError where the file was changed since it was opened.

        To be called before a mapped array is touched: reading behind the end of a file kills the process.
        """
        if self._map is None:
            return
        found = os.fstat(self._handle)
        if found.st_size != self.store.size:
            raise self._changed(f"{self.store.size} bytes", f"{found.st_size} bytes")
        if found.st_mtime_ns != self._modified:
            raise self._changed("the same content", "that it was written to since")

    def _changed(self, expected: str, found: str) -> DataError:
        return DataError(
            self.store.path,
            expected=f"{expected}, as when it was opened",
            found=found,
            cure="don't change data files while a job reads them; start again",
        )


_PARSING = threading.Lock()
"""numpy takes headers apart with ``ast``, whose count of recursions CPython before 3.11.8 keeps for all threads: it
raises SystemError now and then where two parse at once (python/cpython#106905)."""


def _embedded(store: Store) -> Array:
    name, member = store.path.removeprefix("embedded:").split("/")
    path = os.path.join(os.path.dirname(__file__), "embedded", EMBEDDED[name])
    with _PARSING, np.load(path, allow_pickle=False) as members:
        array: Array = members[member].reshape(store.shape)
    array.flags.writeable = False
    return array


@dataclass(frozen=True, slots=True)
class Header:
    """What an npy header declares; ``length`` is where the data begins."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    fortran: bool
    length: int

    @property
    def nbytes(self) -> int:
        """Bytes of data that must follow."""
        return math.prod(self.shape) * self.dtype.itemsize


def npy_header(file: BinaryIO, where: str) -> Header:
    """Read and check the header at the start of an npy stream; numbers and text only, never objects.

    Reads at most LONGEST_HEADER bytes, whatever the header claims. Raises DataError naming ``where``.
    """
    start = file.read(12)
    version = tuple(start[6:8])
    if start[:6] != b"\x93NUMPY" or version not in ((1, 0), (2, 0)):
        raise _bad_header(where, "no npy header" if start[:6] != b"\x93NUMPY" else f"npy version {version}")
    before = 10 if version == (1, 0) else 12
    length = int.from_bytes(start[8:before], "little")
    if length > LONGEST_HEADER:
        raise _bad_header(where, f"a header of {length} bytes")
    text = io.BytesIO(start[8:] + file.read(before + length - 12))
    read = np.lib.format.read_array_header_1_0 if before == 10 else np.lib.format.read_array_header_2_0
    try:
        with _PARSING, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            shape, fortran, dtype = read(text)
    except Exception as error:  # numpy parses a literal here; whatever it trips over, the header is not one
        raise _bad_header(where, "a broken npy header") from error
    if dtype.hasobject:
        raise DataError(
            where,
            expected="an array of numbers or fixed-width text",
            found="an object array, which would need pickle",
            cure="save it again with a numeric dtype",
        )
    if dtype.kind not in "biufUS" or (dtype.kind == "f" and dtype.itemsize > 8):
        raise DataError(
            where,
            expected="integers, floating-point numbers or text",
            found=f"dtype {dtype}",
            cure="convert the array",
        )
    if any(n < 0 for n in shape):
        raise _bad_header(where, f"shape {shape}")
    return Header(tuple(int(n) for n in shape), dtype, bool(fortran) and len(shape) > 1, before + length)


def _bad_header(where: str, found: str) -> DataError:
    return DataError(
        where,
        expected="an npy array as numpy.save writes it",
        found=found,
        cure="write the file again with numpy.save",
    )


def describe_npy(path: str | os.PathLike[str], where: str = "") -> tuple[Store, bool]:
    """An npy file's store and whether its order is Fortran's, from header and size alone.

    DataError where the file's size is not what the header declares.
    """
    place = shown(path, where)
    try:
        with open(path, "rb") as file:
            header = npy_header(file, place)
            size = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise unreadable(error, path, where) from error
    if size != header.length + header.nbytes:
        raise DataError(
            place,
            expected=f"{header.length + header.nbytes} bytes for shape {header.shape} of {header.dtype}",
            found=f"{size} bytes",
            cure="the file is cut off or forged; write it again",
        )
    store = Store(
        os.path.abspath(path),
        check_shape(header.shape, place),
        header.dtype.str,
        header.length,
        size,
    )
    return store, header.fortran


def check_shape(shape: tuple[int, ...], where: str) -> tuple[int, ...]:
    """The shape of an array of rows; DataError where there is no row or a row is empty."""
    if not shape or math.prod(shape) == 0:
        raise DataError(where, expected="at least one row", found=f"shape {shape}", cure="give it some data")
    return shape
