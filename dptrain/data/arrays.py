"""Arrays by name: an npz file, a folder of npy files or a single npy file."""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from dptrain.data import cache
from dptrain.data.raw import Raw, Request, Role, checked, chunks, written
from dptrain.data.store import Opened, Store, describe_npy, npy_header, shown, unreadable
from dptrain.errors import DataError
from dptrain.layout import Array

if TYPE_CHECKING:
    from zipfile import ZipFile, ZipInfo

_X = ("x", "images", "features", "data")
_Y = ("y", "labels", "label", "targets", "target")
_ROLE = {"train": ("train",), "validation": ("validation", "valid", "val"), "test": ("test",)}
_MOST_DEFLATE = 1_100
"""Deflate can't pack better than 1,032 to 1."""


def _names(role: Role, bases: tuple[str, ...]) -> list[str]:
    return [name for word in _ROLE[role] for base in bases for name in (f"{base}_{word}", f"{word}_{base}")]


def own_part(names: Mapping[str, Any], role: Role) -> bool:
    """Whether the arrays bring a part of their own for ``role``, as x_test and y_test do."""
    lower = {name.lower() for name in names}
    return not lower.isdisjoint(_names(role, _X)) and not lower.isdisjoint(_names(role, _Y))


def choose(names: Mapping[str, Any], request: Request, where: str) -> tuple[str, str | None]:
    """The names of features and label among the arrays: as the job says, else by what they are called."""
    lower = {name.lower(): name for name in names}

    def pick(said: str, bases: tuple[str, ...], key: str) -> str:
        if said and said in names:
            return said
        wanted = [*_names(request.role, bases), *bases, *_names("train", bases)]
        found = None if said else next((lower[name] for name in wanted if name in lower), None)
        if found is None:
            listed = ", ".join(sorted(names)) or "none"
            raise DataError(
                where,
                expected=f"an array called {said or bases[0]!r}",
                found=f"arrays {listed}",
                cure=f"name it in data.{key}",
            )
        return found

    said = request.data.features
    if len(said) > 1:
        raise DataError(
            where, expected="one name in data.features", found=f"{len(said)}", cure="stack them in one array"
        )
    x = pick(said[0] if said else "", _X, "features")
    return x, pick(request.data.label, _Y, "label") if request.labelled else None


def folder_arrays(path: Path) -> dict[str, Path]:
    """The npy files of a folder by name."""
    return {file.stem: file for file in sorted(path.glob("*.npy"))}


def read_folder(path: Path, request: Request) -> Raw:
    """A folder of npy files, or one npy file of features where no labels are wanted. The files are mapped."""
    where = shown(path, request.where)
    files = folder_arrays(path) if path.is_dir() else {path.stem: path}
    if path.is_dir():
        x_name, y_name = choose(files, request, where)
    elif request.labelled:
        raise DataError(
            where, expected="features and labels", found="one npy file", cure="give a folder or an npz file"
        )
    else:
        x_name, y_name = path.stem, None
    used = [files[name] for name in (x_name, y_name) if name is not None]
    digests = tuple(cache.file_digest(file, request.cache, request.where) for file in used)
    stores = [
        c_order(*describe_npy(file, request.where), request.cache, digest)
        for file, digest in zip(used, digests, strict=True)
    ]
    place = shown(used[0], request.where)
    return checked(Raw(place, stores[0], stores[1] if y_name else None, digests, label_name=y_name or "label"))


def c_order(store: Store, fortran: bool, folder: Path, digest: str) -> Store:
    """The store itself, or, for Fortran's order, that of a copy with its rows in one piece each."""
    if not fortran:
        return store

    def build(into: Path) -> None:
        turned = Opened(Store(store.path, store.shape[::-1], store.dtype, store.offset, store.size)).array.T
        row = turned.nbytes // len(turned)
        cache.room(folder, turned.nbytes)
        blocks = (turned[lo:hi] for lo, hi in chunks(len(turned), row))
        written(into, "array", turned.dtype, turned.shape[1:], blocks)

    made = cache.entry(folder, "rows-" + cache.key(digest, store.shape, store.dtype), build)
    return describe_npy(made / "array.npy")[0]


@contextlib.contextmanager
def _opened(path: Path, where: str) -> "Iterator[tuple[ZipFile, dict[str, ZipInfo]]]":
    from zipfile import BadZipFile, ZipFile

    try:
        with ZipFile(path) as archive:
            infos = [info for info in archive.infolist() if info.filename.endswith(".npy")]
            yield archive, {info.filename.removesuffix(".npy"): info for info in infos}
    except OSError as error:
        raise unreadable(error, path, where) from error
    except (BadZipFile, EOFError, RuntimeError, NotImplementedError, ValueError) as error:
        raise DataError(
            shown(path, where),
            expected="an npz file as numpy.savez writes it",
            found=f"a broken archive ({str(error).lower() or type(error).__name__})",
            cure="write the file again with numpy.savez",
        ) from error


def npz_names(path: Path, where: str) -> list[str]:
    """The names of the arrays in an npz file."""
    with _opened(path, where) as (_, members):
        return list(members)


def read_npz(path: Path, request: Request) -> Raw:
    """An npz file. Its arrays are unpacked into the cache once, each checked against its header before."""
    where = shown(path, request.where)
    digest = cache.file_digest(path, request.cache, request.where)
    with _opened(path, request.where) as (archive, members):
        x_name, y_name = choose(members, request, where)
        stores = [
            _member(archive, members[name], f"{where} array {name!r}", digest, request)
            for name in (x_name, y_name)
            if name is not None
        ]
    return checked(Raw(where, stores[0], stores[1] if y_name else None, (digest,), label_name=y_name or "label"))


def _member(archive: "ZipFile", info: "ZipInfo", where: str, digest: str, request: Request) -> Store:
    _check_member(archive, info, where, request.data.max_bytes)

    def build(into: Path) -> None:
        cache.room(request.cache, info.file_size)
        with archive.open(info) as packed, cache.writing(request.cache), open(into / "array.npy", "wb") as file:
            _copy(packed, file, info.file_size, where)

    made = cache.entry(request.cache, "npz-" + cache.key(digest, info.filename), build)
    return c_order(*describe_npy(made / "array.npy", where), request.cache, f"{digest} {info.filename}")


def _check_member(archive: "ZipFile", info: "ZipInfo", where: str, limit: int) -> None:
    if info.flag_bits & 1 or info.compress_type not in (0, 8):
        raise DataError(where, expected="a stored or deflated member", found="another kind", cure="use numpy.savez")
    with archive.open(info) as packed:
        header = npy_header(packed, where)  # type: ignore[arg-type]
    declared = header.length + header.nbytes
    if declared != info.file_size or info.file_size > _MOST_DEFLATE * max(1, info.compress_size):
        raise DataError(
            where,
            expected=f"{declared} bytes for shape {header.shape} of {header.dtype}",
            found=f"{info.file_size} bytes, packed into {info.compress_size}",
            cure="the file is cut off or forged; write it again",
        )
    if declared > limit:
        raise DataError(
            where, expected=f"at most {limit} bytes", found=f"{declared} bytes", cure="raise data.max_bytes"
        )


def _copy(packed: IO[bytes], file: IO[bytes], size: int, where: str) -> None:
    left = size
    while left and (block := packed.read(min(left, 1 << 20))):
        left -= len(block)
        file.write(block)
    if left or packed.read(1):
        raise DataError(
            where,
            expected=f"{size} bytes",
            found=f"{size - left} bytes" if left else "more",
            cure="the file is cut off or forged; write it again",
        )


def text_array(store: Store) -> Array:
    """An array of fixed-width text as Python's str, for labels."""
    array = Opened(store).array
    return np.char.decode(array, "utf-8") if array.dtype.kind == "S" else array
