"""What a job is called by its bits: two digests over what decides them, and nothing else."""

import hashlib
import json
from dataclasses import fields, is_dataclass
from typing import Any, NamedTuple

from dptrain.job.spec import LAUNCH, STOPPING, Job, needs_validation


class JobDigest(NamedTuple):
    """``job`` covers all that decides the result's bits.

    Two jobs of one ``trajectory`` pass through the same weights: one can go on from the other's checkpoint. Where
    evaluations decide when to stop or what to keep, they must be made alike too: ``judging`` covers how.
    """

    job: str
    trajectory: str
    judging: str


def digest_job(job: Job, *, data: str, model: str, start: str, decay_steps: int) -> JobDigest:
    """The digests of a job, with those of what it refers to.

    ``data`` is the data's digest, ``model`` that of a Python model's source (or ""), ``start`` that of the weights
    it starts from (or ""), ``decay_steps`` the length of the schedule's decay, which may follow from the stopping rule
    (0 where it has none).
    """
    decisive = _decisive(job)
    data_section = decisive["data"]
    for key in ("source", "format"):
        data_section.pop(key)
    for part in ("validation", "test"):
        if isinstance(data_section[part], str):
            data_section[part] = "by digest"
    decisive["data"]["digest"] = data
    decisive["model"].update(python=model, init_from=start)
    decisive["optimizer"]["schedule"]["decay_steps"] = decay_steps
    _leave_out_what_is_as_ever(decisive["arithmetic"])
    whole = _sha256(decisive) if needs_validation(job) else ""
    train, loss = decisive["train"], decisive["loss"]
    judging = [train.pop("stop"), *(train.pop(key) for key in ("evaluate_steps", "evaluate_rows"))]
    judging += [loss.pop(key) for key in ("metrics", "top_k")]
    whole = whole or _sha256(decisive)
    for key in _stopping(job.train):
        train.pop(key)
    for key in _stopping(job.train.stop):
        judging[0].pop(key)
    return JobDigest(whole, _sha256(decisive), _sha256(judging))


def _leave_out_what_is_as_ever(arithmetic: dict[str, Any]) -> None:
    """Gradients in the job's dtype have no word in its digests, nor a share of elements that nobody asks for."""
    if arithmetic["gradients"] != "top_k":
        del arithmetic["top_k"]
    if arithmetic["gradients"] in ("auto", "float32"):
        del arithmetic["gradients"]


def _decisive(spec: Any) -> Any:
    if is_dataclass(spec) and not isinstance(spec, type):
        return {
            f.name: _decisive(getattr(spec, f.name))
            for f in fields(spec)
            if f.metadata.get("role") is not LAUNCH["role"]
        }
    if isinstance(spec, (list, tuple)):
        return [_decisive(item) for item in spec]
    return dict(spec) if hasattr(spec, "keys") else spec


def _stopping(spec: Any) -> list[str]:
    return [f.name for f in fields(spec) if f.metadata.get("role") is STOPPING["role"]]


def _sha256(content: Any) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()
