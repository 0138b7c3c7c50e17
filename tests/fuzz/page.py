"""``python -m tests.fuzz.page``: seeded requests to all routes of the page of a server at work.

Exits with 1 if one was answered with 500 or more, told what it should not, or left something behind.
"""

import argparse
import contextlib
import http.client
import json
import logging
import os
import random
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote, urlsplit

import httpx
from starlette.applications import Starlette
from starlette.routing import Route

from dptrain.service.client import Client
from dptrain.service.page.reading import VERBS
from dptrain.service.page.runs import Runs
from dptrain.service.page.sessions import COOKIE, CSRF, Sessions
from dptrain.service.page.stream import Closing
from dptrain.service.page.web import make_app
from dptrain.service.server import TOKEN, TOKENS, JobServer, Options
from dptrain.service.store import READERS
from dptrain.wire.address import parse
from dptrain.wire.tokens import Role, TokenFile
from tests.service.conftest import end_all
from tests.service.jobs import JOB, LONG

ATTACKERS = 4
SECONDS = 20.0
"""Any answer must have begun by then."""
STREAM_SECONDS = 0.05
MOST_READ = 1 << 16
SECRET = "what-only-its-owner-sees"
MOST_FILES = 3 * READERS + 8

ODD = (
    *("", ".", "..", "../..", "%2e%2e", "..%2f..%2ftokens.json", "%00", "%", "%zz", "%ff%fe", "\\", "~", "*", "?", "#"),
    *("ü", "\U0001f600", "a b", "'", '"', "<script>", "{}", "%0d%0aset-cookie:%20x=y", "@latest", "x" * 3000),
    *("result.json", "journal.jsonl", "checkpoints", "job.toml", ".hidden", "/etc/passwd", "//", "static", "api"),
)
MARKS = (
    *('{"curves": {"JOB": -1}}', '{"curves": {"JOB": 9999999999999}}', '{"curves": {"JOB": 1e400}}', "[" * 3000),
    *(
        '{"curves": 5, "log": []}',
        '{"log": "' + "9" * 5000 + '"}',
        '{"log": "-1"}',
        '{"curves": {"JOB": true}}',
        "null",
    ),
    *("\\u0000", "NaN", '{"curves": {"JOB": ' + "9" * 5000 + "}}", '{"log": "\ud83d"}'),
)
RANGES = ("bytes=0-3", "bytes=-1", "bytes=5-", "bytes=9-2", "bytes=999999-", "bytes=a-b", "bytes=" + "0-1," * 500)
BODIES = (
    *(
        b"",
        b"[]",
        b"null",
        b'{"token": 5}',
        b'{"token": ""}',
        b'{"token": "\\ud800"}',
        b"\xff",
        b"{" * 4000,
        b"[" * 4000,
    ),
    *(b'{"token": "x"}', b'{"token": ' + b"9" * 4000 + b"}", b"x" * 5000),
)
METHODS = ("GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE", "BREW")


class Who(NamedTuple):
    """Somebody at the page: a role, or "" for nobody, and what stands for them."""

    role: str
    cookie: str
    csrf: str


class Request(NamedTuple):
    """What is sent, and by whom; ``whole`` unless its bytes were mutated, so that it may be no request at all."""

    path: str
    method: str
    who: Who
    data: bytes
    whole: bool


@dataclass
class Tally:
    """``reached``: those whose answer is a handler's own."""

    requests: int = 0
    reached: int = 0
    answers: Counter[tuple[str, str]] = field(default_factory=Counter)
    bad: list[str] = field(default_factory=list)

    def add(self, other: "Tally") -> None:
        self.requests += other.requests
        self.reached += other.reached
        self.answers += other.answers
        self.bad += other.bad

    def table(self) -> str:
        lines = [f"{count:8} {path} {status}" for (path, status), count in sorted(self.answers.items())]
        share = self.reached / max(1, self.requests)
        lines.append(f"{self.requests} requests, {self.reached} reached a handler ({share:.0%})")
        return "\n".join([*lines, *self.bad])


@dataclass(frozen=True)
class Live:
    """A page, who is at it, and its jobs: one that has ended, one that runs, one that waits, and another owner's."""

    host: str
    port: int
    people: Sequence[Who]
    jobs: Sequence[str]


def routes() -> list[tuple[str, frozenset[str]]]:
    """All routes that the page has, with their methods."""
    app = make_app(Runs(Path()), Sessions(None), (), Closing()).app  # type: ignore[attr-defined]
    assert isinstance(app, Starlette)
    return [(route.path, frozenset(route.methods or ())) for route in app.routes if isinstance(route, Route)]


def attack(live: Live, seed: int, count: int) -> Tally:
    """Make so many requests one after the other; the same seed makes the same ones."""
    rng, tally, known = random.Random(seed), Tally(), routes()
    for number in range(count):
        request = made(rng, live, *rng.choice(known))
        status, said, headers = answered(live, request)
        tally.requests += 1
        tally.answers[request.path, status] += 1
        tally.reached += request.whole and status not in ("closed", "late", "403", "405")
        wrong = judged(request, status, said, headers)
        if wrong:
            tally.bad.append(f"seed {seed} request {number}: {wrong}: {request.data[:300]!r}: {status} {said[:300]!r}")
    return tally


def made(rng: random.Random, live: Live, path: str, methods: frozenset[str]) -> Request:
    """A request to a route, mostly as it should be, with something odd in it."""

    def part(usual: Sequence[str]) -> str:
        given = rng.choice(usual) if rng.random() < 0.7 else rng.choice(ODD)
        # As it is, where it fits into a request's first line.
        return (
            given if rng.random() < 0.3 and given.isascii() and not set(given) & set(" ?#") else quote(given, safe="")
        )

    job = part(live.jobs)
    target = path.replace("{job}", job).replace("{verb}", part(VERBS))
    target = target.replace(
        "{path:path}", "/".join(part(("result.json", "checkpoints")) for _ in range(rng.choice((1, 1, 2))))
    )
    method = rng.choice(sorted(methods)) if rng.random() < 0.7 else rng.choice(METHODS)
    who = rng.choice(live.people)
    if path == "/api/stream" or rng.random() < 0.05:
        pairs = [
            (rng.choice(("watch", "watch", "log", "x")), rng.choice((*live.jobs, *ODD)))
            for _ in range(rng.choice((0, 1, 2, 30)))
        ]
        target += "?" + "&".join(f"{key}={quote(value, safe='')}" for key, value in pairs)
    host = f"{live.host}:{live.port}" if rng.random() < 0.95 else rng.choice(("evil.example", "[::1", "", "a" * 300))
    headers = [("host", host)]
    if who.cookie:
        headers.append(("cookie", f"{COOKIE}={who.cookie}"))
    if rng.random() < 0.6:
        headers.append((CSRF, who.csrf if rng.random() < 0.8 else "wrong"))
    for name, chance, values in (
        ("origin", 0.1, (f"http://{host}", "http://evil.example", "null", "http://[")),
        ("sec-fetch-site", 0.1, ("same-origin", "none", "cross-site", "")),
        ("last-event-id", 0.3, [mark.replace("JOB", rng.choice(live.jobs)) for mark in MARKS]),
        ("range", 0.2, RANGES),
        ("if-range", 0.05, ("x", '"x"')),
        ("accept-encoding", 0.1, ("gzip", "*", "\x01")),
        ("cookie", 0.05, (f"{COOKIE}=", f"{COOKIE}=x; {COOKIE}=y", "=" * 50, '"')),
    ):
        if rng.random() < chance:
            headers.append((name, rng.choice(values)))
    body = rng.choice(BODIES) if method in ("POST", "PUT", "PATCH") or rng.random() < 0.05 else b""
    if body or rng.random() < 0.1:
        headers.append(("content-type", rng.choice(("application/json", "text/plain", "application/json; charset=x"))))
        headers.append(("content-length", str(len(body))))
    lines = [f"{method} {target} HTTP/1.1", *(f"{name}: {value}" for name, value in headers), "connection: close"]
    data = "\r\n".join(lines).encode("utf-8", "surrogatepass") + b"\r\n\r\n" + body
    whole = rng.random() < 0.9
    return Request(path, method, who, data if whole else mutated(rng, data), whole)


def mutated(rng: random.Random, data: bytes) -> bytes:
    """Other bytes: perhaps no request any more, and perhaps two."""
    for _ in range(rng.choice((1, 1, 3))):
        at = rng.randrange(len(data))
        odd = rng.choice(
            (b"\r\n", b"\0", b"\xff", b" ", b":", b"%", b"HTTP/9.9", b"transfer-encoding: chunked\r\n", b"")
        )
        data = data[:at] + odd + data[at + rng.choice((0, 1, 1, 8)) :]
    return data


def answered(live: Live, request: Request) -> tuple[str, bytes, dict[str, str]]:
    """The status of the answer, some of what it says, and its headers."""
    with contextlib.closing(socket.create_connection((live.host, live.port), SECONDS)) as connection:
        answer = http.client.HTTPResponse(connection, method=request.method)
        try:
            connection.sendall(request.data)
            if not request.whole:
                connection.shutdown(socket.SHUT_WR)
            answer.begin()
            headers = {name.lower(): value for name, value in answer.getheaders()}
            if headers.get("content-type", "").startswith("text/event-stream"):
                connection.settimeout(STREAM_SECONDS)
            return str(answer.status), _read(answer), headers
        except TimeoutError:
            return "late", b"", {}
        except (http.client.HTTPException, ConnectionError):
            return "closed", b"", {}
        finally:
            answer.close()


def _read(answer: http.client.HTTPResponse) -> bytes:
    data = b""
    with contextlib.suppress(TimeoutError, http.client.IncompleteRead):
        while len(data) < MOST_READ and (more := answer.read1(MOST_READ)):
            data += more
    return data


def judged(request: Request, status: str, said: bytes, headers: dict[str, str]) -> str:
    """What is wrong with an answer; "" where nothing is."""
    if status.startswith("5"):
        return "it met a bug"
    if status == "late" or (status == "closed" and request.whole):
        return "no answer"
    if b"Traceback" in said or b'File "' in said:
        return "it tells of its inside"
    if not request.whole or status == "400":
        return ""
    if "content-security-policy" not in headers or headers.get("x-content-type-options") != "nosniff":
        return "the policy is missing"
    told = status in ("200", "206") and request.path.startswith("/api/")
    if told and not request.who.role and b"csrf" not in said:
        return "nobody was told something"
    if told and request.who.role != "admin" and SECRET.encode() in said:
        return "another owner's job was told of"
    if told and "{verb}" in request.path and request.who.role not in ("submit", "admin"):
        return "somebody changed something who may only look on"
    return ""


@contextlib.contextmanager
def page(folder: Path) -> Iterator[Live]:
    """The page of a server with jobs of two owners; afterwards it must have met no bug, and hold nothing open."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("DPTRAIN_")}
    environ["XDG_CONFIG_HOME"] = str(folder / "config")
    (folder / "job.toml").write_text(JOB)
    (folder / "long.toml").write_text(LONG)
    loopback = parse("127.0.0.1:0")
    options = Options(listen=loopback, data=folder / "data", slots=2, page=loopback)
    try:
        with no_bugs(), JobServer(options, environ) as server:
            tokens = TokenFile(folder / "data" / TOKENS)
            people = {
                "admin": (folder / "data" / TOKEN).read_text().strip(),
                "submit": tokens.create("ann", Role.submit),
                "read": tokens.create("ann/reads", Role.read),
            }
            with Client(str(server.address), environ=environ) as client:
                others = client.submit(folder / "job.toml", name=SECRET).id
            with Client(str(server.address), token=people["submit"], environ=environ) as client:
                done = client.wait(client.submit(folder / "job.toml").id).id
                jobs = [done, *(client.submit(folder / "long.toml", workers=2).id for _ in range(2))]
            live = live_at(server.page, people, [*jobs, others])
            before = _files()
            yield live
            until = time.monotonic() + 20
            while _files() > before + MOST_FILES and time.monotonic() < until:
                time.sleep(0.1)
            assert _files() <= before + MOST_FILES, "files or connections are left open"
            assert httpx.get(server.page, trust_env=False).status_code == 200
    finally:
        end_all(folder / "data" / "jobs")


def live_at(address: str, tokens: Mapping[str, str], jobs: Sequence[str]) -> Live:
    """The page at an address, with everyone at it who has a token (by role), and nobody, and an impostor."""
    at = urlsplit(address)
    assert at.hostname
    assert at.port
    entered = [_entered(address, role, token) for role, token in tokens.items()]
    live = Live(at.hostname, at.port, [*entered, *entered, Who("", "", "x"), Who("", "x" * 43, "x")], jobs)
    # Threads and connections that stay are there from now on.
    answered(live, made(random.Random(0), live, "/api/stream", frozenset({"GET"})))
    return live


@contextlib.contextmanager
def no_bugs() -> Iterator[None]:
    """Nothing may be logged as an error while this is entered."""
    bugs = _Bugs()
    logging.getLogger().addHandler(bugs)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(bugs)
    assert not bugs.lines, bugs.lines[:10]


def _entered(address: str, role: str, token: str) -> Who:
    answer = httpx.post(f"{address}/api/session", json={"token": token}, trust_env=False)
    return Who(role, answer.cookies[COOKIE], json.loads(answer.text)["csrf"])


def _files() -> int:
    return len(os.listdir("/proc/self/fd"))


class _Bugs(logging.Handler):
    """Remembers what was logged as an error."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        formatter = logging.Formatter()
        self.lines.append(formatter.format(record)[-600:])


def campaign(live: Live, runs: int, seed: int) -> Tally:
    """So many requests of several attackers."""
    tally = Tally()
    with ThreadPoolExecutor(ATTACKERS) as pool:
        for part in pool.map(lambda i: attack(live, seed * 1_000_003 + i, runs // ATTACKERS), range(ATTACKERS)):
            tally.add(part)
    return tally


def main(arguments: Sequence[str] | None = None) -> int:
    """Attack the page, and print what was asked and answered."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.page", description=__doc__)
    parser.add_argument("--runs", type=int, default=20_000, help="requests (default 20000)")
    parser.add_argument("--seed", type=int, help="which ones (default: drawn, and told)")
    asked = parser.parse_args(arguments)
    seed = random.SystemRandom().randrange(1 << 31) if asked.seed is None else asked.seed
    print(f"seed {seed}", flush=True)
    with tempfile.TemporaryDirectory(prefix="dptrain-fuzz-") as folder, page(Path(folder)) as live:
        tally = campaign(live, asked.runs, seed)
        print(tally.table(), flush=True)
    return int(bool(tally.bad))


if __name__ == "__main__":
    sys.exit(main())
