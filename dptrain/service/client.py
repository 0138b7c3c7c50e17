"""A client of the service: ``with Client() as client: job = client.submit("job.toml")``.

Verbs are those of the command line. Iterators of logs, events and metrics connect again by themselves when they are cut
off, and end only when the server has said that nothing follows. Every failure is a DptrainError.
"""

import hashlib
import os
import random
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, ParamSpec, Self, TypeVar

from google.protobuf import duration_pb2, timestamp_pb2

from dptrain.errors import ChangedError, StorageError, UnreachableError, UsageError
from dptrain.job.load import load_job, to_toml
from dptrain.job.spec import Job as JobSpec
from dptrain.service import known
from dptrain.v1 import (
    artifact_service_pb2,
    artifact_service_pb2_grpc,
    cluster_service_pb2,
    cluster_service_pb2_grpc,
    job_pb2,
    job_service_pb2,
    job_service_pb2_grpc,
    log_service_pb2,
    log_service_pb2_grpc,
    metric_service_pb2,
    metric_service_pb2_grpc,
)
from dptrain.wire import address as addresses
from dptrain.wire.backoff import delays
from dptrain.wire.channel import connect
from dptrain.wire.limits import Patience
from dptrain.wire.security import Calling, ClientTls
from dptrain.wire.statuses import told

DEFAULT_SERVER = "127.0.0.1:7077"
SERVER, TLS_CA = "DPTRAIN_SERVER", "DPTRAIN_TLS_CA"
MESSAGE_BYTES = 64 << 20
CHUNK = 1 << 20
RECONNECT_SECONDS = 60.0
"""For which a stream that was cut off is tried to be gone on with."""

T = TypeVar("T")
M = TypeVar("M")
P = ParamSpec("P")
ENDED = frozenset({job_pb2.JOB_STATE_SUCCEEDED, job_pb2.JOB_STATE_FAILED, job_pb2.JOB_STATE_CANCELLED})

_TWICE = (
    *(f"dptrain.v1.JobService/{name}" for name in ("GetJob", "ListJobs", "UpdateJob", "CancelJob", "PauseJob")),
    "dptrain.v1.MetricService/QueryMetrics",
    *(f"dptrain.v1.ArtifactService/{name}" for name in ("ListArtifacts", "ListCheckpoints", "ListDatasets")),
    "dptrain.v1.ClusterService",
)
"""What does no harm when it is called twice. CreateJob is called again by ``submit``, with its request_id."""

JobLike = JobSpec | str | os.PathLike[str]


def _message(kind: Callable[P, M], *content: P.args, **fields: P.kwargs) -> M:
    """A message, or a part of one. Raises UsageError for a value that none can carry, such as a number of 200 bits."""
    try:
        return kind(*content, **fields)
    except (ValueError, OverflowError) as error:
        found = str(error)
        raise UsageError("request", expected="values that fit into it", found=found, cure="correct it") from error


def _duration(span: timedelta) -> duration_pb2.Duration:
    made = duration_pb2.Duration()
    made.FromTimedelta(span)
    return made


def _timestamp(moment: datetime) -> timestamp_pb2.Timestamp:
    made = timestamp_pb2.Timestamp()
    made.FromDatetime(moment)
    return made


class Client:
    """A connection to a server: ``server`` (default: DPTRAIN_SERVER, else this machine's), with a token.

    The token is ``token``, or in ``token_file``, or DPTRAIN_TOKEN, or that of a server which this user has started on
    this machine. ``tls`` names the CA of a server elsewhere. Raises RefusedError where it would not be safe.
    """

    def __init__(
        self,
        server: str | None = None,
        *,
        token: str | None = None,
        token_file: Path | None = None,
        tls: ClientTls | None = None,
        patience: Patience | None = None,
        environ: Mapping[str, str] | None = None,
    ) -> None:
        environ = os.environ if environ is None else environ
        self.address = addresses.parse(server or environ.get(SERVER) or DEFAULT_SERVER)
        if tls is None and environ.get(TLS_CA):
            tls = ClientTls(Path(environ[TLS_CA]))
        self._patience = patience or Patience()
        shown = token or known.token(self.address, token_file, environ)
        self._channel = connect(
            self.address, Calling(shown, tls), patience=self._patience, message_bytes=MESSAGE_BYTES, twice=_TWICE
        )
        self._jobs = job_service_pb2_grpc.JobServiceStub(self._channel)
        self._logs = log_service_pb2_grpc.LogServiceStub(self._channel)
        self._metrics = metric_service_pb2_grpc.MetricServiceStub(self._channel)
        self._artifacts = artifact_service_pb2_grpc.ArtifactServiceStub(self._channel)
        self._cluster = cluster_service_pb2_grpc.ClusterServiceStub(self._channel)
        self._random = random.Random()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """End the connection."""
        self._channel.close()

    def submit(
        self,
        job: JobLike,
        *,
        workers: int | str = 1,
        name: str = "",
        sets: Sequence[str] = (),
        labels: Mapping[str, str] | None = None,
        priority: int = 0,
        max_retries: int | None = None,
        max_duration: timedelta | None = None,
        environment: Mapping[str, str] | None = None,
        request_id: str | None = None,
        dry_run: bool = False,
    ) -> job_pb2.Job:
        """Submit a job file, or a job; when this returns the server has it on its disk.

        It is safe against answers that get lost: the same ``request_id`` (default: a new one) is one job.
        """
        text, model = _texts(job, sets)
        spec = _message(
            job_pb2.JobSpec,
            job_toml=text,
            model_source=model,
            workers=str(workers),
            name=name,
            labels=labels or {},
            priority=priority,
            max_retries=max_retries,
            max_duration=None if max_duration is None else _message(_duration, max_duration),
            environment=environment or {},
        )
        request = _message(
            job_service_pb2.CreateJobRequest,
            spec=spec,
            request_id=str(uuid.uuid4()) if request_id is None else request_id,
            validate_only=dry_run,
        )
        return self._again(lambda: self._jobs.CreateJob(request)).job

    def job(self, job: str) -> job_pb2.Job:
        """A job with its progress and result: by ID, unique prefix, or "@latest"."""
        request = _message(job_service_pb2.JobServiceGetJobRequest, job_id=job)
        with told(self.address):
            return self._jobs.GetJob(request).job

    def jobs(
        self, filter: str = "", *, order_by: str = "", page_size: int = 0, progress: bool = False
    ) -> Iterator[job_pb2.Job]:
        """All jobs that a filter lets through, newest first, read page by page."""
        token = ""
        while True:
            request = _message(
                job_service_pb2.ListJobsRequest,
                filter=filter,
                order_by=order_by,
                page_size=page_size,
                page_token=token,
                with_progress=progress,
            )
            with told(self.address):
                page = self._jobs.ListJobs(request)
            yield from page.jobs
            token = page.next_page_token
            if not token:
                return

    def update(
        self,
        job: str,
        *,
        priority: int | None = None,
        labels: Mapping[str, str] | None = None,
        name: str | None = None,
    ) -> job_pb2.Job:
        """Change what may be changed of a job; None leaves it."""
        given = {"priority": priority, "labels": labels, "name": name}
        changes = {key: value for key, value in given.items() if value is not None}
        spec = _message(job_pb2.JobSpec, **changes)  # type: ignore[arg-type]
        request = _message(job_service_pb2.UpdateJobRequest, job_id=job, spec=spec)
        request.update_mask.paths.extend(changes)
        with told(self.address):
            return self._jobs.UpdateJob(request).job

    def cancel(self, job: str, *, grace: timedelta | None = None) -> job_pb2.Job:
        """End a job; within the grace it writes a checkpoint."""
        until = None if grace is None else _message(_duration, grace)
        request = _message(job_service_pb2.CancelJobRequest, job_id=job, grace=until)
        with told(self.address):
            return self._jobs.CancelJob(request).job

    def pause(self, job: str) -> job_pb2.Job:
        """Stop a job with a checkpoint."""
        request = _message(job_service_pb2.PauseJobRequest, job_id=job)
        with told(self.address):
            return self._jobs.PauseJob(request).job

    def resume(self, job: str) -> job_pb2.Job:
        """Queue a paused job again."""
        request = _message(job_service_pb2.ResumeJobRequest, job_id=job)
        with told(self.address):
            return self._jobs.ResumeJob(request).job

    def retry(self, job: str, *, from_step: int | None = None) -> job_pb2.Job:
        """Queue a failed or cancelled job again, from its newest checkpoint or that of a step."""
        request = _message(job_service_pb2.RetryJobRequest, job_id=job, from_step=from_step)
        with told(self.address):
            return self._jobs.RetryJob(request).job

    def delete(self, job: str) -> None:
        """Remove a job that has ended, with all of its files."""
        request = _message(job_service_pb2.DeleteJobRequest, job_id=job)
        with told(self.address):
            self._jobs.DeleteJob(request)

    def watch(self, job: str, *, progress: bool = False) -> Iterator[job_service_pb2.WatchJobResponse]:
        """What happens to a job, until it has ended."""
        request = job_service_pb2.WatchJobRequest(job_id=self._id(job), with_progress=progress)

        def advance(message: job_service_pb2.WatchJobResponse) -> bool:
            request.cursor = message.cursor
            return message.last

        yield from self._stream(lambda: self._jobs.WatchJob(request), advance)

    def wait(self, job: str) -> job_pb2.Job:
        """Return a job when it has ended."""
        for _ in self.watch(job):
            pass
        return self.job(job)

    def logs(
        self, job: str, *, follow: bool = False, rank: int | None = None, since: datetime | None = None, tail: int = 0
    ) -> Iterator[log_service_pb2.LogLine | log_service_pb2.LogEnd]:
        """A job's lines; with ``follow`` until it has ended. The last item says how it stands."""
        request = _message(
            log_service_pb2.TailLogsRequest,
            job_id=self._id(job),
            follow=follow,
            rank=rank,
            since=None if since is None else _message(_timestamp, since),
            tail=tail,
        )

        def advance(message: log_service_pb2.TailLogsResponse) -> bool:
            if message.lines:
                request.cursor, request.tail = message.lines[-1].cursor, 0
            return message.HasField("end")

        for message in self._stream(lambda: self._logs.TailLogs(request), advance):
            yield from message.lines
            if message.HasField("end"):
                yield message.end

    def metrics(
        self, job: str, names: Sequence[str] = (), *, from_step: int = 0, to_step: int = 0, max_points: int = 0
    ) -> metric_service_pb2.QueryMetricsResponse:
        """A job's curves."""
        request = _message(
            metric_service_pb2.QueryMetricsRequest,
            job_id=job,
            names=names,
            from_step=from_step,
            to_step=to_step,
            max_points=max_points,
        )
        with told(self.address):
            return self._metrics.QueryMetrics(request)

    def stream_metrics(self, job: str, names: Sequence[str] = ()) -> Iterator[metric_service_pb2.StreamMetricsResponse]:
        """A job's points as they come, until it has ended."""
        request = _message(metric_service_pb2.StreamMetricsRequest, job_id=self._id(job), names=names)

        def advance(message: metric_service_pb2.StreamMetricsResponse) -> bool:
            request.cursor = message.cursor
            return message.last

        yield from self._stream(lambda: self._metrics.StreamMetrics(request), advance)

    def artifacts(self, job: str) -> list[artifact_service_pb2.Artifact]:
        """The files of a job's run."""
        request = _message(artifact_service_pb2.ListArtifactsRequest, job_id=job)
        with told(self.address):
            return list(self._artifacts.ListArtifacts(request).artifacts)

    def checkpoints(self, job: str) -> list[artifact_service_pb2.Checkpoint]:
        """A job's checkpoints, newest first."""
        request = _message(artifact_service_pb2.ListCheckpointsRequest, job_id=job)
        with told(self.address):
            return list(self._artifacts.ListCheckpoints(request).checkpoints)

    def download(self, job: str, path: str, to: Path) -> Path:
        """Bring one file of a job's run to ``to``, whole and checked, or not at all; goes on where it was cut off."""
        part = to.with_name(f".{to.name}.part")
        request = _message(artifact_service_pb2.DownloadArtifactRequest, job_id=job, path=path)

        def advance(message: artifact_service_pb2.DownloadArtifactResponse) -> bool:
            return False

        try:
            to.parent.mkdir(parents=True, exist_ok=True)
            with part.open("wb") as file:
                size, digest = -1, hashlib.sha256()

                def call() -> Any:
                    request.offset, request.expected_sha256 = file.tell(), sha256
                    return self._artifacts.DownloadArtifact(request)

                sha256 = ""
                while size < 0 or file.tell() < size:
                    for message in self._stream(call, advance, once=True):
                        if message.HasField("header"):
                            size, sha256 = message.header.size, message.header.sha256
                        file.write(message.data)
                        digest.update(message.data)
            if digest.hexdigest() != sha256:
                raise ChangedError(
                    path, expected=f"sha256 {sha256}", found=digest.hexdigest(), cure="download it again"
                )
            part.replace(to)
        except OSError as error:
            raise _unwritable(to, error) from None
        finally:
            part.unlink(missing_ok=True)
        return to

    def download_run(self, job: str, to: Path, *, checkpoints: bool = False) -> Path:
        """Bring a job's run directory to ``to``: what ``dptrain eval`` and ``predict`` want, or all of it."""
        found = self._id(job)
        for artifact in self.artifacts(found):
            if checkpoints or not artifact.path.startswith("checkpoints/"):
                self.download(found, artifact.path, to.joinpath(*artifact.path.split("/")))
        return to

    def upload(self, path: Path, name: str = "", *, overwrite: bool = False) -> artifact_service_pb2.Dataset:
        """Bring a file to the server, for jobs to name in data.source."""
        try:
            with path.open("rb") as file:
                size, sha256 = os.fstat(file.fileno()).st_size, hashlib.file_digest(file, "sha256").hexdigest()
                header = _message(
                    artifact_service_pb2.UploadHeader,
                    name=name or path.name,
                    size=size,
                    sha256=sha256,
                    overwrite=overwrite,
                )

                def parts() -> Iterator[artifact_service_pb2.UploadDatasetRequest]:
                    yield artifact_service_pb2.UploadDatasetRequest(header=header)
                    file.seek(0)
                    while data := file.read(CHUNK):
                        yield artifact_service_pb2.UploadDatasetRequest(data=data)

                with told(self.address):
                    return self._artifacts.UploadDataset(parts()).dataset
        except OSError as error:
            raise StorageError(
                str(path),
                expected="a readable file",
                found=error.strerror or str(error),
                cure="check the path",
            ) from None

    def datasets(self) -> artifact_service_pb2.ListDatasetsResponse:
        """This owner's uploads, and how much room they have."""
        with told(self.address):
            return self._artifacts.ListDatasets(artifact_service_pb2.ListDatasetsRequest())

    def delete_dataset(self, name: str) -> None:
        """Remove an upload."""
        request = _message(artifact_service_pb2.DeleteDatasetRequest, name=name)
        with told(self.address):
            self._artifacts.DeleteDataset(request)

    def info(self) -> cluster_service_pb2.GetServerInfoResponse:
        """Who the server is, and whom it sees in this client."""
        with told(self.address):
            return self._cluster.GetServerInfo(cluster_service_pb2.GetServerInfoRequest())

    def nodes(self) -> list[cluster_service_pb2.Node]:
        """The machines that jobs run on."""
        with told(self.address):
            return list(self._cluster.ListNodes(cluster_service_pb2.ListNodesRequest()).nodes)

    def drain(self, node: str) -> cluster_service_pb2.Node:
        """Have a node take no new work."""
        request = _message(cluster_service_pb2.DrainNodeRequest, name=node)
        with told(self.address):
            return self._cluster.DrainNode(request).node

    def resume_node(self, node: str) -> cluster_service_pb2.Node:
        """Have a node take work again that was drained."""
        request = _message(cluster_service_pb2.ResumeNodeRequest, name=node)
        with told(self.address):
            return self._cluster.ResumeNode(request).node

    def _id(self, job: str) -> str:
        """The whole ID, so that "@latest" stays one job."""
        return self.job(job).id

    def _again(self, call: Callable[[], T]) -> T:
        """A call that does no harm when it is made twice, tried until it is answered or patience ends."""
        until = time.monotonic() + self._patience.connect_seconds
        for delay in delays(self._random):
            try:
                with told(self.address):
                    return call()
            except UnreachableError:
                if time.monotonic() + delay > until:
                    raise
            threading.Event().wait(delay)
        raise AssertionError("delays have no end")

    def _stream(self, call: Callable[[], Any], advance: Callable[[Any], bool], once: bool = False) -> Iterator[Any]:
        """The messages of a stream that is begun again where it is cut off; ``advance`` moves its request on.

        It ends when ``advance`` says so, or with the stream where it goes on ``once``.
        """
        waits, until = delays(self._random), time.monotonic() + RECONNECT_SECONDS
        while True:
            stream: Any = None
            try:
                with told(self.address):
                    stream = call()
                    for message in stream:
                        waits, until = delays(self._random), time.monotonic() + RECONNECT_SECONDS
                        last = advance(message)
                        yield message
                        if last:
                            return
                if once:
                    return
            except UnreachableError:
                if time.monotonic() > until:
                    raise
            finally:
                if stream is not None:
                    stream.cancel()
            threading.Event().wait(next(waits))


def _texts(job: JobLike, sets: Sequence[str]) -> tuple[str, str]:
    """A job file's text as it is to be sent, and the source of its model where that is in Python. Raises JobError."""
    checked = job if isinstance(job, JobSpec) else load_job(Path(job), sets)
    source = ""
    if checked.model.python:
        from dptrain.rundir import read_text

        source = read_text(Path(checked.directory) / checked.model.python.rpartition(":")[0])
    return to_toml(checked), source


def _unwritable(path: Path, error: OSError) -> StorageError:
    return StorageError(
        str(path), expected="to be written", found=error.strerror or str(error), cure="choose another place"
    )
