"""TensorBoard's event file of a run: loss, metrics, learning rate, samples a second, recoveries, by step.

It lies in the run directory itself, so that ``tensorboard --logdir runs`` calls a curve by its run. The format is a
TFRecord of Event messages; the few of their fields that a curve needs are put together here, because a library for
them takes a sixth of a second to load in every run, and as long for a line of the journal as a small step.
"""

import contextlib
import struct
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dptrain import appended
from dptrain.errors import StorageError

FIGURES = ("loss", "lr", "samples_per_second", "norm")
"""Keys of a journal's line that become curves of the same name; its metrics are ``metrics/NAME``."""

_START = 1
"""SessionLog.START: of what came before, TensorBoard drops that step and all after it."""


class Scalars:
    """Writes what the journal's lines hold to one event file; each line is handed to the system whole.

    ``attempt`` and ``step`` say where the run stands: TensorBoard drops what earlier files hold from there on.
    """

    def __init__(self, folder: Path, *, attempt: int, step: int) -> None:
        self._folder, self._attempt, self._step = folder, attempt, step
        self._file: appended.Appended | None = None
        self._closed = False
        self._recoveries = 0

    def write(self, line: Mapping[str, Any]) -> None:
        """Take in a line of the journal. Raises StorageError; after that the file is closed, and nothing is written."""
        if line.get("event") == "recovery":
            self._recoveries += 1
            line = {**line, "recoveries": self._recoveries}
        summary = b"".join(_field(1, _value(tag, value)) for tag, value in figures(line))
        if not summary or self._closed:
            return
        try:
            if self._file is None:
                self._open()
            self._append(line["step"], _field(5, summary))
        except OSError as error:
            self.close()
            raise StorageError(
                f"event file for TensorBoard in {self._folder}",
                expected="to be written",
                found=error.strerror or str(error),
                cure='make room, or set output.tensorboard = "never"; the journal holds the same',
            ) from None

    def close(self) -> None:
        """Nothing is raised: every line was handed over when it came."""
        self._closed = True
        file, self._file = self._file, None
        if file is not None:
            with contextlib.suppress(OSError):
                file.close(durable=False)

    def _open(self) -> None:
        name = f"events.out.tfevents.{int(time.time()):010d}.{self._attempt:04d}.{self._step}"
        self._file = appended.opened(self._folder / name)
        self._append(0, _field(3, b"brain.Event:2"))
        if self._step:
            self._append(self._step + 1, _field(7, _varint(1 << 3) + _varint(_START)))

    def _append(self, step: int, content: bytes) -> None:
        """One Event."""
        event = b"\x09" + struct.pack("<d", time.time()) + b"\x10" + _varint(step) + content
        record = _record(event)
        assert self._file is not None
        if self._file.write(record) < len(record):
            raise OSError(28, "no space left on device")


def figures(line: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """The curves that a line of the journal has a point of, and the point."""
    for name in (*FIGURES, "recoveries"):
        value = line.get(name)
        if isinstance(value, (int, float)):
            yield name, float(value)
    for name, value in line.get("metrics", {}).items():
        yield f"metrics/{name}", float(value)


def _value(tag: str, value: float) -> bytes:
    """A Summary.Value: tag = 1, simple_value = 2, a float32."""
    try:
        packed = struct.pack("<f", value)
    except OverflowError:
        packed = struct.pack("<f", float("inf") if value > 0 else float("-inf"))
    return _field(1, tag.encode()) + b"\x15" + packed


def _field(number: int, content: bytes) -> bytes:
    """A field of a protobuf message that holds bytes: text, or another message."""
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _varint(number: int) -> bytes:
    found = bytearray()
    while number > 0x7F:
        found.append(number & 0x7F | 0x80)
        number >>= 7
    found.append(number)
    return bytes(found)


def _record(content: bytes) -> bytes:
    """A TFRecord: the length and the content, each with its masked CRC-32C."""
    length = struct.pack("<Q", len(content))
    return length + _masked_crc(length) + content + _masked_crc(content)


def _masked_crc(data: bytes) -> bytes:
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _CRC[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    crc ^= 0xFFFFFFFF
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def _crc_of(byte: int) -> int:
    """Castagnoli's polynomial, reflected."""
    for _ in range(8):
        byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
    return byte


_CRC = tuple(_crc_of(byte) for byte in range(256))
