"""A folder of run directories as something that the page can read: no service, nothing to ask for."""

import contextlib
import json
import math
import os
import threading
import time
import tomllib
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dptrain import presence, rundir
from dptrain.errors import DptrainError, NotFoundError, RefusedTransition
from dptrain.journal import attempt_of
from dptrain.service import books
from dptrain.service.page.curves import Thinned
from dptrain.service.page.reading import FIRST_READ, File, JobView, Line, Lines, Who

SILENT = 15.0
"""Seconds without a word after which a run without a result counts as ended. A run writes every second."""

POINTS = 40
"""Of a curve beside a job in the list, or up to twice as many."""

MOST = 200
"""Runs that are listed."""


class Runs:
    """The runs below a folder, or the folder itself if it is one. No line of a journal is read twice."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = threading.Lock()
        self._known: dict[Path, _Story] = {}

    def server(self, who: Who) -> Mapping[str, Any]:
        """See Reading."""
        from importlib.metadata import version

        return {"version": version("dptrain"), "title": self.folder.resolve().name}

    def jobs(self, who: Who) -> Sequence[JobView]:
        """See Reading."""
        found = sorted(self._paths(), key=_begun, reverse=True)[:MOST]
        until = time.monotonic() + FIRST_READ
        return [self._view(path, until) for path in found]

    def job(self, who: Who, job_id: str) -> JobView:
        """See Reading."""
        return self._view(self._path(job_id))

    def journal(self, who: Who, job_id: str) -> Path:
        """See Reading."""
        return self._path(job_id) / rundir.JOURNAL

    def log(self, who: Who, job_id: str, cursor: str, most: int) -> Lines:
        """See Reading. A run alone keeps no log; its journal says the same."""
        path = self._path(job_id) / rundir.JOURNAL
        size = books.size(path)
        known = cursor.isascii() and cursor.isdigit() and len(cursor) < 16
        offset = int(cursor) if known and int(cursor) <= size else books.tail_of(path, most, lambda line: True)
        lines, after = books.read(path, offset)
        return Lines([_said(line) for _, line in lines[-most:]], str(after))

    def config(self, who: Who, job_id: str) -> str:
        """See Reading."""
        return rundir.read_text(self._path(job_id) / rundir.JOB)

    def files(self, who: Who, job_id: str) -> Sequence[File]:
        """See Reading."""
        base = self._path(job_id)
        found = []
        for path in sorted(base.rglob("*")):
            hidden = any(part.startswith(".") for part in path.relative_to(base).parts)
            if path.is_file() and not path.is_symlink() and not hidden:
                status = path.stat()
                found.append(File(path.relative_to(base).as_posix(), status.st_size, status.st_mtime))
        return found

    def file(self, who: Who, job_id: str, path: str) -> int:
        """See Reading."""
        base = self._path(job_id)
        if any(path == file.path for file in self.files(who, job_id)):
            with contextlib.suppress(OSError):
                return os.open(base / path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        raise _missing(f"file {path!r} of {job_id}")

    def act(self, who: Who, job_id: str, verb: str) -> JobView:
        """See Reading."""
        self._path(job_id)
        raise RefusedTransition(
            f"run {job_id}",
            expected="a job of a service",
            found="a run directory",
            cure="stop the run where it was started; `dptrain serve` runs jobs that the page can steer",
        )

    def _paths(self) -> list[Path]:
        if (self.folder / rundir.JOB).is_file():
            return [self.folder]
        try:
            return [path for path in self.folder.iterdir() if (path / rundir.JOB).is_file()]
        except OSError:
            return []

    def _path(self, job_id: str) -> Path:
        found = next((path for path in self._paths() if path.name == job_id), None)
        if found is None:
            raise _missing(f"run {job_id!r}")
        return found

    def _view(self, path: Path, until: float = math.inf) -> JobView:
        """A run as it is; past a time without what its journal says, if that was never read."""
        marks = tuple(_mark(path / name) for name in (rundir.JOB, rundir.JOURNAL, rundir.RESULT, rundir.RESTARTS))
        told, size = marks[1]
        # While data is read, and in a long step, nothing is written.
        silent = time.time() - max(told, marks[0][0]) > SILENT and not presence.occupied(path)
        with self._lock:
            known = self._known.get(path)
            if known is None and time.monotonic() > until:
                return _made(path, _Story(), silent, marks[0][0], told, trains=size > 0)
            if known is None or size < known.offset:
                known = self._known[path] = _Story()
            if known.view is None or known.seen != (*marks, silent):
                known.read(path / rundir.JOURNAL, int(size))
                known.seen = (*marks, silent)
                known.view = _made(path, known, silent, marks[0][0], told, trains=size > 0)
            return known.view


@dataclass
class _Story:
    """What a run's journal has said so far, the view that was made of it, and of what else that was made."""

    offset: int = 0
    last: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    recoveries: int = 0
    losses: Thinned = field(default_factory=lambda: Thinned(POINTS))
    pace: deque[tuple[int, float]] = field(default_factory=lambda: deque(maxlen=30))
    """Step and seconds of the newest lines of the last attempt."""
    seen: tuple[Any, ...] = ()
    view: JobView | None = None

    def read(self, path: Path, size: int) -> None:
        """Take in the whole lines up to ``size`` that were not read yet."""
        for lines, after in books.grown(path, self.offset, size, books.read):
            for _, line in lines:
                self._take(line)
            self.offset = after

    def _take(self, line: Mapping[str, Any]) -> None:
        self.recoveries += line.get("event") == "recovery"
        if "event" in line or not isinstance(line.get("step"), int):
            return
        if attempt_of(line) != attempt_of(self.last):
            self.pace.clear()
        self.last, self.metrics = line, line.get("metrics") or self.metrics
        self.pace.append((line["step"], float(line.get("seconds") or 0.0)))
        if line.get("loss") is not None:
            self.losses.add(float(line["loss"]))


def _mark(path: Path) -> tuple[float, float]:
    try:
        status = path.stat()
    except OSError:
        return 0.0, 0.0
    return status.st_mtime, float(status.st_size)


def _begun(path: Path) -> float:
    return _mark(path / rundir.JOB)[0]


def _made(path: Path, story: _Story, silent: bool, begun: float, told: float, *, trains: bool) -> JobView:
    """A run as a job, with what its journal has said.

    ``silent``: its journal has not grown for longer than it does while training; ``trains``: it holds something.
    """
    job: dict[str, Any] = {}
    try:
        job = tomllib.loads(rundir.read_text(path / rundir.JOB))
        result = rundir.read_json(path / rundir.RESULT) if (path / rundir.RESULT).is_file() else None
    except (DptrainError, tomllib.TOMLDecodeError):
        result = None
    last = story.last
    attempt = attempt_of(last) or 1
    step, epoch = int(last.get("step") or 0), float(last.get("epoch") or 0.0)
    total = _total(job, step, epoch)
    state, message = _state(result, silent, trains)
    if result is not None and result.get("attempt") == attempt:
        total = step = int(result["steps"]) if state == "SUCCEEDED" else step
    return JobView(
        id=path.name,
        name=str(job.get("name") or path.name),
        state=state,
        message=message,
        created=begun,
        started=begun,
        finished=told if state in ("SUCCEEDED", "FAILED") else 0.0,
        workers=len(last.get("compute") or ()),
        launches=attempt,
        step=step,
        total_steps=total,
        epoch=epoch,
        loss=last.get("loss"),
        metrics=story.metrics,
        samples_per_second=float(last.get("samples_per_second") or 0.0),
        remaining=_remaining(story.pace, total) if state == "RUNNING" else None,
        recoveries=story.recoveries + len(books.restarts(path)),
        losses=tuple(story.losses.values),
        result=result,
    )


def _state(result: Mapping[str, Any] | None, silent: bool, begun: bool) -> tuple[str, str]:
    if result is not None and result.get("state") == "done":
        return "SUCCEEDED", str(result.get("reason") or "")
    if not silent:
        return ("RUNNING", "") if begun else ("STARTING", "reads the data")
    if result is not None:
        return "PAUSED", "stopped on request; go on with --resume"
    return "FAILED", "no result and no sign of life; go on with --resume"


def _total(job: Mapping[str, Any], step: int, epoch: float) -> int:
    train = job.get("train", {})
    steps, epochs = train.get("steps"), train.get("epochs")
    if isinstance(steps, int) and steps > 0:
        return steps
    return round(epochs * step / epoch) if isinstance(epochs, (int, float)) and epoch > 0 else 0


def _remaining(pace: Sequence[tuple[int, float]], total: int) -> float | None:
    """At the pace of the newest lines."""
    if len(pace) < 2 or not total:
        return None
    done, took = pace[-1][0] - pace[0][0], pace[-1][1] - pace[0][1]
    return max(0.0, (total - pace[-1][0]) * took / done) if done > 0 and took > 0 else None


def _said(line: Mapping[str, Any]) -> Line:
    """A line of a journal as a run prints it."""
    event = line.get("event")
    if event:
        text = line.get("text") or json.dumps({key: value for key, value in line.items() if key != "event"})
        return Line(0.0, "err", 0, f"{event}: {text}")
    keys = ("step", "epoch", "loss", "lr", "samples_per_second")
    figures = [(key, line[key]) for key in keys if line.get(key) is not None]
    figures += list((line.get("metrics") or {}).items())
    pairs = (f"{key}={value:.5g}" if isinstance(value, float) else f"{key}={value}" for key, value in figures)
    return Line(0.0, "out", 0, " ".join(pairs))


def _missing(what: str) -> NotFoundError:
    return NotFoundError(what, expected="to be there", found="none of that name", cure="look at the list of jobs")
