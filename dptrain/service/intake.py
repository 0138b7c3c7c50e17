"""What comes in is checked here, once: a job over the network carries data, never code, unless the operator said so."""

import hashlib
import secrets
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from dptrain.errors import JobError
from dptrain.job import load
from dptrain.job import spec as job_spec
from dptrain.service import runner
from dptrain.service.datasets import Datasets
from dptrain.service.model import DEFAULT_RETRIES, MOST_SECONDS, Spec, workers_of
from dptrain.v1 import job_pb2

MOST_TEXT = 256 << 10
MOST_NAME, MOST_LABELS, MOST_LABEL, MOST_PRIORITY, MOST_RETRIES = 200, 32, 63, 100, 100
_BUILT_IN = frozenset({"digits", "synthetic"})
_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"
_JOB_FILE = "spec.job_toml"


def new_id() -> str:
    """A job's ID: 60 random bits in letters and digits that can't be mistaken for one another."""
    return "".join(secrets.choice(_ALPHABET) for _ in range(12))


@dataclass(frozen=True)
class Intake:
    """What this server takes: data below its roots, code only with ``allow_code``, at most ``slots`` workers a job."""

    datasets: Datasets
    slots: int
    allow_code: bool = False

    def __post_init__(self) -> None:
        # The first job is not to wait for what checking a job loads.
        parse(load.to_toml(load.load_job(None)))

    def spec(self, asked: job_pb2.JobSpec, owner: str) -> Spec:
        """The checked spec of a request. Raises JobError or DataError, whose place begins with the field."""
        for name, text in (("job_toml", asked.job_toml), ("model_source", asked.model_source)):
            if len(text.encode()) > MOST_TEXT:
                raise _refused(name, f"at most {MOST_TEXT} bytes", str(len(text.encode())))
        self._refuse_code(asked)
        job = parse(asked.job_toml)
        run = self._run(job, asked, owner)
        return Spec(
            job_toml=asked.job_toml,
            run_toml=load.to_toml(run),
            name=checked_name(asked.name or job.name),
            workers=workers_of(asked.workers, self.slots),
            labels=checked_labels(asked.labels),
            priority=checked_priority(asked.priority),
            max_retries=_retries(asked),
            max_seconds=_seconds(asked),
            model_source=asked.model_source,
            environment=dict(asked.environment),
        )

    def _refuse_code(self, asked: job_pb2.JobSpec) -> None:
        if not self.allow_code and (asked.model_source or asked.environment):
            name = "model_source" if asked.model_source else "environment"
            raise _code(name)
        if len(asked.environment) > MOST_LABELS:
            raise _refused("environment", f"at most {MOST_LABELS} variables", str(len(asked.environment)))
        for name, value in asked.environment.items():
            if not runner.permitted(name) or "\0" in value or len(value) > 4096:
                raise _refused("environment", "a variable of the job's own, not the system's", repr(name[:80]))

    def _run(self, job: job_spec.Job, asked: job_pb2.JobSpec, owner: str) -> job_spec.Job:
        """The job as it runs here: paths of this machine, and nothing written but into its run directory."""
        model = job.model
        if model.python:
            if not self.allow_code:
                raise _code("job_toml: model.python")
            if not asked.model_source:
                raise _refused("model_source", "the source of model.python", "nothing")
            function = model.python.rpartition(":")[2]
            model = replace(model, python=f"{runner.MODEL}:{function}")
        if model.init_from:
            at = self.datasets.resolve(owner, model.init_from, f"{_JOB_FILE}: model.init_from")
            model = replace(model, init_from=str(at))
        if job.arithmetic.threads > self.slots:
            raise _refused("job_toml: arithmetic.threads", f"at most {self.slots}", str(job.arithmetic.threads))
        output = replace(job.output, runs="runs")
        return replace(job, data=self._data(job.data, owner), model=model, output=output)

    def _data(self, data: job_spec.Data, owner: str) -> job_spec.Data:
        def placed(key: str, source: str) -> str:
            return str(self.datasets.resolve(owner, source, f"{_JOB_FILE}: data.{key}"))

        found: dict[str, Any] = {"max_bytes": min(data.max_bytes, max(1, self.datasets.quota))}
        if data.source not in _BUILT_IN:
            found["source"] = placed("source", data.source)
        elif data.format not in ("auto", "embedded", "synthetic"):
            raise _refused("job_toml: data.format", "auto for built-in data", repr(data.format))
        for key in ("validation", "test"):
            value = getattr(data, key)
            if isinstance(value, str):
                found[key] = placed(key, value)
        return replace(data, **found)


def parse(text: str) -> job_spec.Job:
    """The checked job of a job file's text. Raises JobError."""
    if not text.strip():
        raise _refused("job_toml", "a job file's text", "nothing")
    try:
        content = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        found = str(error)[:200] if isinstance(error, ValueError) else "tables or lists nested too deeply"
        raise _refused("job_toml", "valid TOML", found) from None
    if "directory" in content:
        raise _refused("job_toml: directory", "a key of the job", "'directory'")
    content.setdefault("name", "job")
    try:
        return load.complete(load.check({**content, "directory": "."}, _JOB_FILE), _JOB_FILE)
    except RecursionError:
        raise _refused("job_toml", "a job file", "tables or lists nested too deeply") from None


def digest(asked: job_pb2.JobSpec) -> str:
    """SHA-256 of a spec: equal for equal ones, in whatever order their maps came."""
    return hashlib.sha256(asked.SerializeToString(deterministic=True)).hexdigest()


def checked_name(name: str) -> str:
    """A job's name. Raises JobError."""
    if not 0 < len(name) <= MOST_NAME:
        raise _refused("name", f"1 to {MOST_NAME} characters", str(len(name)))
    return name


def checked_labels(labels: Mapping[str, str]) -> dict[str, str]:
    """A job's labels. Raises JobError."""
    found = dict(labels)
    if len(found) > MOST_LABELS or any(not key for key in found):
        raise _refused("labels", f"at most {MOST_LABELS}, with names", str(len(found)))
    if any(len(text) > MOST_LABEL for pair in found.items() for text in pair):
        raise _refused("labels", f"names and values of at most {MOST_LABEL} characters", "longer ones")
    return found


def checked_priority(priority: int) -> int:
    """A job's priority. Raises JobError."""
    if abs(priority) > MOST_PRIORITY:
        raise _refused("priority", f"-{MOST_PRIORITY} to {MOST_PRIORITY}", str(priority))
    return priority


def _retries(asked: job_pb2.JobSpec) -> int:
    if not asked.HasField("max_retries"):
        return DEFAULT_RETRIES
    if asked.max_retries > MOST_RETRIES:
        raise _refused("max_retries", f"at most {MOST_RETRIES}", str(asked.max_retries))
    return asked.max_retries


def _seconds(asked: job_pb2.JobSpec) -> float:
    if not asked.HasField("max_duration"):
        return 0.0
    seconds = asked.max_duration.seconds + asked.max_duration.nanos / 1e9
    if not 0 < seconds <= MOST_SECONDS:
        raise _refused("max_duration", "more than 0 and at most a year", f"{seconds:g} s")
    return seconds


def _code(name: str) -> JobError:
    return JobError(
        f"spec.{name}",
        expected="data alone: this server takes no code over the network",
        found="code",
        cure="use layers, or have the operator start `dptrain serve` with --allow-code",
    )


def _refused(name: str, expected: str, found: str) -> JobError:
    return JobError(f"spec.{name}", expected=expected, found=found, cure="correct it")
