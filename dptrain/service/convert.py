"""Jobs as the wire has them."""

import math
from typing import Any

from google.protobuf import duration_pb2, timestamp_pb2
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message

from dptrain import rundir
from dptrain.errors import StorageError
from dptrain.service.books import Progress
from dptrain.service.model import Job, Reason, Spec
from dptrain.service.runner import Runner
from dptrain.v1 import job_pb2


def job(found: Job, why: tuple[Reason, str]) -> job_pb2.Job:
    """A job, with the reason and the sentence that hold now."""
    message = job_pb2.Job(
        id=found.id,
        spec=spec(found.spec),
        owner=found.owner,
        state=job_pb2.JobState.ValueType(found.state),
        reason=job_pb2.JobReason.ValueType(why[0]),
        message=why[1],
        created_at=time(found.created),
        updated_at=time(found.updated),
        workers=found.workers,
        launches=found.launch,
        faults=found.faults,
    )
    if found.started:
        message.started_at.CopyFrom(time(found.started))
    if found.finished:
        message.finished_at.CopyFrom(time(found.finished))
    if found.exit_code is not None:
        message.exit_code = found.exit_code
    return message


def spec(found: Spec) -> job_pb2.JobSpec:
    """What was asked for."""
    least, most = found.workers
    message = job_pb2.JobSpec(
        job_toml=found.job_toml,
        workers=str(least) if least == most else f"{least}..{most}",
        name=found.name,
        labels=found.labels,
        priority=found.priority,
        max_retries=found.max_retries,
        model_source=found.model_source,
        environment=found.environment,
    )
    if found.max_seconds:
        message.max_duration.CopyFrom(duration(found.max_seconds))
    return message


def progress(found: Progress, total_steps: int, running: bool) -> job_pb2.JobProgress:
    """How far a job is; ``total_steps`` 0 where that is not known."""
    message = job_pb2.JobProgress(
        step=found.step,
        total_steps=total_steps,
        epoch=found.epoch,
        samples_per_second=found.samples_per_second,
        metrics=found.metrics,
        recoveries=found.recoveries,
    )
    if found.loss is not None:
        message.loss = found.loss
    if running and found.pace and total_steps > found.step:
        message.remaining.CopyFrom(duration(found.pace * (total_steps - found.step)))
    return message


def total_steps(run_toml: str, found: Progress) -> int:
    """The steps that a job has in all, as its stopping rule and its journal tell."""
    import tomllib

    train: dict[str, Any] = tomllib.loads(run_toml).get("train", {})
    if train.get("steps"):
        return int(train["steps"])
    if train.get("epochs") and found.epoch and found.step:
        return int(train["epochs"]) * max(1, round(found.step / found.epoch))
    return 0


def result(runner: Runner, job_id: str) -> job_pb2.JobResult | None:
    """What a job came to, if it has come to its end."""
    try:
        content = rundir.read_json(runner.run_dir(job_id) / rundir.RESULT)
    except StorageError:
        return None
    message = job_pb2.JobResult(
        weights_sha256=content["weights_sha256"],
        job_sha256=content["job_sha256"],
        steps=content["steps"],
        samples_per_second=content["samples_per_second"],
        same_bits=content["same_bits"],
        metrics={f"{part}.{name}": x for part, found in content["metrics"].items() for name, x in found.items()},
    )
    if content["loss"] is not None:
        message.loss = content["loss"]
    return message


def plain(message: Message) -> dict[str, Any]:
    """A message as plain data, for JSON."""
    found: dict[str, Any] = MessageToDict(message, preserving_proto_field_name=True)
    return found


def time(seconds: float) -> timestamp_pb2.Timestamp:
    """Seconds since 1970 as a timestamp."""
    fraction, whole = math.modf(seconds)
    return timestamp_pb2.Timestamp(seconds=int(whole), nanos=int(fraction * 1e9))


def duration(seconds: float) -> duration_pb2.Duration:
    """Seconds as a duration."""
    fraction, whole = math.modf(seconds)
    return duration_pb2.Duration(seconds=int(whole), nanos=int(fraction * 1e9))


def seconds(message: "timestamp_pb2.Timestamp | duration_pb2.Duration") -> float:
    """A timestamp's or duration's seconds."""
    return message.seconds + message.nanos / 1e9
