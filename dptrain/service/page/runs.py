"""A folder of run directories as something that the page can read: no service, nothing to ask for."""

import contextlib
import json
import math
import os
import time
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dptrain import rundir
from dptrain.errors import DptrainError, NotFoundError, RefusedTransition
from dptrain.journal import read_all
from dptrain.service.page.reading import FIRST_READ, File, JobView, Line, Lines, Who

SILENT = 15.0
"""Seconds without a word after which a run without a result counts as ended. A run writes every second."""

POINTS = 40
"""Of a curve beside a job in the list."""

MOST = 200
"""Runs that are listed."""


class Runs:
    """The runs below a folder, or the folder itself if it is one. What has not changed is not read again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._known: dict[Path, tuple[tuple[float, ...], JobView]] = {}

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
        size = path.stat().st_size if path.exists() else 0
        known = cursor.isascii() and cursor.isdigit() and len(cursor) < 16
        offset = int(cursor) if known and int(cursor) <= size else 0
        try:
            with path.open("rb") as file:
                file.seek(offset)
                data = file.read()
        except OSError:
            return Lines([], cursor)
        whole = data.rfind(b"\n") + 1
        lines = [_said(json.loads(text)) for text in data[:whole].splitlines() if text.endswith(b"}")]
        return Lines(lines[-most:], str(offset + whole))

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
        files = (rundir.JOB, rundir.JOURNAL, rundir.RESULT)
        marks = [_mark(path / name) for name in files]
        now = time.time()
        silent = float(now - marks[1][0] > SILENT)
        seen = (*(value for mark in marks for value in mark), silent)
        known = self._known.get(path)
        if known is None and time.monotonic() > until:
            return _read(path, bool(silent), journal=False)
        if known is None or known[0] != seen:
            known = self._known[path] = (seen, _read(path, bool(silent)))
        return known[1]


def _mark(path: Path) -> tuple[float, float]:
    try:
        status = path.stat()
    except OSError:
        return 0.0, 0.0
    return status.st_mtime, float(status.st_size)


def _begun(path: Path) -> float:
    return _mark(path / rundir.JOB)[0]


def _read(path: Path, silent: bool, *, journal: bool = True) -> JobView:
    lines = read_all(path / rundir.JOURNAL) if journal else []
    job: dict[str, Any] = {}
    try:
        job = tomllib.loads(rundir.read_text(path / rundir.JOB))
        result = rundir.read_json(path / rundir.RESULT) if (path / rundir.RESULT).is_file() else None
    except (DptrainError, tomllib.TOMLDecodeError):
        result = None
    told, size = _mark(path / rundir.JOURNAL)
    return run_view(path.name, job, lines, result, silent=silent, begun=_begun(path), told=told, trains=size > 0)


def run_view(
    name: str,
    job: Mapping[str, Any],
    lines: Sequence[Mapping[str, Any]],
    result: Mapping[str, Any] | None,
    *,
    silent: bool,
    begun: float,
    told: float,
    trains: bool,
) -> JobView:
    """A run as a job, with what ``lines`` of its journal say.

    ``silent``: its journal has not grown for longer than it does while training; ``trains``: it holds something.
    """
    steps = [line for line in lines if isinstance(line.get("step"), int) and "event" not in line]
    last: Mapping[str, Any] = steps[-1] if steps else {}
    attempt = int(last.get("attempt") or 1)
    here = [line for line in steps if line.get("attempt") == attempt]
    step, epoch = int(last.get("step") or 0), float(last.get("epoch") or 0.0)
    total = _total(job, step, epoch)
    state, message = _state(result, silent, trains)
    if result is not None and result.get("attempt") == attempt:
        total = step = int(result["steps"]) if state == "SUCCEEDED" else step
    return JobView(
        id=name,
        name=str(job.get("name") or name),
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
        metrics=next((line["metrics"] for line in reversed(steps) if line.get("metrics")), {}),
        samples_per_second=float(last.get("samples_per_second") or 0.0),
        remaining=_remaining(here, total) if state == "RUNNING" else None,
        recoveries=sum(line.get("event") == "recovery" for line in lines),
        losses=losses_of(steps),
        result=result,
    )


def losses_of(steps: Sequence[Mapping[str, Any]]) -> list[float]:
    """A few points of a curve."""
    losses = [float(line["loss"]) for line in steps if line.get("loss") is not None]
    return [losses[i * (len(losses) - 1) // (POINTS - 1)] for i in range(POINTS)] if len(losses) > POINTS else losses


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


def _remaining(steps: Sequence[Mapping[str, Any]], total: int) -> float | None:
    """At the pace of the newest lines."""
    recent = steps[-30:]
    if len(recent) < 2 or not total:
        return None
    done = recent[-1]["step"] - recent[0]["step"]
    took = float(recent[-1]["seconds"]) - float(recent[0]["seconds"])
    return max(0.0, (total - recent[-1]["step"]) * took / done) if done > 0 and took > 0 else None


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
