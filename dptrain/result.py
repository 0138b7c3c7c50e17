"""What came of a run: the content of result.json."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Result:
    """What result.json holds. ``state`` is "done", or "stopped" where a signal ended the run before its rule.

    ``staleness``, where updates may be late: the highest allowed ("bound", None: any), "mean" and "max", and how many
    "updates" had which.
    """

    state: str
    steps: int
    epochs: float
    loss: float | None
    metrics: dict[str, dict[str, float]]
    samples_per_second: float
    seconds: float
    weights_sha256: str
    job_sha256: str
    workers: int
    shards: int
    exchange: str
    arithmetic: dict[str, Any]
    fingerprint: str
    same_bits: bool
    recoveries: list[dict[str, Any]]
    per_worker: list[dict[str, Any]]
    run_dir: str
    reason: str = ""
    result: str = "last"
    signal: int = 0
    attempt: int = 1
    slowest: dict[str, Any] | None = None
    staleness: dict[str, Any] | None = None
