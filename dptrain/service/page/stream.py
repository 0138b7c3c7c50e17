"""One stream of server-sent events for all that a page shows: a browser grants few connections to a site.

https://html.spec.whatwg.org/multipage/server-sent-events.html. The id of each event holds all cursors, so a browser
that connects again goes on where it was.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.datastructures import QueryParams

from dptrain.errors import DptrainError
from dptrain.service.page.curves import curves
from dptrain.service.page.reading import JobView, Reading, Who

EVERY = 0.4
"""Seconds between looks at what has changed."""

QUIET = 15.0
"""Seconds after which a comment is sent, so that nothing on the way takes the connection for dead."""

MOST_WATCHED = 12
MOST_LINES = 500


class Closing:
    """Tells all streams that the server ends."""

    def __init__(self) -> None:
        self.now = False


@dataclass
class Wanted:
    """What a page shows: the curves of some jobs, each from an offset on, and one's log."""

    curves: dict[str, int] = field(default_factory=dict)
    log: str = ""
    cursor: str = ""

    @classmethod
    def of(cls, query: QueryParams, last: str) -> "Wanted":
        """From a request; what the browser says of its last event counts more. Anything odd is left out."""
        wanted = cls(dict.fromkeys(query.getlist("watch")[:MOST_WATCHED], 0), query.get("log", ""))
        try:
            known = json.loads(last) if last else {}
        except (ValueError, RecursionError):
            known = {}
        if isinstance(known, dict):
            at = known.get("curves")
            for job, offset in at.items() if isinstance(at, dict) else ():
                if job in wanted.curves and isinstance(offset, int) and 0 <= offset < 1 << 62:
                    wanted.curves[job] = offset
            cursor = known.get("log")
            wanted.cursor = cursor if isinstance(cursor, str) else ""
        return wanted

    def mark(self) -> str:
        """What makes :meth:`of` go on from here."""
        return json.dumps({"curves": self.curves, "log": self.cursor}, separators=(",", ":"))


@dataclass
class _Seen:
    views: dict[str, JobView] = field(default_factory=dict)
    order: list[str] = field(default_factory=list)


async def stream(
    reading: Reading, who: Callable[[], Who | None], wanted: Wanted, closing: Closing
) -> AsyncIterator[str]:
    """Events "jobs", "curves" and "log", for as long as the caller may see them.

    "jobs": ids in their ``order`` and the views that have ``changed``; "curves": see ``curves``, with ``job``;
    "log": ``lines``, with ``job``; "gone": a watched job that is not there; "out": nobody may look any more.
    """
    seen = _Seen()
    quiet = 0.0
    while not closing.now:
        someone = who()
        if someone is None:
            yield _event("out", {}, wanted)
            return
        try:
            events = await run_in_threadpool(_news, reading, someone, wanted, seen)
        except DptrainError as error:
            events = [("trouble", {"error": str(error)})]
        for name, content in events:
            yield _event(name, content, wanted)
        quiet = 0.0 if events else quiet + EVERY
        if quiet >= QUIET:
            quiet = 0.0
            yield ": \n\n"
        await asyncio.sleep(EVERY)


def _news(reading: Reading, who: Who, wanted: Wanted, seen: _Seen) -> list[tuple[str, Mapping[str, Any]]]:
    events: list[tuple[str, Mapping[str, Any]]] = []
    views = {view.id: view for view in reading.jobs(who)}
    order = list(views)
    for job in wanted.curves:
        if job not in views:
            try:
                views[job] = reading.job(who, job)
            except DptrainError:
                events.append(("gone", {"job": job}))
    wanted.curves = {job: offset for job, offset in wanted.curves.items() if job in views}
    changed = [asdict(view) for job, view in views.items() if seen.views.get(job) != view]
    if changed or order != seen.order or not seen.views:
        events.insert(0, ("jobs", {"order": order, "changed": changed, "server": dict(reading.server(who))}))
    seen.views, seen.order = views, order
    for job, offset in wanted.curves.items():
        found = curves(reading.journal(who, job), offset)
        if found["cursor"] != offset:
            wanted.curves[job] = found["cursor"]
            events.append(("curves", {"job": job, "whole": not offset, **found}))
    if wanted.log in views:
        lines = reading.log(who, wanted.log, wanted.cursor, MOST_LINES)
        wanted.cursor = lines.cursor
        if lines.lines:
            told = [[line.time, line.stream, line.rank, line.text] for line in lines.lines]
            events.append(("log", {"job": wanted.log, "lines": told}))
    return events


def _event(name: str, content: Mapping[str, Any], wanted: Wanted) -> str:
    return f"id: {wanted.mark()}\nevent: {name}\ndata: {json.dumps(content)}\n\n"
