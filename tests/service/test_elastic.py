"""A job for a parameter server gives slots back and takes them again while it trains, all in one launch."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dptrain.service.client import Client
from dptrain.service.model import State
from dptrain.service.server import JOBS, JobServer
from dptrain.v1 import job_pb2
from tests.service.jobs import JOB, LONG, solo_hash

PS = '\n[exchange]\ntype = "ps"\n'


def until(client: Client, job: str, holds: Callable[[job_pb2.Job], bool]) -> job_pb2.Job:
    """The job as soon as that is so."""
    end = time.monotonic() + 240
    while not holds(found := client.job(job)):
        assert found.state not in (State.FAILED, State.SUCCEEDED, State.CANCELLED), found
        assert time.monotonic() < end, found
        time.sleep(0.05)
    return found


def trains_with(workers: int) -> Callable[[job_pb2.Job], bool]:
    message = f"trains with {workers} worker{'s' if workers > 1 else ''}"
    return lambda job: job.state == State.RUNNING and job.workers == workers and job.message == message


@pytest.mark.long
@pytest.mark.parametrize("killed", [False, True], ids=["", "server in between"])
def test_slots_go_back_and_forth_at_steps(
    serve: Callable[..., JobServer], environ: dict[str, str], tmp_path: Path, killed: bool
) -> None:
    server: JobServer

    @contextmanager
    def served() -> Iterator[Client]:
        nonlocal server
        server = serve(slots=3)
        with Client(str(server.address), environ=environ) as client:
            yield client
        server.__exit__()

    (tmp_path / "elastic.toml").write_text(JOB.replace("steps = 30", "steps = 12000") + PS)
    (tmp_path / "other.toml").write_text(LONG)
    with served() as client:
        first = client.submit(tmp_path / "elastic.toml", workers="1..3").id
        until(client, first, trains_with(3))
        other = client.submit(tmp_path / "other.toml", workers=2).id
        if not killed:
            until(client, other, lambda job: job.state == State.RUNNING)
            assert trains_with(1)(client.job(first))
            client.cancel(other)
            until(client, first, trains_with(3))
        else:
            until(client, first, lambda job: "goes on with 1 worker" in job.message)
    if killed:
        with served() as client:
            until(client, other, lambda job: job.state == State.RUNNING)
            assert trains_with(1)(client.job(first))
            client.cancel(other)
            until(client, first, trains_with(3))
    with served() as client:
        assert client.wait(first).state == State.SUCCEEDED
        assert not client.job(first).progress.recoveries
    folder = tmp_path / "data" / JOBS / first
    assert len((folder / "begun.jsonl").read_text().splitlines()) == 1
    assert json.loads((folder / "run" / "result.json").read_text())["weights_sha256"] == solo_hash(
        tmp_path, JOB.replace("steps = 30", "steps = 12000")
    )
    events = [json.loads(line) for line in (folder / "run" / "journal.jsonl").read_text().splitlines()]
    assert [(line["before"], line["workers"]) for line in events if line.get("event") == "workers"][-1:] == [(1, 3)]
