"""The run directory: what one execution leaves behind, and how it is found again."""

import json
import os
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dptrain import afar
from dptrain.afar import FarPath
from dptrain.checkpoint import write_durably
from dptrain.errors import StorageError, UsageError

JOB, JOURNAL, CHECKPOINTS, RESULT = "job.toml", "journal.jsonl", "checkpoints", "result.json"
ARRIVALS = "arrivals.jsonl"
WEIGHTS, ENCODING, MODEL_SOURCE = "weights.safetensors", "encoding.json", "model.py"
RESTARTS = "restarts.jsonl"


def fresh(runs: Path, name: str) -> Path:
    """A new directory below ``runs``, named after the job and the time. Raises StorageError."""
    stem = f"{_safe(name)}-{time.strftime('%Y%m%d-%H%M%S')}"
    for attempt in range(1000):
        path = runs / (stem if attempt == 0 else f"{stem}-{attempt + 1}")
        if make(path):
            return path
    raise StorageError(str(runs / stem), expected="a free name", found="a thousand taken ones", cure="clean up")


def make(path: Path) -> bool:
    """Create a directory; False if it was there already. Raises StorageError where that can't be."""
    try:
        if isinstance(path, FarPath):
            if path.exists():
                return False
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir()
    except FileExistsError:
        return False
    except OSError as error:
        raise StorageError(
            f"run directory {path}",
            expected="to be created",
            found=error.strerror or str(error),
            cure="choose another place with --run-dir or output.runs",
        ) from None
    return True


def claim(path: Path, *, resume: bool) -> Path:
    """A directory of the user's choice, made if need be; one that holds a run already is only taken to resume it."""
    made = make(path)
    if not made and not path.is_dir():
        raise StorageError(f"run directory {path}", expected="a directory", found="a file", cure="choose another")
    left = next((name for name in (JOURNAL, CHECKPOINTS, RESULT) if (path / name).exists()), "")
    if left and not resume:
        raise UsageError(
            f"run directory {path}",
            expected="no run in it yet",
            found=f"{left} of an earlier one",
            cure="go on with --resume, or choose another --run-dir",
        )
    if not isinstance(path, FarPath) and not os.access(path, os.W_OK):
        raise StorageError(
            f"run directory {path}", expected="leave to write", found="none", cure="choose another with --run-dir"
        )
    return path


def take_over() -> None:
    """Have nobody write to a run directory on the supervisor's machine but this side. Raises StorageError."""
    try:
        afar.claim()
    except OSError as error:
        raise StorageError(
            "the run directory on the supervisor's machine",
            expected="that this side may write there",
            found=error.strerror or str(error),
            cure="those who may go on; or go on with --resume",
        ) from None


def newest(runs: Path, name: str) -> Path:
    """The newest run of a job below ``runs``, for ``--resume`` without ``--run-dir``. Raises UsageError."""
    ours = re.compile(re.escape(_safe(name)) + r"-\d{8}-\d{6}(-\d+)?")
    paths = runs.iterdir() if runs.is_dir() else ()
    found = [p for p in paths if ours.fullmatch(p.name) and (p / JOURNAL).is_file()]
    if not found:
        raise UsageError(
            f"--resume of job {name!r}",
            expected=f"a run of it below {runs}",
            found="none",
            cure="name it with --run-dir, or start without --resume",
        )
    return max(found, key=lambda p: (p / JOURNAL).stat().st_mtime_ns)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a file whole or not at all. Raises StorageError."""
    write_text(path, json.dumps(content, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all. Raises StorageError."""
    try:
        write_durably(path, text.encode())
    except OSError as error:
        raise StorageError(
            str(path),
            expected="to be written",
            found=error.strerror or str(error),
            cure="make room or make the folder writable, then go on with --resume",
        ) from None


def read_text(path: Path, cure: str = "check the path") -> str:
    """The content of a file. Raises StorageError."""
    try:
        return path.read_bytes().decode()
    except (OSError, UnicodeDecodeError) as error:
        found = getattr(error, "strerror", None) or str(error)
        raise StorageError(str(path), expected="a readable file", found=found, cure=cure) from None


def read_json(path: Path) -> Any:
    """The content of a JSON file of a run. Raises StorageError."""
    text = read_text(path, "name a finished run directory")
    try:
        return json.loads(text)
    except ValueError as error:
        raise StorageError(str(path), expected="valid JSON", found=str(error), cure="restore the file") from None


def _safe(name: str) -> str:
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in name).strip(".") or "job"
