"""The page of a real server with a real job."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from dptrain.service.client import Client
from dptrain.service.model import State
from dptrain.service.page.jobs import Jobs, _possible
from dptrain.service.page.reading import Local
from dptrain.service.server import TOKEN, TOKENS, JobServer
from dptrain.service.verbs import cancel, pause, resume, retry
from dptrain.wire.address import parse
from dptrain.wire.tokens import Role, TokenFile
from tests.service.jobs import LONG

Start = Callable[..., JobServer]
NOBODYS = "zzzzzzzzzzzz"


@pytest.fixture
def server(serve: Start) -> JobServer:
    return serve(page=parse("127.0.0.1:0"))


def come_in(server: JobServer, token: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.page, timeout=30, trust_env=False) as web:
        told = web.post("/api/session", json={"token": token}).json()
        web.headers["x-dptrain-csrf"] = told["csrf"]
        assert told["server"]["slots"] == 2
        yield web


@pytest.fixture
def web(server: JobServer, tmp_path: Path) -> Iterator[httpx.Client]:
    yield from come_in(server, (tmp_path / "data" / TOKEN).read_text().strip())


def news(web: httpx.Client, job: str, enough: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """What the stream has told of a job by the time that there is enough of it."""
    import json

    told: dict[str, Any] = {"log": [], "rows": [], "view": {"state": "", "step": 0}}
    name = ""
    with web.stream("GET", "/api/stream", params={"watch": job, "log": job}) as answer:
        ends = time.monotonic() + 150
        for line in answer.iter_lines():
            key, _, value = line.partition(": ")
            if key == "event":
                name = value
            elif key == "data":
                content = json.loads(value)
                if name == "jobs":
                    told["view"] = next((view for view in content["changed"] if view["id"] == job), told["view"])
                elif name == "curves":
                    told["rows"] += content["rows"]
                elif name == "log":
                    told["log"] += content["lines"]
            if enough(told):
                return told
            assert time.monotonic() < ends, told
    raise AssertionError(told)


def test_a_job_is_seen_and_steered(
    client: Client, server: JobServer, web: httpx.Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "job.toml").write_text(LONG)
    job = client.submit(tmp_path / "job.toml", workers=2).id
    told = news(web, job, lambda told: len(told["rows"]) > 1 and bool(told["log"]) and told["view"]["step"] > 0)
    view = told["view"]
    assert (view["state"], view["total_steps"], view["workers"], view["launches"]) == ("RUNNING", 100_000, 2, 1)
    assert view["verbs"] == ["pause", "cancel"]
    assert view["losses"]
    assert web.get(f"/api/jobs/{job}/config").json()["text"] == client.job(job).spec.job_toml
    assert web.post(f"/api/jobs/{job}/resume").status_code == 409
    assert web.post(f"/api/jobs/{job}/pause").json()["job"]["state"] in ("PAUSING", "PAUSED")
    assert news(web, job, lambda told: told["view"]["state"] == "PAUSED")["view"]["verbs"] == ["resume", "cancel"]
    files = [file["path"] for file in web.get(f"/api/jobs/{job}/files").json()["files"]]
    assert any(path.startswith("checkpoints/step-") for path in files)
    journal = web.get(f"/api/jobs/{job}/files/journal.jsonl")
    assert journal.content.startswith(b'{"step":')
    assert web.get(f"/api/jobs/{job}/files/..%2f..%2f..%2ftokens.json").status_code in (400, 404)
    assert web.post(f"/api/jobs/{job}/cancel").json()["job"]["state"] == "CANCELLED"
    assert client.job(job).state == State.CANCELLED
    # A list of many long journals shows first what the store knows.
    reading = Jobs(server.desk)
    monkeypatch.setattr("dptrain.service.page.jobs.FIRST_READ", -1.0)
    assert [(view.state, view.losses) for view in reading.jobs(Local())] == [("CANCELLED", ())]
    monkeypatch.undo()
    (view,) = reading.jobs(Local())
    assert view.losses
    assert view.step


def test_another_owners_job_is_not_there(
    client: Client, server: JobServer, as_owner: Callable[..., Client], tmp_path: Path
) -> None:
    (tmp_path / "job.toml").write_text(LONG)
    job = as_owner("ann").submit(tmp_path / "job.toml", workers=2).id
    token = TokenFile(tmp_path / "data" / TOKENS).create("bob", Role.submit)
    for web in come_in(server, token):
        for path in ("curves", "config", "files", "files/job.toml"):
            missing = web.get(f"/api/jobs/{job}/{path}")
            assert missing.status_code == 404
            assert missing.json()["error"] == web.get(f"/api/jobs/{NOBODYS}/{path}").json()["error"].replace(
                NOBODYS, job
            )
        assert web.post(f"/api/jobs/{job}/cancel").status_code == 404
        with web.stream("GET", "/api/stream", params={"watch": job}) as answer:
            assert '"order": []' in next(line for line in answer.iter_lines() if line.startswith("data: "))
    client.cancel(job)


def test_the_page_offers_what_a_state_allows() -> None:
    from dptrain.errors import RefusedTransition
    from dptrain.service.model import Job, Spec

    ways = {
        "pause": lambda job: pause(job, 1.0),
        "resume": lambda job: resume(job, 1.0),
        "cancel": lambda job: cancel(job, 1.0, 1.0),
        "retry": lambda job: retry(job, 1.0),
    }
    for state in State:
        job = Job(id="a", owner="b", spec=Spec(job_toml="", run_toml="", name="c"), state=state)
        for verb in _possible(state):
            assert ways[verb](job)
        for verb in {"resume", "retry"} - set(_possible(state)):
            with pytest.raises(RefusedTransition):
                ways[verb](job)
