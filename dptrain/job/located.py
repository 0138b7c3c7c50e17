"""Where a job's files are on a node that sees none of the supervisor's: its agent was lent them."""

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from dptrain import afar
from dptrain.job.spec import Job


def located(job: Job) -> Job:
    """The job with the paths of this machine."""
    if not afar.reached():
        return job
    data: dict[str, Any] = {key: _here(job, value) for key, value in _data(job)}
    python, colon, function = job.model.python.rpartition(":")
    model = replace(
        job.model, python=f"{_here(job, python)}{colon}{function}", init_from=_here(job, job.model.init_from)
    )
    return replace(job, data=replace(job.data, **data), model=model)


def lent(job: Job, path: str) -> str:
    """Where a file of the supervisor's is on this node; "" where it was not lent."""
    return _files().get(str(Path(job.directory, path)), "") if afar.reached() and path else ""


def paths(job: Job) -> list[str]:
    """The absolute paths of all files and folders that a job names and that are there, on the supervisor's machine."""
    named = [value for _, value in _data(job)] + [job.model.python.rpartition(":")[0], job.model.init_from]
    found = [Path(job.directory, path).expanduser() for path in named if path]
    return [str(path) for path in found if path.exists()]


def _data(job: Job) -> Iterator[tuple[str, Any]]:
    for key in ("source", "validation", "test"):
        value = getattr(job.data, key)
        if isinstance(value, str):
            yield key, value


def _here(job: Job, path: str) -> str:
    return lent(job, path) or path


@cache
def _files() -> dict[str, str]:
    found: dict[str, str] = afar.launch()["files"]
    return found
