"""What several runs differ in, read from their directories: the job's keys, the figures, the bits, the speed."""

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dptrain import rundir
from dptrain.errors import StorageError
from dptrain.journal import read_all, read_steps

ABSENT = None
"""The value of a key that a run's job doesn't have."""


@dataclass(frozen=True)
class Compared:
    """One run. ``curve`` is its loss by step; ``figures`` what it came to, or has come to so far."""

    run: str
    state: str
    figures: dict[str, Any]
    curve: list[tuple[int, float]]


@dataclass(frozen=True)
class Comparison:
    """Several runs side by side; ``differences`` holds, for each key of the job that differs, a value a run.

    ``same_weights`` and ``same_job`` compare digests; None where a run has not got one yet.
    """

    runs: list[Compared]
    differences: dict[str, list[Any]]
    same_job: bool | None
    same_weights: bool | None

    def plain(self) -> dict[str, Any]:
        """As data for JSON."""
        return asdict(self)


def compare(paths: Sequence[Path], names: Sequence[str] | None = None) -> Comparison:
    """Compare runs, finished or not, called by their paths or by names. Raises StorageError where one is no run."""
    jobs = [_flat(_job(path)) for path in paths]
    runs = [_compared(path, name) for path, name in zip(paths, names or map(str, paths), strict=True)]
    keys = sorted(set().union(*jobs))
    rows = {key: [job.get(key, ABSENT) for job in jobs] for key in keys}
    return Comparison(
        runs,
        {key: values for key, values in rows.items() if any(value != values[0] for value in values)},
        _same([run.figures.get("job_sha256") for run in runs]),
        _same([run.figures.get("weights_sha256") for run in runs]),
    )


def _job(path: Path) -> dict[str, Any]:
    text = rundir.read_text(path / rundir.JOB, "name the directory of a run")
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise StorageError(
            str(path / rundir.JOB), expected="valid TOML", found=str(error), cure="restore the file"
        ) from None


def _compared(path: Path, name: str) -> Compared:
    lines = read_steps(path / rundir.JOURNAL)
    curve = [(line["step"], line["loss"]) for line in lines if line.get("loss") is not None]
    if (path / rundir.RESULT).exists():
        result = rundir.read_json(path / rundir.RESULT)
        figures = {key: result.get(key) for key in ("steps", "epochs", "loss")}
        for part, metrics in result.get("metrics", {}).items():
            figures |= {f"{part} {name}": value for name, value in metrics.items()}
        for key in ("samples_per_second", "seconds", "workers", "exchange", "same_bits"):
            figures[key] = result.get(key)
        figures["recoveries"] = len(result.get("recoveries", []))
        figures |= {key: result.get(key) for key in ("job_sha256", "weights_sha256")}
        return Compared(name, str(result.get("state")), figures, curve)
    figures = {}
    if lines:
        last = lines[-1]
        metrics = next((line["metrics"] for line in reversed(lines) if line.get("metrics")), {})
        figures = {"steps": last["step"], "epochs": last.get("epoch"), "loss": last.get("loss")}
        figures |= {f"validation {name}": value for name, value in metrics.items()}
        figures |= {"samples_per_second": last.get("samples_per_second"), "seconds": last.get("seconds")}
        figures["recoveries"] = sum(line.get("event") == "recovery" for line in read_all(path / rundir.JOURNAL))
    return Compared(name, "unfinished", figures, curve)


def _flat(content: Mapping[str, Any], at: str = "") -> dict[str, Any]:
    """Nested tables as dotted keys; a list of tables (the layers) as ``model.layers.0``, ``.1`` ..."""
    found: dict[str, Any] = {}
    for key, value in content.items():
        name = f"{at}{key}"
        if isinstance(value, Mapping):
            found |= _flat(value, f"{name}.")
        elif isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
            found |= _flat({str(i): item for i, item in enumerate(value)}, f"{name}.")
        else:
            found[name] = value
    return found


def _same(digests: Sequence[str | None]) -> bool | None:
    return None if None in digests else len(set(digests)) == 1
