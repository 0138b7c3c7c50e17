"""Every route: without a token, with a wrong one, with one that may only look on, and from another site."""

import contextlib
import json
import shutil
import ssl
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from dptrain.errors import LaunchError, UsageError
from dptrain.service.page.reading import VERBS
from dptrain.service.page.runs import Runs
from dptrain.service.page.server import PageServer
from dptrain.service.page.sessions import COOKIE, Sessions
from dptrain.service.page.stream import Closing
from dptrain.service.page.web import make_app
from dptrain.wire import certificates
from dptrain.wire.security import ServerTls
from tests.fuzz.page import campaign, live_at, no_bugs
from tests.service.page.conftest import TOKENS, Served, Someone, Steered, Tokens

READS = [
    "/api/session",
    "/api/stream",
    "/api/jobs/one/curves",
    "/api/jobs/one/config",
    "/api/jobs/one/files",
    "/api/jobs/one/files/job.toml",
]
ACTS = [f"/api/jobs/one/{verb}" for verb in VERBS]
TRIED = {"GET": READS, "POST": ["/api/session", *ACTS], "DELETE": ["/api/session"]}


@contextlib.contextmanager
def browser(server: PageServer, token: str | None = None) -> Iterator[httpx.Client]:
    """A client that has come in with a token, and knows the session's proof."""
    with httpx.Client(base_url=server.address, timeout=20, trust_env=False) as client:
        if token is not None:
            told = client.post("/api/session", json={"token": token})
            if told.status_code == 200:
                client.headers["x-dptrain-csrf"] = told.json()["csrf"]
        else:
            client.headers["x-dptrain-csrf"] = client.get("/api/session").json().get("csrf", "")
        yield client


@pytest.fixture
def guarded(runs: Path, served: Served) -> PageServer:
    return served(Steered(runs), door=Tokens())


@pytest.mark.parametrize("token", [None, "wrong", ""])
def test_nothing_is_told_without_a_token(guarded: PageServer, token: str | None) -> None:
    with browser(guarded, token) as client:
        for path in READS:
            assert client.get(path).status_code == 401, path
        for path in ACTS:
            assert client.post(path).status_code == 401, path
        assert client.delete("/api/session").status_code == 403


def test_no_route_is_left_out_here(runs: Path) -> None:
    app = make_app(Runs(runs), Sessions(None), (), Closing())
    routes = [route for route in app.app.routes if not route.path.startswith("/static/") and route.path != "/"]  # type: ignore[attr-defined]
    assert len(routes) > len(TRIED)
    for route in routes:
        for method in route.methods - {"HEAD"}:
            assert any(route.path_regex.match(path) for path in TRIED[method]), (method, route.path)


def test_a_reader_sees_and_changes_nothing(guarded: PageServer) -> None:
    with browser(guarded, "t-read") as client:
        for path in READS:
            with client.stream("GET", path) as answer:
                assert answer.status_code == 200, path
        for path in ACTS:
            answer = client.post(path)
            assert answer.status_code == 403
            assert "only look on" in answer.json()["error"]


def test_who_may_asks_and_is_told_why_not(runs: Path, served: Served) -> None:
    reading = Steered(runs)
    with browser(served(reading, door=Tokens()), "t-submit") as client:
        answer = client.post("/api/jobs/one/pause")
        assert answer.json()["job"]["state"] == "PAUSED"
        assert reading.asked == [("submit", "one", "pause")]
        assert client.post("/api/jobs/one/pause").status_code == 409
        assert client.post("/api/jobs/none/pause").status_code == 404
        assert client.post("/api/jobs/one/explode").status_code == 404


@pytest.mark.parametrize(
    "headers",
    [
        {"x-dptrain-csrf": ""},
        {"x-dptrain-csrf": "another"},
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"sec-fetch-site": "cross-site"},
        {"host": "evil.example"},
        {"host": "[::1"},
    ],
)
@pytest.mark.parametrize("token", ["t-admin", None])
def test_another_site_can_ask_for_nothing(
    runs: Path, served: Served, headers: dict[str, str], token: str | None
) -> None:
    reading = Steered(runs)
    with browser(served(reading, door=Tokens() if token else None), token) as client:
        assert client.post("/api/jobs/one/cancel", headers=headers).status_code == 403
        assert client.delete("/api/session", headers=headers).status_code == 403
        if "x-dptrain-csrf" not in headers:
            assert client.get("/api/jobs/one/config", headers=headers).status_code == 403
        assert reading.asked == []
        assert client.post("/api/jobs/one/cancel").status_code == 200


def test_a_token_comes_in_by_post_alone_and_leaves_no_trace(guarded: PageServer) -> None:
    with browser(guarded) as client:
        assert client.get("/api/session", params={"token": "t-admin"}).status_code == 401
        told = client.post("/api/session", json={"token": "t-admin"})
        assert "t-admin" not in told.text + str(told.headers)
        cookie = told.headers["set-cookie"]
        assert cookie.startswith(f"{COOKIE}=")
        assert "HttpOnly" in cookie
        assert "SameSite=strict" in cookie
        for body in (b"", b"[]", b'{"token": 5}', b"{" * 5000, b"\xff"):
            assert client.post("/api/session", content=body).status_code == 400
        assert client.post("/api/session", content=b'{"token": "t-admin"}').status_code == 400


def test_leaving_and_revoking_end_a_session(runs: Path, served: Served) -> None:
    door = Tokens()
    server = served(Runs(runs), door=door)
    with browser(server, "t-admin") as client, browser(server, "t-read") as other:
        assert client.delete("/api/session").status_code == 200
        assert client.get("/api/jobs/one/config").status_code == 401
        with other.stream("GET", "/api/stream") as answer:
            lines = answer.iter_lines()
            assert next(lines).startswith("id: ")
            door.known.clear()
            assert "event: out" in lines
        assert other.get("/api/jobs/one/config").status_code == 401


def test_guessing_is_stopped(runs: Path, served: Served) -> None:
    with browser(served(Runs(runs), door=Tokens())) as client:
        for _ in range(10):
            assert client.post("/api/session", json={"token": "guess"}).status_code == 401
        assert client.post("/api/session", json={"token": "t-admin"}).status_code == 401


def test_every_answer_has_the_policy(guarded: PageServer) -> None:
    with browser(guarded) as client:
        for path in ("/", "/static/app.js", "/none", *READS):
            headers = client.get(path).headers
            policy = headers["content-security-policy"]
            assert "default-src 'none'" in policy
            assert "unsafe" not in policy
            assert headers["x-content-type-options"] == "nosniff"
            assert headers["referrer-policy"] == "no-referrer"
        text = client.get("/").text
        assert "style=" not in text
        assert " onclick" not in text
        assert "<script>" not in text


def test_the_first_view_is_small_and_asks_nobody_else(runs: Path, served: Served) -> None:
    folder = Path(__file__).parents[3] / "dptrain/service/page/static"
    assert sum(path.stat().st_size for path in folder.iterdir()) < 200_000
    ours = [path for path in folder.iterdir() if not path.name.startswith("uplot")]
    assert not [path for path in ours if "https://" in path.read_text() or "//cdn" in path.read_text()]
    assert (folder / "uplot.LICENSE.txt").read_text().startswith("The MIT License")
    with browser(served(Runs(runs))) as client:
        for path in folder.iterdir():
            assert client.get(f"/static/{path.name}").content == path.read_bytes()


def test_a_long_list_does_not_wait_for_its_journals(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reading, who = Runs(runs), Someone("read", "read")
    monkeypatch.setattr("dptrain.service.page.runs.FIRST_READ", -1.0)
    told = reading.jobs(who)
    assert {(view.state, tuple(view.losses), view.step > 0) for view in told} == {("SUCCEEDED", (), True)}
    monkeypatch.undo()
    later = reading.jobs(who)
    assert [view.id for view in later] == [view.id for view in told]
    assert all(view.losses for view in later)


def test_files_are_those_of_the_run_and_no_others(runs: Path, served: Served, tmp_path: Path) -> None:
    shutil.copytree(runs, tmp_path / "runs")
    runs = tmp_path / "runs"
    (runs / "secret.txt").write_text("secret")
    (runs / "one" / "link").symlink_to(runs / "secret.txt")
    with browser(served(Runs(runs))) as client:
        files = {file["path"]: file["size"] for file in client.get("/api/jobs/one/files").json()["files"]}
        assert {"job.toml", "journal.jsonl", "result.json", "weights.safetensors"} <= set(files)
        assert any(path.startswith("checkpoints/step-") for path in files)
        for path, size in files.items():
            answer = client.get(f"/api/jobs/one/files/{path}")
            assert answer.content == (runs / "one" / path).read_bytes()
            assert len(answer.content) == size
            assert answer.headers["content-disposition"].startswith("attachment")
        part = client.get("/api/jobs/one/files/journal.jsonl", headers={"range": "bytes=10-19"})
        assert part.status_code == 206
        assert part.content == (runs / "one/journal.jsonl").read_bytes()[10:20]
        for path in ("../secret.txt", "..%2fsecret.txt", "link", "%2e%2e/secret.txt", "/etc/passwd", "none", "%00", ""):
            # What a client has made shorter itself may be another route, which takes no GET.
            assert client.get(f"/api/jobs/one/files/{path}").status_code in (404, 405), path
        assert client.get("/api/jobs/..%2fone/config").status_code == 404


def events(answer: httpx.Response) -> Iterator[tuple[str, str, Any]]:
    name = mark = ""
    for line in answer.iter_lines():
        key, _, value = line.partition(": ")
        if key == "id":
            mark = value
        elif key == "event":
            name = value
        elif key == "data":
            yield name, mark, json.loads(value)


def test_the_stream_tells_all_and_goes_on_where_it_was(runs: Path, served: Served, tmp_path: Path) -> None:
    shutil.copytree(runs, tmp_path / "runs")
    query = {"watch": ["one", "none"], "log": "one"}
    with browser(served(Runs(tmp_path / "runs"))) as client:
        told: dict[str, Any] = {}
        with client.stream("GET", "/api/stream", params=query) as answer:
            assert answer.headers["content-type"].startswith("text/event-stream")
            for name, last, content in events(answer):
                told[name], mark = content, last
                if {"jobs", "curves", "log", "gone"} <= set(told):
                    break
        assert sorted(told["jobs"]["order"]) == ["one", "two"]
        assert told["gone"] == {"job": "none"}
        assert told["curves"]["whole"] is True
        steps = len(told["curves"]["rows"])
        assert steps == 20
        assert len(told["log"]["lines"]) == steps
        with (tmp_path / "runs/one/journal.jsonl").open("a") as journal:
            journal.write('{"event":"warning","text":"late","attempt":1}\n')
        with client.stream("GET", "/api/stream", params=query, headers={"last-event-id": mark}) as answer:
            late = next(content for name, _, content in events(answer) if name == "curves")
        assert (late["whole"], late["rows"]) == (False, [])
        assert [event["text"] for event in late["events"]] == ["late"]


def test_no_request_breaks_it(runs: Path, served: Served) -> None:
    with no_bugs():
        server = served(Steered(runs), door=Tokens())
        tally = campaign(
            live_at(server.address, {role: token for token, role in TOKENS.items()}, ["one", "two"]), 200, 3
        )
        server.close()
    assert tally.bad == []


def test_open_addresses_need_tokens_and_tls(runs: Path) -> None:
    with pytest.raises(UsageError, match="no tokens"):
        PageServer(Runs(runs), "0.0.0.0")
    with pytest.raises(UsageError, match="no TLS"):
        PageServer(Runs(runs), "0.0.0.0", door=Tokens())


@pytest.fixture(scope="module")
def certs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("certs")
    certificates.init(folder, ["Trainer.lan", "*.cluster.lan"])
    return folder


def test_over_tls_it_has_its_certificates_names(runs: Path, served: Served, certs: Path) -> None:
    server = served(Steered(runs), door=Tokens(), tls=ServerTls(certs / "server.crt", certs / "server.key"))
    assert server.address.startswith("https://127.0.0.1:")
    trust = ssl.create_default_context(cafile=certs / "ca.crt")
    with httpx.Client(base_url=server.address, verify=trust, trust_env=False) as client:
        for token in (None, "wrong"):
            assert client.post("/api/session", json={"token": token}).status_code in (400, 401)
            assert {client.get(path).status_code for path in READS} == {401}
        for host, status in (
            ("trainer.lan", 200),
            ("n1.cluster.lan:8470", 200),
            ("localhost", 200),
            ("a.n1.cluster.lan", 403),
            ("cluster.lan", 403),
            ("evil.example", 403),
        ):
            assert client.get("/", headers={"host": host}).status_code == status, host
        told = client.post("/api/session", json={"token": "t-read"})
        assert "; Secure" in told.headers["set-cookie"]
        assert client.get("/api/jobs/one/config").status_code == 200
        proof = {"x-dptrain-csrf": told.json()["csrf"]}
        assert {client.post(path, headers=proof).status_code for path in ACTS} == {403}
    with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
        httpx.get(server.address, trust_env=False)


def test_who_asks_for_client_certificates_is_shown_one(runs: Path, served: Served, certs: Path) -> None:
    tls = ServerTls(certs / "server.crt", certs / "server.key", certs / "ca.crt")
    server = served(Runs(runs), door=Tokens(), tls=tls)
    trust = ssl.create_default_context(cafile=certs / "ca.crt")
    with httpx.Client(verify=trust, trust_env=False) as client, pytest.raises(httpx.TransportError):
        client.get(server.address)
    trust.load_cert_chain(certs / "client.crt", certs / "client.key")
    with httpx.Client(verify=trust, trust_env=False) as client:
        assert client.get(server.address).status_code == 200


def test_a_taken_port_is_told(runs: Path, served: Served) -> None:
    server = served(Runs(runs))
    with pytest.raises(LaunchError, match="choose another port"):
        PageServer(Runs(runs), port=server.port)


def test_closing_ends_open_streams(runs: Path, served: Served) -> None:
    server = served(Runs(runs))
    with browser(server) as client, client.stream("GET", "/api/stream") as answer:
        lines = answer.iter_lines()
        next(lines)
        began = time.monotonic()
        server.close()
        assert list(lines)
        assert time.monotonic() - began < 20
    with pytest.raises(httpx.ConnectError):
        httpx.get(server.address, trust_env=False)
