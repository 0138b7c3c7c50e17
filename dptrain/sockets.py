"""Paths of Unix sockets. The kernel takes some hundred bytes of one, a folder's own may be longer."""

import contextlib
import os
from collections.abc import Iterator


@contextlib.contextmanager
def short(folder: str | os.PathLike[str], name: str) -> Iterator[str]:
    """A path of the socket ``name`` in a folder, short enough for the kernel however long the folder's own is."""
    held = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{held}/{name}"
    finally:
        os.close(held)
