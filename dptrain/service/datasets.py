"""Data that jobs may use: each owner's uploads, and a root that the operator shares. Nothing else can be named.

An upload is taken into a file without a name that anyone could use, checked, and renamed: it is there whole or not at
all. What uploads take, those under way included, is held to a quota for each owner.
"""

import contextlib
import hashlib
import os
import re
import shutil
import threading
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from dptrain.errors import DataError, NotFoundError, QuotaError, UploadError, UsageError
from dptrain.service import below
from dptrain.service.below import Found

SUFFIXES = (".npz", ".npy", ".csv", ".csv.gz", ".tsv", ".tsv.gz", ".parquet", ".idx", ".idx.gz", "-ubyte", "-ubyte.gz")
MOST_RATIO = 250
"""How many times its size a compressed file may unpack to."""

_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}(/[A-Za-z0-9_-][A-Za-z0-9._-]{0,99})?", re.ASCII)
_OWNER = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.@-]{0,63}", re.ASCII)
_SHA256 = re.compile(r"[0-9a-f]{64}", re.ASCII)
_INCOMING = ".incoming"
_CHUNK = 1 << 20


class Header(NamedTuple):
    """What an upload says it will be."""

    name: str
    size: int
    sha256: str
    overwrite: bool


class Datasets:
    """The uploads below ``root`` and the data below ``shared`` (None: none), at most ``quota`` bytes an owner."""

    def __init__(self, root: Path, shared: Path | None, quota: int) -> None:
        self.root, self.shared, self.quota = root, shared, quota
        self._lock = threading.Lock()
        self._coming: dict[str, int] = {}
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        shutil.rmtree(root / _INCOMING, ignore_errors=True)
        (root / _INCOMING).mkdir(mode=0o700)

    def folder(self, owner: str) -> Path:
        """The folder of an owner's uploads, for whatever name they have."""
        if _OWNER.fullmatch(owner):
            return self.root / owner
        return self.root / f"-{hashlib.sha256(owner.encode()).hexdigest()[:32]}"

    def resolve(self, owner: str, source: str, key: str) -> Path:
        """The file or folder that a job of ``owner`` means by ``source``. Raises DataError."""
        for base in (self.folder(owner), self.shared):
            if base is None or not base.is_dir():
                continue
            relative = _relative(base, source)
            if relative == "":
                return base
            with contextlib.suppress(UsageError):
                found = below.resolve(base, relative, key) if relative is not None else None
                if found is not None:
                    return found
        raise DataError(
            key,
            expected="a data set of yours, a path below the server's data root, or a built-in one",
            found=repr(source[:200]),
            cure="`dptrain upload FILE` brings one there",
        )

    def list(self, owner: str) -> list[Found]:
        """An owner's uploads."""
        return below.walk(self.folder(owner))

    def used(self, owner: str) -> int:
        """The bytes of an owner's uploads."""
        return sum(found.size for found in self.list(owner))

    def remove(self, owner: str, name: str) -> None:
        """Remove an upload. Raises NotFoundError."""
        where = f"data set {name[:80]!r}"
        if not _NAME.fullmatch(name) or not (self.folder(owner)).is_dir():
            raise NotFoundError(where, expected="a data set of yours", found="none", cure="list them first")
        parts = below.parts_of(name, where)
        with below.folder(self.folder(owner), parts[:-1], where) as inside:
            try:
                os.unlink(parts[-1], dir_fd=inside)
            except OSError as error:
                raise below.missing(where, name, error) from None
        if len(parts) > 1:
            with contextlib.suppress(OSError):
                (self.folder(owner) / parts[0]).rmdir()

    def take(self, owner: str, header: Header, data: Iterable[bytes]) -> Found:
        """Take in an upload, whole or not at all. Raises UploadError, QuotaError."""
        self._refuse(owner, header)
        target = self.folder(owner) / header.name
        with self._reserved(owner, header), self._incoming() as (file, path):
            _receive(file, header, data)
            check(path, header.name, self.quota)
            target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            try:
                if header.overwrite:
                    path.rename(target)
                else:
                    # Unlike a rename this fails where one has come there meanwhile.
                    os.link(path, target, follow_symlinks=False)
            except OSError as error:
                raise _taken(header.name, error.strerror or str(error)) from None
            for folder in {target.parent, self.folder(owner), self.root}:
                _flush(folder)
            status = target.stat()
        return Found(header.name, status.st_size, status.st_mtime)

    def _refuse(self, owner: str, header: Header) -> None:
        where = f"data set {header.name[:80]!r}"
        if not _NAME.fullmatch(header.name) or not header.name.endswith(SUFFIXES):
            raise UploadError(
                where,
                expected=f"NAME or FOLDER/NAME of letters, digits, -, _ and ., ending in one of {' '.join(SUFFIXES)}",
                found=repr(header.name[:80]),
                cure="upload it under another name",
            )
        if not _SHA256.fullmatch(header.sha256) or header.size < 1:
            raise UploadError(
                where, expected="its size in bytes and its SHA-256", found="none", cure="say both in the header"
            )
        if not header.overwrite and os.path.lexists(self.folder(owner) / header.name):
            raise _taken(header.name, "one of that name")

    @contextlib.contextmanager
    def _reserved(self, owner: str, header: Header) -> Iterator[None]:
        with self._lock:
            room = self.quota - self.used(owner) - self._coming.get(owner, 0)
            if header.size > room:
                raise QuotaError(
                    f"data set {header.name!r}",
                    expected=f"at most {max(0, room)} bytes, what is left of {self.quota}",
                    found=f"{header.size} bytes",
                    cure="remove data sets that are not needed any more",
                )
            self._coming[owner] = self._coming.get(owner, 0) + header.size
        try:
            yield
        finally:
            with self._lock:
                self._coming[owner] -= header.size

    @contextlib.contextmanager
    def _incoming(self) -> Iterator[tuple[BinaryIO, Path]]:
        path = self.root / _INCOMING / os.urandom(16).hex()
        try:
            with path.open("xb") as file:
                path.chmod(0o600)
                yield file, path
        finally:
            path.unlink(missing_ok=True)


def _receive(file: BinaryIO, header: Header, data: Iterable[bytes]) -> None:
    where, size, digest = f"data set {header.name!r}", 0, hashlib.sha256()
    for chunk in data:
        size += len(chunk)
        if size > header.size:
            break
        digest.update(chunk)
        file.write(chunk)
    if size != header.size:
        found = f"more than {header.size}" if size > header.size else str(size)
        raise UploadError(where, expected=f"{header.size} bytes", found=found, cure="upload it again")
    if digest.hexdigest() != header.sha256:
        raise UploadError(
            where, expected=f"SHA-256 {header.sha256}", found=digest.hexdigest(), cure="it was damaged; upload it again"
        )
    file.flush()
    os.fsync(file.fileno())


def check(path: Path, name: str, most: int) -> None:
    """Refuse a file that is not what its name says, or unpacks to too much. Raises UploadError."""
    if name.endswith(".npz"):
        _check_zip(path, name, most)
    elif name.endswith(".gz"):
        _check_gzip(path, name, most)
    elif name.endswith(".npy"):
        _check_start(path, name, b"\x93NUMPY")
    elif name.endswith(".parquet"):
        _check_start(path, name, b"PAR1")


def _check_start(path: Path, name: str, start: bytes) -> None:
    with path.open("rb") as file:
        if file.read(len(start)) != start:
            raise _refused(name, "a file that is what its name says", "another")


def _check_zip(path: Path, name: str, most: int) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError, RecursionError, OSError) as error:
        raise _refused(name, "an .npz archive", str(error)[:100]) from None
    for member in members:
        plain = re.fullmatch(r"[^/\\\0]{1,200}\.npy", member.filename) and not member.filename.startswith(".")
        if not plain or member.flag_bits & 1:
            raise _refused(name, "members such as x.npy, not encrypted", repr(member.filename[:80]))
    if len({member.filename for member in members}) != len(members):
        raise _refused(name, "each member once", "one twice")
    unpacked = sum(member.file_size for member in members)
    _check_ratio(name, unpacked, path.stat().st_size, most)
    # Sizes are what the archive says; reading holds it to them.
    with zipfile.ZipFile(path) as archive:
        for member in members:
            with archive.open(member) as file:
                if file.read(6) != b"\x93NUMPY":
                    raise _refused(name, "arrays of numpy's format", repr(member.filename[:80]))


def _check_gzip(path: Path, name: str, most: int) -> None:
    size, unpacked = path.stat().st_size, 0
    inflate = zlib.decompressobj(wbits=31)
    with path.open("rb") as file:
        try:
            while data := inflate.unconsumed_tail or file.read(_CHUNK):
                unpacked += len(inflate.decompress(data, _CHUNK))
                _check_ratio(name, unpacked, size, most)
                if inflate.eof:
                    rest = inflate.unused_data or file.read(_CHUNK)
                    if not rest:
                        return
                    inflate = zlib.decompressobj(wbits=31)
                    unpacked += len(inflate.decompress(rest, _CHUNK))
        except zlib.error as error:
            raise _refused(name, "a gzip file", str(error)[:100]) from None
    if not inflate.eof:
        raise _refused(name, "a whole gzip file", "one that is cut short")


def _check_ratio(name: str, unpacked: int, size: int, most: int) -> None:
    if unpacked > most or unpacked > max(_CHUNK, MOST_RATIO * size):
        raise _refused(name, f"at most {min(most, max(_CHUNK, MOST_RATIO * size))} bytes unpacked", "more")


def _refused(name: str, expected: str, found: str) -> UploadError:
    return UploadError(f"data set {name!r}", expected=expected, found=found, cure="write it again with the usual tools")


def _taken(name: str, found: str) -> UploadError:
    return UploadError(
        f"data set {name!r}", expected="a free name", found=found, cure="choose another, or say overwrite"
    )


def _relative(base: Path, source: str) -> str | None:
    """A source as a path from a base; None where it leads elsewhere."""
    if not source.startswith("/"):
        return source.rstrip("/")
    start = f"{base.resolve()}"
    if source.rstrip("/") == start:
        return ""
    return source[len(start) + 1 :].rstrip("/") if source.startswith(f"{start}/") else None


def _flush(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
