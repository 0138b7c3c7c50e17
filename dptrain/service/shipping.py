"""A job's data on its way to nodes: files by digest, offered by the server, fetched and kept by agents."""

import hashlib
import os
import re
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath

from dptrain.errors import DataError, NotFoundError, StorageError
from dptrain.v1 import agent_service_pb2 as pb

CHUNK = 1 << 20
_DIGEST = re.compile(r"[0-9a-f]{64}")


class Offers:
    """The files that nodes may have, on the server: those of jobs that were started. Any thread may call it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: dict[tuple[str, int, int], str] = {}
        self._paths: dict[str, Path] = {}

    def offer(self, source: Path, among: str = "") -> list[pb.DataFile]:
        """The files of a job's data, a file or a folder, which may be fetched from now on. Raises DataError.

        ``among``: those beside the file too that have this in their name; the file itself is the first.
        """
        try:
            paths = sorted(path for path in source.rglob("*") if path.is_file()) if source.is_dir() else [source]
            if among:
                paths += sorted(path for path in source.parent.glob(f"*{among}*") if path.is_file() and path != source)
            return [self._offer(path, source) for path in paths]
        except OSError as error:
            raise DataError(
                str(source), expected="readable data", found=error.strerror or str(error), cure="put it there again"
            ) from None

    def _offer(self, path: Path, source: Path) -> pb.DataFile:
        status = path.stat()
        key = (str(path), status.st_size, status.st_mtime_ns)
        with self._lock:
            digest = self._known.get(key, "")
        if not digest:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        with self._lock:
            self._known[key] = digest
            self._paths[digest] = path
        name = path.relative_to(source).as_posix() if source.is_dir() else path.name
        return pb.DataFile(path=name, size=status.st_size, sha256=digest)

    def read(self, digest: str) -> Iterator[bytes]:
        """A file in parts. Raises NotFoundError, StorageError."""
        with self._lock:
            path = self._paths.get(digest)
        if path is None:
            raise NotFoundError(
                f"data {digest[:12]}", expected="a file of a job that was started", found="none", cure="start the job"
            )
        try:
            with path.open("rb") as file:
                while data := file.read(CHUNK):
                    yield data
        except OSError as error:
            raise StorageError(
                str(path), expected="to be read", found=error.strerror or str(error), cure="put it there again"
            ) from None


def received(files: Sequence[pb.DataFile], fetch: Callable[[str], Iterable[bytes]], folder: Path) -> Path:
    """The data of a job on this node, kept below a folder; what is not there yet is fetched. Raises StorageError.

    Nothing half is kept, and nothing whose digest is another.
    """
    for file in files:
        path = PurePosixPath(file.path)
        if path.is_absolute() or not path.parts or ".." in path.parts or _DIGEST.fullmatch(file.sha256) is None:
            raise _unusable(file.path, "a path below the data's folder and a SHA-256", "something else")
    listed = "\n".join(f"{file.sha256} {file.path}" for file in files)
    whole = folder / "sets" / hashlib.sha256(listed.encode()).hexdigest()
    single = len(files) == 1 and "/" not in files[0].path
    place = whole / files[0].path if single else whole
    if whole.is_dir():
        return place
    try:
        for name in ("files", "sets"):
            (folder / name).mkdir(mode=0o700, parents=True, exist_ok=True)
        for file in files:
            kept = folder / "files" / file.sha256
            if not kept.exists():
                _keep(kept, file, fetch)
        made = Path(tempfile.mkdtemp(prefix=".part-", dir=folder / "sets"))
        for file in files:
            target = made / file.path
            target.parent.mkdir(parents=True, exist_ok=True)
            os.link(folder / "files" / file.sha256, target)
        try:
            made.rename(whole)
        except OSError:
            # Another start made it meanwhile.
            if not whole.is_dir():
                raise
    except OSError as error:
        raise _unusable(str(folder), "room for the job's data", error.strerror or str(error)) from None
    return place


def _keep(kept: Path, file: pb.DataFile, fetch: Callable[[str], Iterable[bytes]]) -> None:
    digest = hashlib.sha256()
    handle, part = tempfile.mkstemp(prefix=".part-", dir=kept.parent)
    try:
        with os.fdopen(handle, "wb") as made:
            for data in fetch(file.sha256):
                digest.update(data)
                made.write(data)
        if digest.hexdigest() != file.sha256:
            raise _unusable(
                file.path, f"bytes with the SHA-256 {file.sha256[:12]}…", "others: it changed on the server"
            )
        os.replace(part, kept)
    finally:
        Path(part).unlink(missing_ok=True)


def _unusable(where: str, expected: str, found: str) -> StorageError:
    return StorageError(f"data {where}", expected=expected, found=found, cure="make room, or start the job again")
