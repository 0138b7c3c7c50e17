"""Files below a root, and nowhere else: no "..", no links, no races.

Every part of a path is opened from the folder before it, and a link is never followed, so what is opened is what was
checked.
"""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from dptrain.errors import NotFoundError, UsageError

_MOST = 1024
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
# Without O_NONBLOCK opening a named pipe would wait for its writer.
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK


class Found(NamedTuple):
    """A regular file below a root: its path from there, size, and when it was last written."""

    path: str
    size: int
    modified: float


def parts_of(path: str, where: str) -> tuple[str, ...]:
    """The parts of a relative path. Raises UsageError for one that is empty, absolute, or would lead elsewhere."""
    parts = tuple(path.split("/"))
    if not path or len(path) > _MOST or "\0" in path or not all(_is_plain(part) for part in parts):
        shown = repr(path if len(path) <= 80 else path[:77] + "...")
        raise UsageError(
            where,
            expected='a path such as "folder/name", with no empty part, "." or ".." in it',
            found=shown,
            cure="name it as it was listed",
        )
    return parts


def _is_plain(part: str) -> bool:
    try:
        return part not in ("", ".", "..") and len(os.fsencode(part)) <= 255
    except UnicodeEncodeError:
        return False


@contextmanager
def folder(root: Path, parts: tuple[str, ...], where: str) -> Iterator[int]:
    """A descriptor of the folder that ``parts`` name below ``root``. Raises NotFoundError."""
    try:
        handle = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        # A job that has not begun has no folder.
        raise missing(where, "/".join(parts), error) from None
    try:
        for part in parts:
            try:
                inner = os.open(part, _FOLDER, dir_fd=handle)
            except OSError as error:
                raise missing(where, "/".join(parts), error) from None
            os.close(handle)
            handle = inner
        yield handle
    finally:
        os.close(handle)


@contextmanager
def opened(root: Path, path: str, where: str) -> Iterator[int]:
    """A descriptor of a regular file below ``root``, to read. Raises UsageError, NotFoundError."""
    parts = parts_of(path, where)
    with folder(root, parts[:-1], where) as inside:
        try:
            handle = os.open(parts[-1], _FILE, dir_fd=inside)
        except OSError as error:
            raise missing(where, path, error) from None
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise missing(where, path, None)
        yield handle
    finally:
        os.close(handle)


def resolve(root: Path, path: str, where: str) -> Path | None:
    """The file or folder that is meant by a path below ``root``, if there is one and no link leads there."""
    parts = parts_of(path, where)
    try:
        with folder(root, parts[:-1], where) as inside:
            mode = os.stat(parts[-1], dir_fd=inside, follow_symlinks=False).st_mode
    except (OSError, NotFoundError):
        return None
    return root.joinpath(*parts) if stat.S_ISREG(mode) or stat.S_ISDIR(mode) else None


def walk(root: Path) -> list[Found]:
    """All regular files below a folder, by path; links are left out."""
    found: list[Found] = []
    if not root.is_dir():
        return found
    for _, folders, names, handle in os.fwalk(root, follow_symlinks=False):
        folders.sort()
        # Of an open folder the kernel knows the path; fwalk's own is given up as soon as something is renamed.
        base = os.path.relpath(os.readlink(f"/proc/self/fd/{handle}"), os.path.realpath(root))
        for name in names:
            try:
                status = os.stat(name, dir_fd=handle, follow_symlinks=False)
            except FileNotFoundError:
                continue
            if stat.S_ISREG(status.st_mode):
                path = name if base == "." else f"{base}/{name}"
                found.append(Found(path, status.st_size, status.st_mtime))
    return sorted(found)


def missing(where: str, path: str, error: OSError | None) -> NotFoundError:
    """The error for a file that is not there, or is none."""
    why = (error.strerror or str(error)).lower() if error is not None else "no regular file"
    return NotFoundError(where, expected="a file", found=f"{path[:80]!r}: {why}", cure="name it as it was listed")
