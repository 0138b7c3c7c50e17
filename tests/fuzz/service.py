"""The job service, with a job that has ended and one that runs."""

import json
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from google.protobuf.duration_pb2 import Duration
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.message import Message

from dptrain.service.known import path_of
from dptrain.service.server import ROLES
from dptrain.v1 import artifact_service_pb2, job_pb2, job_service_pb2, log_service_pb2, metric_service_pb2
from dptrain.wire.address import parse
from dptrain.wire.security import Calling
from tests.fuzz.target import Live, methods_of
from tests.service.conftest import end_all
from tests.service.jobs import JOB, LONG
from tests.service.kills import Killed


def _examples(job: str) -> dict[str, list[Message]]:
    spec = job_pb2.JobSpec(job_toml=JOB, workers="1..2", name="x", labels={"a": "b"}, priority=-100, max_retries=2)
    jobs, artifacts = "/dptrain.v1.JobService", "/dptrain.v1.ArtifactService"
    listing = job_service_pb2.ListJobsRequest(
        page_size=2, filter="state=RUNNING label.a=b", order_by="created desc", with_progress=True
    )
    update = job_service_pb2.UpdateJobRequest(
        job_id=job, spec=spec, update_mask=FieldMask(paths=["priority", "labels", "name"])
    )
    header = artifact_service_pb2.UploadHeader(name="a.csv", size=3, sha256="0" * 64, overwrite=True)
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
                client.submit(folder / "long.toml")
            address = parse(server.address)
            token = path_of(address, server.environ).read_text().strip()
            yield Live(address, Calling(token), methods_of(list(ROLES), _examples(done.id)))
            server.wait_until_up()
        finally:
            server.kill(signal.SIGTERM)
            end_all(server.data / "jobs")
        lines = [json.loads(line) for line in (folder / "serve.log").read_text().splitlines() if line[:1] == "{"]
        bugs = [line for line in lines if line["level"] == "error"]
        assert not bugs, bugs[:3]
