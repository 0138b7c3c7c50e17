"""The job service, with a job that has ended and one that runs."""

import hashlib
import json
import signal
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
from google.protobuf.duration_pb2 import Duration
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.message import Message

from dptrain.service.known import path_of
from dptrain.service.server import ROLES
from dptrain.service.store import READERS
from dptrain.v1 import artifact_service_pb2, job_pb2, job_service_pb2, log_service_pb2, metric_service_pb2
from dptrain.wire.address import parse
from dptrain.wire.security import Calling
from tests.fuzz.target import Live, methods_of
from tests.service.conftest import end_all
from tests.service.jobs import JOB, LONG
from tests.service.kills import Killed

MOST_FILES = 3 * READERS + 8
"""Of the store's readers, and of the job that runs."""
MOST_MIB = 200


def _examples(jobs: Sequence[str]) -> dict[str, list[Message]]:
    """Calls about several jobs: each method has those of all."""
    found: dict[str, list[Message]] = {}
    for job in jobs:
        for path, messages in _examples_of(job).items():
            found.setdefault(path, []).extend(messages)
    return found


def _examples_of(job: str) -> dict[str, list[Message]]:
    spec = job_pb2.JobSpec(job_toml=JOB, workers="1..2", name="x", labels={"a": "b"}, priority=-100, max_retries=2)
    jobs, artifacts = "/dptrain.v1.JobService", "/dptrain.v1.ArtifactService"
    listing = job_service_pb2.ListJobsRequest(
        page_size=2, filter="state=RUNNING label.a=b", order_by="created desc", with_progress=True
    )
    update = job_service_pb2.UpdateJobRequest(
        job_id=job, spec=spec, update_mask=FieldMask(paths=["priority", "labels", "name"])
    )
    header = artifact_service_pb2.UploadHeader(name="a.csv", size=3, sha256=hashlib.sha256(b"abc").hexdigest())
    return {
        f"{jobs}/CreateJob": [job_service_pb2.CreateJobRequest(spec=spec, request_id="r", validate_only=True)],
        f"{jobs}/GetJob": [job_service_pb2.JobServiceGetJobRequest(job_id=job)],
        f"{jobs}/ListJobs": [listing, job_service_pb2.ListJobsRequest()],
        f"{jobs}/UpdateJob": [update],
        f"{jobs}/CancelJob": [job_service_pb2.CancelJobRequest(job_id=job, grace=Duration(seconds=1))],
        f"{jobs}/PauseJob": [job_service_pb2.PauseJobRequest(job_id=job)],
        f"{jobs}/ResumeJob": [job_service_pb2.ResumeJobRequest(job_id=job)],
        f"{jobs}/RetryJob": [job_service_pb2.RetryJobRequest(job_id=job, from_step=30)],
        f"{jobs}/DeleteJob": [job_service_pb2.DeleteJobRequest(job_id="zz")],
        f"{jobs}/WatchJob": [job_service_pb2.WatchJobRequest(job_id=job, cursor="1", with_progress=True)],
        "/dptrain.v1.LogService/TailLogs": [log_service_pb2.TailLogsRequest(job_id=job, rank=0, cursor="10", tail=3)],
        "/dptrain.v1.MetricService/QueryMetrics": [
            metric_service_pb2.QueryMetricsRequest(job_id=job, names=["loss", "compute.*"], to_step=30, max_points=4)
        ],
        "/dptrain.v1.MetricService/StreamMetrics": [
            metric_service_pb2.StreamMetricsRequest(job_id=job, names=["loss"], cursor="0")
        ],
        f"{artifacts}/ListArtifacts": [artifact_service_pb2.ListArtifactsRequest(job_id=job)],
        f"{artifacts}/ListCheckpoints": [artifact_service_pb2.ListCheckpointsRequest(job_id=job)],
        f"{artifacts}/DownloadArtifact": [
            artifact_service_pb2.DownloadArtifactRequest(job_id=job, path="result.json", offset=3)
        ],
        f"{artifacts}/UploadDataset": [
            artifact_service_pb2.UploadDatasetRequest(header=header),
            artifact_service_pb2.UploadDatasetRequest(data=b"abc"),
        ],
        f"{artifacts}/DeleteDataset": [artifact_service_pb2.DeleteDatasetRequest(name="a.csv")],
    }


@dataclass(frozen=True)
class _Live(Live):
    """Until the job is deleted that the calls are about: most would only hear that it is not there."""

    job: Path

    def over(self) -> bool:
        return not self.job.exists()


def _nothing_is_left(process: psutil.Process, files: int, memory: int) -> None:
    """Of what the calls opened: connections and files within seconds, and of memory what pools and caches may have."""
    until = time.monotonic() + 30
    while process.num_fds() > files + MOST_FILES and time.monotonic() < until:
        time.sleep(0.1)
    opened, grown = process.num_fds() - files, (process.memory_info().rss - memory) >> 20
    print(f"the server has {opened} more files open than before, and {grown} MiB more memory")
    assert opened <= MOST_FILES
    assert grown <= MOST_MIB


@contextmanager
def round(seed: int) -> Iterator[Live]:
    """A server in a process of its own; afterwards it must answer, and have met no bug."""
    with tempfile.TemporaryDirectory(prefix="dptrain-fuzz-") as name:
        folder = Path(name)
        server = Killed(folder)
        (folder / "job.toml").write_text(JOB)
        (folder / "long.toml").write_text(LONG)
        server.start()
        try:
            server.wait_until_up()
            with server.client() as client:
                done = client.wait(client.submit(folder / "job.toml").id)
                jobs = [done.id, *(client.submit(folder / "long.toml", workers=2).id for _ in range(2))]
            address = parse(server.address)
            token = path_of(address, server.environ).read_text().strip()
            assert server.process is not None
            process = psutil.Process(server.process.pid)
            files, memory = process.num_fds(), process.memory_info().rss
            yield _Live(
                address, Calling(token), methods_of(list(ROLES), _examples(jobs)), server.data / "jobs" / done.id
            )
            server.wait_until_up()
            _nothing_is_left(process, files, memory)
        finally:
            server.kill(signal.SIGTERM)
            end_all(server.data / "jobs")
        lines = [json.loads(line) for line in (folder / "serve.log").read_text().splitlines() if line[:1] == "{"]
        bugs = [line for line in lines if line["level"] == "error"]
        assert not bugs, bugs[:3]
