"""journal.jsonl: what happened, one JSON object a line, appended and never rewritten.

Lines of steps have "step", "epoch", "loss", "lr", "samples_per_second", "seconds", "compute" and "wait" (seconds a
worker since the line before), "phases" (all of its time since then, by phase: {"forward": [0.1, 0.1], ...}), "attempt",
and "metrics" where the step was evaluated. A worker's phases are known up to its entering the last step's exchange;
what came after is in the next line. Lines with "event" tell of something else that happened at a step: "warning",
"recovery", "corruption". A run that was resumed repeats steps under a higher attempt: readers take the last attempt of
a step.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dptrain import appended
from dptrain.errors import StorageError


class Journal:
    """Appends lines; each is handed to the system whole. ``attempt`` counts the starts of this run from 1.

    A worker that goes on with another's journal says which attempt that is; None is a new one.
    """

    def __init__(self, path: Path, attempt: int | None = None) -> None:
        self.path = path
        try:
            self.attempt = attempt or 1 + max((attempt_of(line) for line in read_all(path)), default=0)
            self._file: appended.Appended | None = appended.opened(path)
        except OSError as error:
            raise self._refused(error.strerror or str(error)) from None
        self._torn = self._file.torn

    def write(self, line: Mapping[str, Any]) -> None:
        """Append one line. Raises StorageError when the disk is full."""
        text = json.dumps({**line, "attempt": self.attempt}, separators=(",", ":")) + "\n"
        data = b"\n" * self._torn + text.encode()
        assert self._file is not None
        try:
            written = self._file.write(data)
        except OSError as error:
            raise self._refused(error.strerror or str(error)) from None
        self._torn = 0 < written < len(data) or (self._torn and not written)
        if written < len(data):
            raise self._refused("no space left on device")

    def close(self) -> None:
        """Flush to the disk and close. Raises StorageError where that fails; it is closed then too."""
        file, self._file = self._file, None
        if file is None:
            return
        try:
            file.close()
        except OSError as error:
            raise self._refused(error.strerror or str(error)) from None

    def _refused(self, found: str) -> StorageError:
        return StorageError(
            f"journal {self.path}", expected="to be written", found=found, cure="make room, then go on with --resume"
        )


def read_all(path: Path) -> list[dict[str, Any]]:
    """All whole lines of a journal, in order; a line cut short by a crash is left out."""
    if not path.exists():
        return []
    lines = []
    for text in path.read_bytes().splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict):
            lines.append(line)
    return lines


def read_steps(path: Path) -> list[dict[str, Any]]:
    """One line a step, that of its last attempt, in order of steps."""
    found: dict[int, dict[str, Any]] = {}
    for line in read_all(path):
        if "step" in line and "event" not in line:
            step = line["step"]
            if step not in found or attempt_of(line) >= attempt_of(found[step]):
                found[step] = line
    return [found[step] for step in sorted(found)]


def attempt_of(line: Mapping[str, Any]) -> int:
    """The attempt that wrote a line; 0 where it doesn't say."""
    attempt = line.get("attempt", 0)
    return attempt if isinstance(attempt, int) else 0
