"""The service's jobs as something that the page can read, and steer."""

import math
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dptrain import rundir
from dptrain.errors import StorageError
from dptrain.service import below, books, convert, verbs
from dptrain.service.desk import Desk
from dptrain.service.filter import Query
from dptrain.service.job_service import GRACE
from dptrain.service.model import ENDED, Job, State
from dptrain.service.page.curves import Thinned
from dptrain.service.page.reading import FIRST_READ, File, JobView, Line, Lines, Who

MOST = 200
"""Jobs that are listed."""

POINTS = 40
"""Of a curve beside a job in the list, or up to twice as many."""

_VERBS: Mapping[str, Callable[[Job], Job]] = {
    "pause": lambda job: verbs.pause(job, time.time()),
    "resume": lambda job: verbs.resume(job, time.time()),
    "cancel": lambda job: verbs.cancel(job, time.time(), GRACE),
    "retry": lambda job: verbs.retry(job, time.time()),
}


@dataclass
class _Seen:
    """What was made of a job, and of what."""

    mark: tuple[Any, ...] = ()
    view: JobView | None = None
    losses: Thinned = field(default_factory=lambda: Thinned(POINTS))
    offset: int = 0


class Jobs:
    """See Reading. A job whose state and journal are as before is not looked at again."""

    def __init__(self, desk: Desk) -> None:
        self.desk = desk
        self._lock = threading.Lock()
        self._seen: dict[str, _Seen] = {}

    def server(self, who: Who) -> Mapping[str, Any]:
        """See Reading."""
        from importlib.metadata import version

        slots = self.desk.conductor.slots
        busy = slots - self.desk.conductor.free
        return {"version": version("dptrain"), "slots": slots, "busy": max(0, busy)}

    def jobs(self, who: Who) -> Sequence[JobView]:
        """See Reading."""
        found, _ = self.desk.store.page(Query.of(_owner(who), MOST, "", "", ""))
        with self._lock:
            if len(self._seen) > 4 * MOST:
                self._seen = {job.id: self._seen[job.id] for job in found if job.id in self._seen}
        until = time.monotonic() + FIRST_READ
        return [self._view(job, until) for job in found]

    def job(self, who: Who, job_id: str) -> JobView:
        """See Reading."""
        return self._view(self._find(who, job_id))

    def journal(self, who: Who, job_id: str) -> Path:
        """See Reading."""
        return self.desk.journal(self._find(who, job_id).id)

    def log(self, who: Who, job_id: str, cursor: str, most: int) -> Lines:
        """See Reading."""
        path = self.desk.log(self._find(who, job_id).id)
        offset = books.cursor_of(cursor) if cursor else books.tail_of(path, most, lambda line: True)
        found, after = books.read(path, offset)
        told = [
            Line(float(line.get("t", 0)), str(line.get("s", "")), int(line.get("r", 0)), str(line.get("l", "")))
            for _, line in found
        ]
        return Lines(told, str(after))

    def config(self, who: Who, job_id: str) -> str:
        """See Reading."""
        return self._find(who, job_id).spec.job_toml

    def files(self, who: Who, job_id: str) -> Sequence[File]:
        """See Reading."""
        found = below.walk(self.desk.runner.run_dir(self._find(who, job_id).id))
        whole = [file for file in found if not any(part.startswith(".") for part in file.path.split("/"))]
        return [File(file.path, file.size, file.modified) for file in whole]

    def file(self, who: Who, job_id: str, path: str) -> int:
        """See Reading."""
        job = self._find(who, job_id)
        with below.opened(self.desk.runner.run_dir(job.id), path, f"file of job {job.id}") as handle:
            return os.dup(handle)

    def act(self, who: Who, job_id: str, verb: str) -> JobView:
        """See Reading."""
        return self._view(self.desk.store.change(self._find(who, job_id).id, _VERBS[verb]))

    def _find(self, who: Who, job_id: str) -> Job:
        return self.desk.store.find(job_id, _owner(who))

    def _view(self, job: Job, until: float = math.inf) -> JobView:
        """A job as it is; past a time, what it is in the store alone, if its journal was never read."""
        reason, message = self.desk.conductor.why(job)
        journal = self.desk.journal(job.id)
        size = books.size(journal)
        mark = (job.state, reason, message, job.updated, job.spec.name, job.spec.priority, job.workers, size)
        with self._lock:
            seen = self._seen.setdefault(job.id, _Seen())
            if seen.view is None and size and time.monotonic() > until:
                return self._made(job, reason.name, message)
            if seen.view is None or seen.mark != mark:
                self._read_losses(seen, journal, size)
                more = {**self._progress(job), "losses": tuple(seen.losses.values), "result": self._result(job)}
                seen.mark, seen.view = mark, self._made(job, reason.name, message, **more)
            return seen.view

    def _made(self, job: Job, reason: str, message: str, **more: Any) -> JobView:
        return JobView(
            id=job.id,
            name=job.spec.name,
            state=job.state.name,
            owner=job.owner,
            reason=reason,
            message=message,
            created=job.created,
            started=job.started,
            finished=job.finished,
            workers=job.workers,
            priority=job.spec.priority,
            launches=job.launch,
            verbs=_possible(job.state),
            **more,
        )

    def _progress(self, job: Job) -> dict[str, Any]:
        if not job.launch:
            return {}
        progress = self.desk.progress(job)
        return {
            "step": progress.step,
            "total_steps": progress.total_steps,
            "epoch": progress.epoch,
            "loss": progress.loss if progress.HasField("loss") else None,
            "metrics": dict(progress.metrics),
            "samples_per_second": progress.samples_per_second,
            "remaining": convert.seconds(progress.remaining) if progress.HasField("remaining") else None,
            "recoveries": progress.recoveries,
        }

    def _result(self, job: Job) -> Mapping[str, Any] | None:
        if job.state is not State.SUCCEEDED:
            return None
        try:
            content = rundir.read_json(self.desk.runner.run_dir(job.id) / rundir.RESULT)
        except StorageError:
            return None
        return {key: content.get(key) for key in ("weights_sha256", "job_sha256", "same_bits", "metrics", "steps")}

    def _read_losses(self, seen: _Seen, journal: Path, size: int) -> None:
        """Take in what the journal has more."""
        if size < seen.offset:
            seen.losses, seen.offset = Thinned(POINTS), 0
        for lines, after in books.grown(journal, seen.offset, size, books.read):
            for _, line in lines:
                if "event" not in line and line.get("loss") is not None:
                    seen.losses.add(float(line["loss"]))
            seen.offset = after


def _owner(who: Who) -> str | None:
    """Whose jobs a person sees, as for calls (``desk.scope``)."""
    return None if who.role == "admin" else who.name.partition("/")[0]


def _possible(state: State) -> tuple[str, ...]:
    """What may be asked of a job in a state."""
    if state in (State.FAILED, State.CANCELLED):
        return ("retry",)
    if state in ENDED:
        return ()
    if state is State.PAUSED:
        return ("resume", "cancel")
    return ("cancel",) if state in (State.PAUSING, State.CANCELLING) else ("pause", "cancel")
