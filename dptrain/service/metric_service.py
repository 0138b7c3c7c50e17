"""MetricService: figures of a job over its steps."""

import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import grpc

from dptrain.errors import UsageError
from dptrain.journal import attempt_of
from dptrain.service import books
from dptrain.service.books import Point, Shared, cursor_of
from dptrain.service.desk import Desk
from dptrain.service.model import ENDED
from dptrain.v1 import metric_service_pb2, metric_service_pb2_grpc

DEFAULT_POINTS, MOST_POINTS, MOST_NAMES = 500, 10_000, 100


class MetricService(metric_service_pb2_grpc.MetricServiceServicer):
    """See metric_service.proto."""

    def __init__(self, desk: Desk) -> None:
        self.desk = desk
        self._shared: Shared[Sequence[metric_service_pb2.StreamMetricsResponse]] = Shared()

    def QueryMetrics(
        self, request: metric_service_pb2.QueryMetricsRequest, context: grpc.ServicerContext
    ) -> metric_service_pb2.QueryMetricsResponse:
        """Curves, as coarse as asked."""
        job = self.desk.find(request.job_id, context)
        if request.max_points < 0:
            raise UsageError("max_points", expected="0 or more", found=str(request.max_points), cure="leave it out")
        most = min(request.max_points or DEFAULT_POINTS, MOST_POINTS)
        chosen = books.wanted(_names(request.names))
        steps: dict[int, dict[str, Any]] = {}
        events: list[metric_service_pb2.RunEvent] = []
        offset = 0
        while True:
            lines, after = books.read(self.desk.journal(job.id), offset)
            for _, line in lines:
                if "event" in line:
                    events.append(_event(line))
                elif isinstance(line.get("step"), int):
                    step = line["step"]
                    if step not in steps or attempt_of(line) >= attempt_of(steps[step]):
                        steps[step] = line
            if after == offset:
                break
            offset = after
        last = request.to_step or max(steps, default=0)
        within = [steps[step] for step in sorted(steps) if request.from_step <= step <= last]
        series = [_series(name, books.coarse(points, most)) for name, points in sorted(_curves(within, chosen).items())]
        return metric_service_pb2.QueryMetricsResponse(series=series, events=events, cursor=str(offset))

    def StreamMetrics(
        self, request: metric_service_pb2.StreamMetricsRequest, context: grpc.ServicerContext
    ) -> Iterator[metric_service_pb2.StreamMetricsResponse]:
        """Points as they come."""
        job = self.desk.find(request.job_id, context)
        names = tuple(_names(request.names))
        path = self.desk.journal(job.id)
        read = partial(self._shared.read, make=partial(_read, chosen=books.wanted(names)), key=names)
        offset = cursor_of(request.cursor)
        with self.desk.watched.file(path) as key:
            for now in self.desk.turns(job, context, key):
                # As for logs: what comes meanwhile waits for the next turn.
                for messages, after in books.grown(path, offset, books.size(path), read):
                    yield from messages
                    offset = after
                if now.state in ENDED:
                    yield metric_service_pb2.StreamMetricsResponse(cursor=str(offset), last=True)
                    return


def _read(
    path: Path, offset: int, chosen: Callable[[str], bool]
) -> tuple[Sequence[metric_service_pb2.StreamMetricsResponse], int]:
    """The chosen curves of some lines after an offset as a message, and where the next begin."""
    lines, after = books.read(path, offset)
    if after == offset:
        return (), offset
    curves = _curves([line for _, line in lines if "event" not in line], chosen)
    message = metric_service_pb2.StreamMetricsResponse(
        cursor=str(after),
        series=[_series(name, points) for name, points in sorted(curves.items())],
        events=[_event(line) for _, line in lines if "event" in line],
    )
    return (message,), after


def _names(names: Any) -> list[str]:
    found = list(names)
    if len(found) > MOST_NAMES:
        raise UsageError("names", expected=f"at most {MOST_NAMES}", found=str(len(found)), cure='use prefixes, "x.*"')
    return found


def _curves(lines: list[dict[str, Any]], chosen: Callable[[str], bool]) -> dict[str, list[Point]]:
    found: defaultdict[str, list[Point]] = defaultdict(list)
    for line in lines:
        step = line.get("step")
        if isinstance(step, int):
            for name, value in books.values(line):
                if chosen(name):
                    found[name].append(Point(step, float(line.get("seconds") or 0.0), value, value, value))
    return found


def _series(name: str, points: list[Point]) -> metric_service_pb2.MetricSeries:
    message = metric_service_pb2.MetricSeries(name=name)
    for step, seconds, value, minimum, maximum in points:
        message.points.add(step=step, seconds=seconds, value=value, minimum=minimum, maximum=maximum)
    return message


def _event(line: dict[str, Any]) -> metric_service_pb2.RunEvent:
    step = line.get("step")
    detail = {key: value for key, value in line.items() if key not in ("event", "attempt")}
    return metric_service_pb2.RunEvent(
        kind=str(line["event"]),
        step=step if isinstance(step, int) else 0,
        detail_json=json.dumps(detail),
        attempt=attempt_of(line),
    )
