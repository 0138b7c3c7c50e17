"""What a request for a job may say, and which field an answer blames."""

from pathlib import Path

import pytest
from google.protobuf.duration_pb2 import Duration

from dptrain.errors import DptrainError, JobError
from dptrain.service.datasets import Datasets
from dptrain.service.intake import (
    MOST_LABEL,
    MOST_LABELS,
    MOST_NAME,
    MOST_RETRIES,
    MOST_TEXT,
    Intake,
    checked_labels,
    checked_name,
    checked_priority,
    digest,
    new_id,
    parse,
)
from dptrain.service.model import DEFAULT_RETRIES
from dptrain.v1 import job_pb2
from tests.service.jobs import JOB


def asked(**changes: object) -> job_pb2.JobSpec:
    return job_pb2.JobSpec(**{"job_toml": JOB, **changes})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def intake(root: Path) -> Intake:
    return Intake(Datasets(root, None, 1 << 30), 4)


@pytest.fixture(scope="module")
def open_intake(root: Path) -> Intake:
    return Intake(Datasets(root, None, 1 << 30), 4, allow_code=True)


def test_what_is_left_out_has_its_default(intake: Intake) -> None:
    found = intake.spec(asked(), "me")
    assert (found.name, found.workers, found.priority, found.max_seconds) == ("tiny", (1, 1), 0, 0.0)
    assert found.max_retries == DEFAULT_RETRIES
    assert found.job_toml == JOB
    assert parse(found.run_toml).name == "tiny"


def test_what_is_said_is_taken(intake: Intake) -> None:
    found = intake.spec(
        asked(
            name="mine",
            workers="2..4",
            labels={"a": "b"},
            priority=-3,
            max_retries=0,
            max_duration=Duration(seconds=2, nanos=500_000_000),
        ),
        "me",
    )
    assert (found.name, found.workers, found.priority) == ("mine", (2, 4), -3)
    assert (found.labels, found.max_retries, found.max_seconds) == ({"a": "b"}, 0, 2.5)


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"job_toml": ""}, "spec.job_toml"),
        ({"job_toml": " \n"}, "spec.job_toml"),
        ({"job_toml": "a = "}, "spec.job_toml"),
        ({"job_toml": "a = " + "[" * 20_000}, "spec.job_toml"),
        ({"job_toml": JOB + "\n#" + "x" * MOST_TEXT}, "spec.job_toml"),
        ({"job_toml": 'directory = "/"' + JOB}, "spec.job_toml: directory"),
        ({"job_toml": JOB.replace("steps = 30", "steps = -1")}, "spec.job_toml"),
        ({"job_toml": JOB.replace('"digits"', '"../../etc/passwd"')}, "spec.job_toml: data.source"),
        ({"job_toml": JOB + "\n[arithmetic]\nthreads = 5\n"}, "spec.job_toml: arithmetic.threads"),
        ({"name": "n" * (MOST_NAME + 1)}, "spec.name"),
        ({"workers": "5"}, "workers"),
        ({"workers": "2..1"}, "workers"),
        ({"labels": {"": "x"}}, "spec.labels"),
        ({"labels": {"x": "y" * (MOST_LABEL + 1)}}, "spec.labels"),
        ({"priority": 101}, "spec.priority"),
        ({"max_retries": MOST_RETRIES + 1}, "spec.max_retries"),
        ({"max_duration": Duration()}, "spec.max_duration"),
        ({"max_duration": Duration(seconds=1 << 40)}, "spec.max_duration"),
        ({"model_source": "x"}, "spec.model_source"),
        ({"environment": {"A": "b"}}, "spec.environment"),
    ],
)
def test_what_can_t_be_is_refused_by_its_field(intake: Intake, changes: dict[str, object], where: str) -> None:
    with pytest.raises(DptrainError) as caught:
        intake.spec(asked(**changes), "me")
    assert caught.value.where.startswith(where)


@pytest.mark.parametrize(
    "name", ["LD_PRELOAD", "PYTHONPATH", "OMPI_X", "PATH", "DPTRAIN_TOKEN", "ld_x", "a b", "é", ""]
)
def test_variables_of_the_system_are_no_job_s_even_where_code_is_allowed(open_intake: Intake, name: str) -> None:
    with pytest.raises(JobError, match="a variable of the job's own"):
        open_intake.spec(asked(environment={name: "x"}), "me")
    assert open_intake.spec(asked(environment={"MINE": "x\ny"}), "me").environment == {"MINE": "x\ny"}


def test_a_model_s_source_comes_with_its_name(open_intake: Intake) -> None:
    text = JOB.replace('layers = [{ type = "linear", units = 10 }]', 'python = "/tmp/x.py:net"')
    with pytest.raises(JobError, match="the source of model"):
        open_intake.spec(asked(job_toml=text), "me")
    run = parse(open_intake.spec(asked(job_toml=text, model_source="def net(): ..."), "me").run_toml)
    assert run.model.python == "model.py:net"


def test_equal_requests_have_one_digest_whatever_the_order() -> None:
    pairs = [(f"key-{i}", str(i)) for i in range(20)]
    assert digest(asked(labels=dict(pairs))) == digest(asked(labels=dict(reversed(pairs))))
    assert digest(asked(labels=dict(pairs))) != digest(asked(labels=dict(pairs[1:])))


def test_limits_are_taken_and_one_more_is_not() -> None:
    assert checked_name("n" * MOST_NAME)
    assert checked_priority(-100) == -100
    assert len(checked_labels({str(i): "" for i in range(MOST_LABELS)})) == MOST_LABELS
    with pytest.raises(JobError):
        checked_labels({str(i): "" for i in range(MOST_LABELS + 1)})


def test_ids_are_short_plain_and_never_the_same() -> None:
    found = {new_id() for _ in range(1000)}
    assert len(found) == 1000
    assert all(len(name) == 12 and name.isalnum() and not set(name) & set("ilou") for name in found)
