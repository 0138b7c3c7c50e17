"""Files to whose end is written and nothing else: of this machine, and of the supervisor's."""

import os
from pathlib import Path
from typing import Protocol

from dptrain.afar import Appending, FarPath


class Appended(Protocol):
    """A file's end. ``torn``: what is there does not end with the end of a line."""

    torn: bool

    def write(self, data: bytes) -> int:
        """Append; how many bytes were written. Raises OSError."""

    def close(self, *, durable: bool = True) -> None:
        """Close it, ``durable`` after all is on the disk. Raises OSError; it is closed then too."""


def opened(path: Path) -> Appended:
    """A file, made if need be. Raises OSError."""
    return Appending(path) if isinstance(path, FarPath) else _Near(path)


class _Near:
    def __init__(self, path: Path) -> None:
        self._handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        size = os.fstat(self._handle).st_size
        self.torn = size > 0 and os.pread(self._handle, 1, size - 1) != b"\n"

    def write(self, data: bytes) -> int:
        return os.write(self._handle, data)

    def close(self, *, durable: bool = True) -> None:
        try:
            if durable:
                os.fsync(self._handle)
        finally:
            os.close(self._handle)
