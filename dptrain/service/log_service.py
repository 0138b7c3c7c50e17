"""LogService: what a job printed."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import grpc

from dptrain.errors import UsageError
from dptrain.service import books, convert
from dptrain.service.books import Shared, cursor_of
from dptrain.service.desk import Desk
from dptrain.service.model import ENDED, Job, State
from dptrain.v1 import job_pb2, log_service_pb2, log_service_pb2_grpc

_STREAMS = {"out": log_service_pb2.LOG_STREAM_STDOUT, "err": log_service_pb2.LOG_STREAM_STDERR}
_MOST_LINES = 500
"""In one message."""


class LogService(log_service_pb2_grpc.LogServiceServicer):
    """See log_service.proto."""

    def __init__(self, desk: Desk) -> None:
        self.desk = desk
        self._shared: Shared[Sequence[log_service_pb2.TailLogsResponse]] = Shared()

    def TailLogs(
        self, request: log_service_pb2.TailLogsRequest, context: grpc.ServicerContext
    ) -> Iterator[log_service_pb2.TailLogsResponse]:
        """Lines, then how the job ended."""
        job = self.desk.find(request.job_id, context)
        if request.tail < 0:
            raise UsageError("tail", expected="0 or more", found=str(request.tail), cure="leave it out for all lines")
        path, accept = self.desk.log(job.id), _accept(request)
        offset = cursor_of(request.cursor)
        if request.tail:
            offset = max(offset, books.tail_of(path, request.tail, accept))
        some, made = request.HasField("rank") or request.HasField("since"), partial(_read, accept=accept)
        read = made if some else partial(self._shared.read, make=made)
        with self.desk.watched.file(path) as key:
            # A turn has first how the job stands, then its lines: what it printed before it ended is there by then.
            for now in self.desk.turns(job, context, key):
                # What is printed meanwhile waits for the next turn, so that each of hundreds is told of it at once.
                for messages, after in books.grown(path, offset, books.size(path), read):
                    yield from messages
                    offset = after
                if not request.follow or now.state in ENDED or now.state is State.PAUSED:
                    yield log_service_pb2.TailLogsResponse(end=self._end(now))
                    return

    def _end(self, job: Job) -> log_service_pb2.LogEnd:
        reason, message = self.desk.conductor.why(job)
        end = log_service_pb2.LogEnd(
            state=job_pb2.JobState.ValueType(job.state),
            reason=job_pb2.JobReason.ValueType(reason),
            message=message,
        )
        if job.exit_code is not None:
            end.exit_code = job.exit_code
        return end


_Accept = Callable[[dict[str, Any]], bool]


def _read(path: Path, offset: int, accept: _Accept) -> tuple[Sequence[log_service_pb2.TailLogsResponse], int]:
    """The accepted ones of some lines after an offset as messages, and where the next begin."""
    lines, after = books.read(path, offset)
    told = [_told(at, line) for at, line in lines if accept(line)]
    parts = range(0, len(told), _MOST_LINES)
    return [log_service_pb2.TailLogsResponse(lines=told[i : i + _MOST_LINES]) for i in parts], after


def _accept(request: log_service_pb2.TailLogsRequest) -> _Accept:
    rank = request.rank if request.HasField("rank") else None
    since = convert.seconds(request.since) if request.HasField("since") else 0.0
    return lambda line: (rank is None or line.get("r") == rank) and line.get("t", 0) >= since


def _told(at: int, line: dict[str, Any]) -> log_service_pb2.LogLine:
    return log_service_pb2.LogLine(
        cursor=str(at),
        time=convert.time(line.get("t", 0.0)),
        stream=_STREAMS.get(line.get("s", ""), log_service_pb2.LOG_STREAM_UNSPECIFIED),
        rank=line.get("r", 0),
        text=line.get("l", ""),
    )
