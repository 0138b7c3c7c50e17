"""The page's routes. Everything that is not the page itself is below /api, and asks who is there."""

import json
import os
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict
from importlib.resources import files
from typing import TypeVar
from urllib.parse import urlsplit

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dptrain.errors import DptrainError, NotFoundError, RefusedTransition, StorageError
from dptrain.service.page.curves import curves
from dptrain.service.page.reading import VERBS, Reading, Who
from dptrain.service.page.sessions import COOKIE, LASTS, Session, Sessions, genuine
from dptrain.service.page.stream import Closing, Wanted, stream

T = TypeVar("T")

POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}
KINDS = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
LARGEST_BODY = 4096

_STATUS: tuple[tuple[type[DptrainError], int], ...] = (
    (NotFoundError, 404),
    (RefusedTransition, 409),
    (StorageError, 503),
    (DptrainError, 400),
)


def make_app(reading: Reading, sessions: Sessions, hosts: Sequence[str], closing: Closing) -> ASGIApp:
    """The page as an ASGI application.

    ``hosts`` are the names under which it may be asked for, as in a certificate: another site's name that leads here
    (DNS rebinding) is refused. ``closing`` ends the streams.
    """
    page = _Page(reading, sessions, closing)
    routes = [
        *(Route(path, _asset(name)) for path, name in _assets()),
        Route("/api/session", page.session, methods=["GET"]),
        Route("/api/session", page.enter, methods=["POST"]),
        Route("/api/session", page.leave, methods=["DELETE"]),
        Route("/api/stream", page.stream),
        Route("/api/jobs/{job}/curves", page.curves),
        Route("/api/jobs/{job}/config", page.config),
        Route("/api/jobs/{job}/files", page.files),
        Route("/api/jobs/{job}/files/{path:path}", page.file),
        Route("/api/jobs/{job}/{verb}", page.act, methods=["POST"]),
    ]
    return _Guarded(Starlette(routes=routes), frozenset(host.lower() for host in hosts))


def _assets() -> list[tuple[str, str]]:
    names = [item.name for item in files("dptrain.service.page").joinpath("static").iterdir()]
    return [("/", "index.html"), *((f"/static/{name}", name) for name in names)]


def _asset(name: str) -> Callable[[Request], Awaitable[Response]]:
    """A file of the page, read once."""
    content = files("dptrain.service.page").joinpath("static", name).read_bytes()
    kind = next((kind for suffix, kind in KINDS.items() if name.endswith(suffix)), "text/plain")

    async def answer(request: Request) -> Response:
        return Response(content, media_type=kind, headers={"cache-control": "no-cache"})

    return answer


class _Guarded:
    """Refuses foreign hosts and other sites' requests, and adds the headers that every answer has."""

    def __init__(self, app: ASGIApp, hosts: frozenset[str]) -> None:
        self.app, self.hosts = app, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def headed(message: Message) -> None:
            if message["type"] == "http.response.start":
                given = {name for name, _ in message["headers"]}
                added = [(k.encode(), v.encode()) for k, v in HEADERS.items() if k.encode() not in given]
                message = {**message, "headers": [*message["headers"], *added]}
            await send(message)

        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        refusal = self._refusal(scope["method"], headers)
        if refusal:
            await PlainTextResponse(refusal, 403)(scope, receive, headed)
        else:
            await self.app(scope, receive, headed)

    def _refusal(self, method: str, headers: Mapping[str, str]) -> str:
        host = headers.get("host", "")
        name = _name_of(host)
        if name not in self.hosts and f"*.{name.partition('.')[2]}" not in self.hosts:
            return "this server is not called that"
        foreign = headers.get("sec-fetch-site", "none") not in ("same-origin", "none")
        followed = method == "GET" and headers.get("sec-fetch-mode") == "navigate"
        origin = headers.get("origin")
        if (foreign and not followed) or (origin is not None and _netloc(origin) != host):
            return "requests from other sites are refused"
        return ""


def _name_of(host: str) -> str:
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _netloc(origin: str) -> str:
    try:
        return urlsplit(origin).netloc
    except ValueError:
        return ""


class _Page:
    def __init__(self, reading: Reading, sessions: Sessions, closing: Closing) -> None:
        self.reading, self.sessions, self.closing = reading, sessions, closing

    async def session(self, request: Request) -> Response:
        """Who is there; where no token is asked for, everyone is, from now on."""
        session = self.sessions.find(request.cookies)
        if session is None and self.sessions.door is None:
            return await run_in_threadpool(self._entered, request, "")
        return await run_in_threadpool(self._told, session)

    async def enter(self, request: Request) -> Response:
        """Come in with a token."""
        try:
            content = json.loads(await _body(request))
        except (ValueError, RecursionError):
            content = None
        token = content.get("token") if isinstance(content, dict) else None
        if not isinstance(token, str) or not request.headers.get("content-type", "").startswith("application/json"):
            return _refused(400, "a JSON object with a token is expected")
        return await run_in_threadpool(self._entered, request, token)

    async def leave(self, request: Request) -> Response:
        """Go, and leave nothing behind."""
        if not genuine(self.sessions.find(request.cookies), request.headers):
            return _refused(403, "the request does not come from the page")
        self.sessions.leave(request.cookies)
        response = JSONResponse({})
        response.delete_cookie(COOKIE, path="/")
        return response

    async def stream(self, request: Request) -> Response:
        """Everything that changes, as server-sent events."""
        if self._who(request) is None:
            return _refused(401, "a token is needed")
        wanted = Wanted.of(request.query_params, request.headers.get("last-event-id", ""))
        events = stream(self.reading, lambda: self._who(request), wanted, self.closing)
        return StreamingResponse(events, media_type="text/event-stream", headers={"x-accel-buffering": "no"})

    async def curves(self, request: Request) -> Response:
        """A job's curves as they are now."""
        job = request.path_params["job"]
        return await self._answer(request, lambda who: curves(self.reading.journal(who, job), 0))

    async def config(self, request: Request) -> Response:
        """A job's file."""
        job = request.path_params["job"]
        return await self._answer(request, lambda who: {"text": self.reading.config(who, job)})

    async def files(self, request: Request) -> Response:
        """What can be downloaded."""
        job = request.path_params["job"]
        return await self._answer(request, lambda who: {"files": [asdict(f) for f in self.reading.files(who, job)]})

    async def file(self, request: Request) -> Response:
        """One of them; an interrupted download can go on (Range)."""
        job, path = request.path_params["job"], request.path_params["path"]
        who = self._who(request)
        if who is None:
            return _refused(401, "a token is needed")
        try:
            found = await run_in_threadpool(self.reading.file, who, job, path)
        except DptrainError as error:
            return _error(error)
        name = f"{job}-{path.replace('/', '-')}"
        return _Opened(found, name)

    async def act(self, request: Request) -> Response:
        """Ask something of a job."""
        job, verb = request.path_params["job"], request.path_params["verb"]
        session = self.sessions.find(request.cookies)
        who = self.sessions.who(session)
        if who is None:
            return _refused(401, "a token is needed")
        if not genuine(session, request.headers):
            return _refused(403, "the request does not come from the page: load it again")
        if who.role not in ("submit", "admin"):
            return _refused(403, "this token may only look on")
        if verb not in VERBS:
            return _refused(404, "there is no such thing to ask for")
        return await self._answer(request, lambda who: {"job": asdict(self.reading.act(who, job, verb))})

    def _who(self, request: Request) -> Who | None:
        return self.sessions.who(self.sessions.find(request.cookies))

    def _entered(self, request: Request, token: str) -> Response:
        found = self.sessions.enter(token)
        if found is None:
            return _refused(401, "nobody has this token, or there were too many wrong ones; try again in a minute")
        name, session = found
        response = self._told(session)
        secure = request.url.scheme == "https"
        response.set_cookie(COOKIE, name, int(LASTS), path="/", secure=secure, httponly=True, samesite="strict")
        return response

    def _told(self, session: Session | None) -> Response:
        who = self.sessions.who(session)
        if who is None or session is None:
            return _refused(401, "a token is needed")
        asked = self.sessions.door is not None
        told = {"name": who.name, "role": str(who.role), "csrf": session.csrf, "token": asked}
        return JSONResponse({**told, "server": dict(self.reading.server(who))})

    async def _answer(self, request: Request, ask: Callable[[Who], T]) -> Response:
        who = self._who(request)
        if who is None:
            return _refused(401, "a token is needed")
        try:
            return JSONResponse(await run_in_threadpool(ask, who))
        except DptrainError as error:
            return _error(error)


class _Opened(FileResponse):
    """A file by its descriptor, so that it is the one that was looked at; closed however it ends."""

    def __init__(self, handle: int, name: str) -> None:
        super().__init__(f"/proc/self/fd/{handle}", filename=name, media_type="application/octet-stream")
        self._handle = handle

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            os.close(self._handle)


async def _body(request: Request) -> bytes:
    data = b""
    try:
        async for part in request.stream():
            data += part
            if len(data) > LARGEST_BODY:
                raise ValueError("too large")
    except ClientDisconnect:
        raise ValueError("cut off") from None
    return data


def _error(error: DptrainError) -> Response:
    return _refused(next(status for kind, status in _STATUS if isinstance(error, kind)), str(error))


def _refused(status: int, sentence: str) -> Response:
    return JSONResponse({"error": sentence}, status)
