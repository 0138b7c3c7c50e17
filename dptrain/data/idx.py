"""IDX files, plain or gzipped: MNIST, Fashion-MNIST and their like (format: yann.lecun.com/exdb/mnist)."""

import contextlib
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import numpy as np

from dptrain.data import cache
from dptrain.data.raw import Raw, Request, Role, checked, written
from dptrain.data.store import Store, check_shape, describe_npy, shown, unreadable
from dptrain.errors import DataError
from dptrain.layout import Array

_TYPES = {0x08: "|u1", 0x09: "|i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
_PREFIX = {"train": "train", "validation": "validation", "test": "t10k"}


class _Readable(Protocol):
    def read(self, size: int, /) -> bytes: ...


def images_of(path: Path, role: Role) -> Path | None:
    """The file of images for ``role`` in a folder, or None."""
    for suffix in ("", ".gz"):
        for dot in ("-", "."):
            found = path / f"{_PREFIX[role]}-images{dot}idx3-ubyte{suffix}"
            if found.is_file():
                return found
    return None


def read_idx(path: Path, request: Request) -> Raw:
    """A folder with images and labels as MNIST names them, or one file of images with the labels beside it."""
    where = shown(path, request.where)
    images = path if path.is_file() else images_of(path, request.role) or images_of(path, "train")
    if images is None and not request.labelled:
        images = images_of(path, "test")
    if images is None:
        raise DataError(
            where,
            expected=f"a file {_PREFIX[request.role]}-images-idx3-ubyte, plain or .gz",
            found="none",
            cure="name a folder with IDX files as MNIST has them",
        )
    stores, digests = [], []
    for file in [images, _labels_of(images, where)] if request.labelled else [images]:
        digests.append(cache.file_digest(file, request.cache, request.where))
        stores.append(_array(file, digests[-1], request))
    x = stores[0]
    # Pictures without a channel axis get one: all images are (height, width, channels).
    shape = (*x.shape[1:], 1) if len(x.shape) == 3 else None
    pixels = 255.0 if x.dtype == "|u1" and len(x.shape) >= 3 else 0.0
    y = stores[1] if request.labelled else None
    return checked(Raw(shown(images, request.where), x, y, tuple(digests), pixels=pixels, shape=shape))


def _labels_of(images: Path, where: str) -> Path:
    name = images.name.replace("images", "labels").replace("idx3", "idx1")
    plain = name.removesuffix(".gz")
    for found in (images.with_name(name), images.with_name(plain), images.with_name(plain + ".gz")):
        if found.is_file() and found != images:
            return found
    raise DataError(where, expected=f"labels in {name} beside {images.name}", found="no such file", cure="put it there")


def _array(path: Path, digest: str, request: Request) -> Store:
    where = shown(path, request.where)
    if path.suffix == ".gz":
        return _unpacked(path, digest, request)
    with _reading(path, request.where), open(path, "rb") as file:
        shape, dtype, offset = _header(file, where)
        size = os.fstat(file.fileno()).st_size
    declared = offset + math.prod(shape) * np.dtype(dtype).itemsize
    if size != declared:
        raise _wrong_size(where, shape, declared, f"{size} bytes")
    return Store(os.path.abspath(path), shape, dtype, offset, size)


@contextlib.contextmanager
def _reading(path: Path, where: str) -> Iterator[None]:
    import zlib

    try:
        yield
    except (EOFError, zlib.error) as error:
        raise DataError(
            shown(path, where), expected="a whole gzip file", found="a damaged one", cure="fetch it again"
        ) from error
    except OSError as error:
        raise unreadable(error, path, where) from error


def _header(file: _Readable, where: str) -> tuple[tuple[int, ...], str, int]:
    magic = file.read(4)
    if len(magic) < 4 or magic[:2] != b"\0\0" or magic[2] not in _TYPES or not 1 <= magic[3] <= 8:
        raise DataError(where, expected="an IDX file", found=f"first bytes {magic!r}", cure="check data.source")
    sizes = file.read(4 * magic[3])
    shape = tuple(int(n) for n in np.frombuffer(sizes[: len(sizes) // 4 * 4], dtype=">u4"))
    if len(shape) != magic[3]:
        raise DataError(where, expected="a whole IDX header", found=f"{4 + len(sizes)} bytes", cure="fetch it again")
    return check_shape(shape, where), _TYPES[magic[2]], 4 + 4 * magic[3]


def _wrong_size(where: str, shape: tuple[int, ...], declared: int, found: str) -> DataError:
    return DataError(
        where,
        expected=f"{declared} bytes for shape {shape}",
        found=found,
        cure="the file is cut off or forged; fetch it again",
    )


def _unpacked(path: Path, digest: str, request: Request) -> Store:
    import gzip

    where = shown(path, request.where)

    def blocks(file: _Readable, shape: tuple[int, ...], dtype: str, offset: int) -> Iterator[Array]:
        row = math.prod(shape[1:]) * np.dtype(dtype).itemsize
        left = shape[0]
        while left:
            rows = min(left, max(1, (1 << 20) // row))
            block = file.read(rows * row)
            if len(block) != rows * row:
                declared = offset + shape[0] * row
                raise _wrong_size(where, shape, declared, f"{declared - left * row + len(block)} bytes")
            left -= rows
            yield np.frombuffer(block, dtype=dtype).reshape(rows, *shape[1:])
        if file.read(1):
            raise _wrong_size(where, shape, offset + shape[0] * row, "more")

    def build(into: Path) -> None:
        with _reading(path, request.where), gzip.open(path) as file:
            shape, dtype, offset = _header(file, where)
            nbytes = math.prod(shape) * np.dtype(dtype).itemsize
            if nbytes > request.data.max_bytes:
                raise DataError(
                    where,
                    expected=f"at most {request.data.max_bytes} bytes",
                    found=f"{nbytes} bytes",
                    cure="raise data.max_bytes",
                )
            cache.room(request.cache, nbytes)
            written(into, "array", dtype, shape[1:], blocks(file, shape, dtype, offset))

    made = cache.entry(request.cache, "idx-" + cache.key(digest), build)
    return describe_npy(made / "array.npy", where)[0]
