"""What has ended is removed with its files when its time is over, or when there is too much of it."""

import select
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

from dptrain.service.client import Client
from dptrain.service.model import State
from dptrain.service.server import JobServer
from tests.service.jobs import JOB, LONG


def test_what_has_ended_is_kept_as_long_and_as_much_as_was_said(
    serve: Callable[..., JobServer], environ: dict[str, str], tmp_path: Path
) -> None:
    server: JobServer

    @contextmanager
    def started(seconds: float = 0.0, most: int = 0) -> Iterator[Client]:
        nonlocal server
        server = serve(keep=(seconds, most))
        with Client(str(server.address), environ=environ) as client:
            yield client
        server.__exit__()

    def left(client: Client, *ids: str) -> None:
        """Until only these jobs are there, and how much each of them takes is known."""
        for _ in range(400):
            weights = {job: size for job, _, size in server.desk.store.ended()}
            there = [job.id for job in client.jobs()]
            kept = {path.name for path in folders.iterdir()}
            if there == list(ids) and kept == weights.keys() == set(ids) and min(weights.values(), default=9e9) > 1000:
                return
            select.select([], [], [], 0.05)
        raise AssertionError((there, weights))

    folders, job = tmp_path / "data" / "jobs", tmp_path / "job.toml"
    with started() as client:
        job.write_text(JOB)
        first = client.submit(job).id
        assert client.wait(first).state == State.SUCCEEDED
        job.write_text(LONG)
        second = client.submit(job).id
        client.pause(second)
        while client.job(second).state != State.PAUSED:
            select.select([], [], [], 0.05)
        # It ends with its checkpoints, and nobody has looked how much they take.
        client.cancel(second, grace=timedelta())
        never = client.submit(job, workers=2).id
        client.cancel(never, grace=timedelta())
        client.wait(never)
        client.delete(never)
    with started(most=1 << 40, seconds=1e9) as client:
        left(client, second, first)
    with started(most=1) as client:
        left(client, second)
    with started(seconds=1e-3) as client:
        left(client)
