"""What is parsed or computed once: entries of a folder, named by what they are made from.

An entry is built under a temporary name and renamed, so that a reader never sees half of one and two processes that
build the same entry do each other no harm.
"""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dptrain.data.store import unreadable
from dptrain.errors import StorageError

VERSION = "1"
"""Part of every key. To be raised whenever an entry's content changes its meaning."""

_SIZES = "sizes.json"


def locate(given: Path | None = None) -> Path:
    """The cache's folder: ``given``, $DPTRAIN_CACHE, $XDG_CACHE_HOME/dptrain, ~/.cache/dptrain or, last, a temporary.

    A folder that was asked for and can't be written is a StorageError; the default ones are passed over.
    """
    asked = given or (Path(os.environ["DPTRAIN_CACHE"]) if os.environ.get("DPTRAIN_CACHE") else None)
    if asked is not None:
        with writing(asked):
            asked.mkdir(parents=True, exist_ok=True)
        if not os.access(asked, os.W_OK):
            raise _unwritable(asked, "a folder without write permission")
        return asked.resolve()
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    temporary = Path(tempfile.gettempdir()) / f"dptrain-{os.getuid()}"
    for folder in (Path(home) / "dptrain", temporary):
        with contextlib.suppress(OSError):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            # Somebody else's folder of that name in a shared place is not to be trusted.
            if folder.lstat().st_uid == os.getuid() and folder.is_dir() and os.access(folder, os.W_OK):
                return folder.resolve()
    return Path(tempfile.mkdtemp(prefix="dptrain-"))


def _unwritable(path: Path, found: str) -> StorageError:
    return StorageError(
        f"data cache {path}",
        expected="a folder with room that can be written",
        found=found,
        cure="set DPTRAIN_CACHE to another folder",
    )


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Within it, an OSError becomes the StorageError of the cache at ``path``."""
    try:
        yield
    except OSError as error:
        raise _unwritable(path, (error.strerror or str(error)).lower()) from error


def key(*parts: Any) -> str:
    """A name for what follows from ``parts`` (plain data)."""
    return hashlib.sha256(json.dumps([VERSION, *parts], sort_keys=True).encode()).hexdigest()[:40]


def entry(folder: Path, name: str, build: Callable[[Path], None]) -> Path:
    """The folder of the entry ``name``; where there is none, or a damaged one, ``build`` fills a new one first."""
    final = folder / name
    if _whole(final):
        return final
    shutil.rmtree(final, ignore_errors=True)
    with writing(folder):
        final.parent.mkdir(parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(prefix="building-", dir=folder))
    try:
        build(building)
        with writing(folder):
            sizes = {file.name: file.stat().st_size for file in building.iterdir()}
            (building / _SIZES).write_text(json.dumps(sizes))
            try:
                os.rename(building, final)
            except OSError:
                if not final.is_dir():
                    raise
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return final


def _whole(made: Path) -> bool:
    """Whether an entry still has every file that it was made with, in its size."""
    try:
        sizes = json.loads((made / _SIZES).read_text())
        return all((made / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError):
        return False


def room(folder: Path, nbytes: int) -> None:
    """StorageError where the cache's disk can't take ``nbytes`` more."""
    with writing(folder):
        free = shutil.disk_usage(folder).free
    if free < nbytes:
        raise _unwritable(folder, f"{free} bytes free of the {nbytes} needed")


def remember(folder: Path, name: str, value: Any) -> None:
    """Keep plain data under ``name``."""

    def build(into: Path) -> None:
        with writing(folder):
            (into / "value.json").write_text(json.dumps(value))

    entry(folder, name, build)


def recall(folder: Path, name: str) -> Any:
    """What was kept under ``name``, or None."""
    try:
        return json.loads((folder / name / "value.json").read_text())
    except (OSError, ValueError):
        return None


def forget(folder: Path, name: str) -> None:
    """Drop an entry."""
    shutil.rmtree(folder / name, ignore_errors=True)


def identity(path: Path, where: str = "") -> list[Any]:
    """What tells this version of a file from another without reading it."""
    try:
        stat = path.stat()
    except OSError as error:
        raise unreadable(error, path, where) from error
    return [str(path.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ino]


def file_digest(path: Path, folder: Path, where: str = "") -> str:
    """The SHA-256 of a file's content, remembered by its identity."""
    name = "digest-" + key(identity(path, where))
    known = recall(folder, name)
    if isinstance(known, str):
        return known
    try:
        with open(path, "rb", buffering=0) as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise unreadable(error, path, where) from error
    remember(folder, name, found)
    return found
