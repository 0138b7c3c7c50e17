"""What a run's journal and log say, read as they grow: progress, curves, lines. Nothing is read twice.

Cursors are offsets in the files, which are only appended to.
"""

import contextlib
import json
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

from dptrain import rundir
from dptrain.errors import UsageError

T = TypeVar("T")

_READ = 1 << 18
_MOST_KEPT = 512
"""Journals whose progress is remembered."""

_OF_WORKERS = ("compute", "wait")
_PLAIN = ("loss", "lr", "samples_per_second", "norm")


class Chunk(NamedTuple):
    """Whole lines of a file, and where the next begin."""

    lines: list[tuple[int, dict[str, Any]]]
    offset: int


def read(path: Path, offset: int, most: int = _READ) -> Chunk:
    """The whole lines from an offset on, each with the offset after it; lines that are no JSON objects are left out."""
    try:
        with path.open("rb") as file:
            file.seek(offset)
            data = file.read(most)
    except FileNotFoundError:
        return Chunk([], offset)
    end = data.rfind(b"\n") + 1
    if not end and len(data) == most:
        # One line is longer than all that is read at once: there is no such line but of a broken file.
        return Chunk([], offset + len(data))
    found: list[tuple[int, dict[str, Any]]] = []
    at = offset
    for line in data[:end].splitlines(keepends=True):
        at += len(line)
        with contextlib.suppress(ValueError):
            content = json.loads(line)
            if isinstance(content, dict):
                found.append((at, content))
    return Chunk(found, offset + end)


def cursor_of(text: str, where: str = "cursor") -> int:
    """The offset of a cursor; "" is the beginning. Raises UsageError."""
    if not text:
        return 0
    if text.isascii() and text.isdigit() and len(text) < 16:
        return int(text)
    raise UsageError(where, expected="a cursor of this server's", found=repr(text[:40]), cure="leave it out")


def tail_of(path: Path, lines: int, accept: Callable[[dict[str, Any]], bool]) -> int:
    """The offset from which on there are so many accepted lines, or all."""
    try:
        end = path.stat().st_size
    except FileNotFoundError:
        return 0
    start = end
    while start > 0:
        start = max(0, start - _READ)
        offsets, at = [], start
        if start:
            with path.open("rb") as file:
                file.seek(start)
                at = start + len(file.readline())
        while True:
            before = at
            chunk = read(path, at)
            for after, line in chunk.lines:
                if accept(line):
                    offsets.append(before)
                before = after
            if chunk.offset == at or chunk.offset >= end:
                break
            at = chunk.offset
        if len(offsets) >= lines or not start:
            return offsets[-lines] if len(offsets) >= lines else 0
    return 0


@dataclass
class Progress:
    """How far a run is, as its journal tells."""

    step: int = 0
    epoch: float = 0.0
    loss: float | None = None
    samples_per_second: float = 0.0
    metrics: dict[str, float] = field(default_factory=dict)
    recoveries: int = 0
    seconds: float = 0.0
    offset: int = 0
    attempt: int = 0
    pace: float = 0.0
    """Seconds a step in the newest lines."""

    def take(self, line: dict[str, Any]) -> None:
        """One more line of the journal."""
        if line.get("event") == "recovery":
            self.recoveries += 1
        if "event" in line or not isinstance(line.get("step"), int):
            return
        step, seconds = line["step"], float(line.get("seconds") or 0.0)
        if line.get("attempt") == self.attempt and step > self.step and seconds > self.seconds:
            pace = (seconds - self.seconds) / (step - self.step)
            self.pace = pace if not self.pace else 0.7 * self.pace + 0.3 * pace
        self.attempt = line.get("attempt", 0)
        self.step, self.seconds, self.epoch = step, seconds, float(line.get("epoch") or 0.0)
        if line.get("loss") is not None:
            self.loss = float(line["loss"])
        self.samples_per_second = float(line.get("samples_per_second") or 0.0)
        self.metrics = dict(line.get("metrics") or self.metrics)


def restarts(run_dir: Path) -> list[dict[str, Any]]:
    """How often a run's supervisor has started its workers again: the cause and the step of each."""
    return [line for _, line in read(run_dir / rundir.RESTARTS, 0).lines]


class Journals:
    """The progress of all runs, each journal read once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: OrderedDict[Path, Progress] = OrderedDict()

    def progress(self, path: Path) -> Progress:
        """How far the run of a journal is by now."""
        with self._lock:
            found = self._known.pop(path, None) or Progress()
            with contextlib.suppress(OSError):
                end = path.stat().st_size
                if end < found.offset:
                    found = Progress()
                for lines, after in grown(path, found.offset, end, read):
                    for _, line in lines:
                        found.take(line)
                    found.offset = after
            self._known[path] = found
            while len(self._known) > _MOST_KEPT:
                self._known.popitem(last=False)
            return Progress(**{**found.__dict__, "metrics": dict(found.metrics)})

    def forget(self, path: Path) -> None:
        """A run is no more."""
        with self._lock:
            self._known.pop(path, None)


class Point(NamedTuple):
    """A value at a step, or the mean of several with their least and greatest."""

    step: int
    seconds: float
    value: float
    minimum: float
    maximum: float


def values(line: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """The figures of a journal's line by the names of their curves."""
    for name in _PLAIN:
        value = line.get(name)
        if isinstance(value, (int, float)):
            yield name, float(value)
    for name, value in (line.get("metrics") or {}).items():
        if isinstance(value, (int, float)):
            yield f"metric.{name}", float(value)
    for name in _OF_WORKERS:
        for rank, value in enumerate(line.get(name) or ()):
            if isinstance(value, (int, float)):
                yield f"{name}.{rank}", float(value)


def wanted(names: Sequence[str]) -> Callable[[str], bool]:
    """Whether a curve is asked for by names and prefixes with "*"; none means all but those of single workers."""
    if not names:
        return lambda name: not name.startswith(tuple(f"{kind}." for kind in _OF_WORKERS))
    exact = frozenset(names)
    prefixes = tuple(name[:-1] for name in names if name.endswith("*"))
    return lambda name: name in exact or (bool(prefixes) and name.startswith(prefixes))


def coarse(points: Sequence[Point], most: int) -> list[Point]:
    """At most so many points, neighbours put together; the last step stays the last."""
    if len(points) <= most:
        return list(points)
    found = []
    for i in range(most):
        group = points[i * len(points) // most : (i + 1) * len(points) // most]
        mean = sum(point.value for point in group) / len(group)
        low, high = min(point.minimum for point in group), max(point.maximum for point in group)
        found.append(Point(group[-1].step, group[-1].seconds, mean, low, high))
    return found


class Watched:
    """Rings a bell when a file has grown. One thread looks at all files that someone waits for."""

    EVERY = 0.1
    """Seconds between looks, unless so many wait that there are fewer."""
    WAKES = 100
    """A second, of all that wait: what follows jobs must not slow them."""

    def __init__(self, ring: Callable[[str], None]) -> None:
        self._ring = ring
        self._lock = threading.Lock()
        self._sizes: dict[str, list[int]] = {}
        self._waiting = 0
        self._ends = threading.Event()
        self._some = threading.Event()
        self._thread = threading.Thread(target=self._look, name="watched", daemon=True)
        self._thread.start()

    @contextlib.contextmanager
    def file(self, path: Path) -> Iterator[str]:
        """While this is entered the bell is rung with the given key whenever the file has grown."""
        key = f"file:{path}"
        with self._lock:
            self._sizes.setdefault(key, [_size(key), 0])[1] += 1
            self._some.set()
        try:
            yield key
        finally:
            with self._lock:
                entry = self._sizes[key]
                entry[1] -= 1
                if not entry[1]:
                    del self._sizes[key]
                if not self._sizes:
                    self._some.clear()

    def close(self) -> None:
        """Look no more."""
        self._ends.set()
        self._some.set()
        self._thread.join()

    def _look(self) -> None:
        while self._some.wait() and not self._ends.wait(max(self.EVERY, self._waiting / self.WAKES)):
            with self._lock:
                keys = list(self._sizes)
                self._waiting = sum(number for _, number in self._sizes.values())
            for key in keys:
                size = _size(key)
                with self._lock:
                    entry = self._sizes.get(key)
                    grown = entry is not None and entry[0] != size
                    if entry is not None:
                        entry[0] = size
                if grown:
                    self._ring(key)


def grown(path: Path, offset: int, end: int, read: Callable[[Path, int], tuple[T, int]]) -> Iterator[tuple[T, int]]:
    """What a file has from a place on, up to ``end``: pieces as ``read`` makes them, each with where the next begins.

    Of a line that is not whole nothing comes.
    """
    before = -1
    while before < offset < end:
        before = offset
        piece, offset = read(path, offset)
        yield piece, offset


class Shared(Generic[T]):
    """What many follow is read and made into messages once, for all who stand at the same place of a file."""

    MOST = 16
    """Pieces that are kept for the next who asks."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: OrderedDict[Hashable, tuple[T, int]] = OrderedDict()

    def read(
        self, path: Path, offset: int, make: Callable[[Path, int], tuple[T, int]], key: Hashable = None
    ) -> tuple[T, int]:
        """What ``make`` makes of a file from a place on, and where the next piece begins; ``key`` tells makers apart.

        It may be shorter than what there is by now, where others have read before the file grew.
        """
        with self._lock:
            found = self._kept.get((path, offset, key))
            if found is None:
                found = make(path, offset)
                # A line that is not whole yet will be.
                if found[1] > offset:
                    self._kept[path, offset, key] = found
                    if len(self._kept) > self.MOST:
                        self._kept.popitem(last=False)
        return found


def size(path: "Path | str") -> int:
    """How long a file is; 0 where there is none."""
    try:
        return os.stat(path).st_size
    except OSError:
        return 0


def _size(key: str) -> int:
    return size(key.removeprefix("file:"))


def last_error(log: Path, since: float) -> str:
    """The newest line on stderr in which dptrain says what ended a run, since a time; "" where there is none."""
    found = ""
    for _, line in read(log, max(0, size(log) - _READ)).lines:
        if line.get("s") == "err" and line.get("t", 0) >= since and str(line.get("l", "")).startswith("dptrain: "):
            found = str(line["l"]).removeprefix("dptrain: ")
    return found
