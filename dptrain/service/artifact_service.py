"""ArtifactService: files of runs, and data sets."""

import hashlib
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator

import grpc

from dptrain.errors import ChangedError, UploadError, UsageError
from dptrain.service import below, convert, runner
from dptrain.service.below import Found
from dptrain.service.datasets import Datasets, Header
from dptrain.service.desk import Desk, owner_of
from dptrain.v1 import artifact_service_pb2 as pb
from dptrain.v1 import artifact_service_pb2_grpc

CHUNK = 1 << 20
_READ = 1 << 22
_MOST_DIGESTS = 10_000


class ArtifactService(artifact_service_pb2_grpc.ArtifactServiceServicer):
    """See artifact_service.proto."""

    def __init__(self, desk: Desk, datasets: Datasets) -> None:
        self.desk, self.datasets = desk, datasets
        self._digests = _Digests()

    def ListArtifacts(
        self, request: pb.ListArtifactsRequest, context: grpc.ServicerContext
    ) -> pb.ListArtifactsResponse:
        """The files of a run."""
        job = self.desk.find(request.job_id, context)
        found = below.walk(self.desk.runner.run_dir(job.id))
        # What is being written has a name that begins so.
        whole = [file for file in found if not any(part.startswith(".") for part in file.path.split("/"))]
        return pb.ListArtifactsResponse(
            artifacts=[
                pb.Artifact(path=file.path, size=file.size, modified_at=convert.time(file.modified)) for file in whole
            ]
        )

    def ListCheckpoints(
        self, request: pb.ListCheckpointsRequest, context: grpc.ServicerContext
    ) -> pb.ListCheckpointsResponse:
        """The checkpoints of a run."""
        job = self.desk.find(request.job_id, context)
        run_dir = self.desk.runner.run_dir(job.id)
        found = []
        for step, folder in reversed(runner.checkpoints(run_dir)):
            files = below.walk(folder)
            if files:
                made = convert.time(max(file.modified for file in files))
                size, path = sum(file.size for file in files), str(folder.relative_to(run_dir))
                found.append(pb.Checkpoint(step=step, path=path, size=size, created_at=made))
        return pb.ListCheckpointsResponse(checkpoints=found)

    def DownloadArtifact(
        self, request: pb.DownloadArtifactRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.DownloadArtifactResponse]:
        """A file from an offset on."""
        job = self.desk.find(request.job_id, context)
        where = f"artifact of job {job.id}"
        with below.opened(self.desk.runner.run_dir(job.id), request.path, where) as handle:
            size = os.fstat(handle).st_size
            if not 0 <= request.offset <= size:
                raise UsageError(
                    "offset", expected=f"0 to {size}, the file's size", found=str(request.offset), cure="begin at 0"
                )
            sha256 = self._digests.of(handle)
            if request.expected_sha256 and request.expected_sha256 != sha256:
                raise ChangedError(
                    f"{where}: {request.path}",
                    expected=f"the file that was begun, sha256 {request.expected_sha256[:80]}",
                    found=f"another by now, {sha256}",
                    cure="download it from its beginning",
                )
            yield pb.DownloadArtifactResponse(header=pb.ArtifactHeader(size=size, sha256=sha256))
            at = request.offset
            # Not beyond the size that was hashed: journals grow.
            while at < size and (data := os.pread(handle, min(CHUNK, size - at), at)):
                at += len(data)
                yield pb.DownloadArtifactResponse(data=data)

    def UploadDataset(
        self, request_iterator: Iterator[pb.UploadDatasetRequest], context: grpc.ServicerContext
    ) -> pb.UploadDatasetResponse:
        """Take in a data set."""
        first = next(request_iterator, None)
        if first is None or first.WhichOneof("part") != "header":
            raise UploadError("upload", expected="a header first", found="none", cure="send it before any data")
        header = Header(first.header.name, first.header.size, first.header.sha256, first.header.overwrite)

        def data() -> Iterator[bytes]:
            for message in request_iterator:
                if message.WhichOneof("part") != "data":
                    raise UploadError("upload", expected="data", found="another header", cure="send one file a call")
                yield message.data

        return pb.UploadDatasetResponse(dataset=_dataset(self.datasets.take(owner_of(context), header, data())))

    def ListDatasets(self, request: pb.ListDatasetsRequest, context: grpc.ServicerContext) -> pb.ListDatasetsResponse:
        """The caller's data sets."""
        found = self.datasets.list(owner_of(context))
        return pb.ListDatasetsResponse(
            datasets=[_dataset(file) for file in found],
            used=sum(file.size for file in found),
            quota=self.datasets.quota,
        )

    def DeleteDataset(
        self, request: pb.DeleteDatasetRequest, context: grpc.ServicerContext
    ) -> pb.DeleteDatasetResponse:
        """Remove a data set."""
        self.datasets.remove(owner_of(context), request.name)
        return pb.DeleteDatasetResponse()


class _Digests:
    """SHA-256 of files, each computed once as long as it is not written."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: OrderedDict[tuple[int, ...], str] = OrderedDict()

    def of(self, handle: int) -> str:
        status = os.fstat(handle)
        key = (status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size)
        with self._lock:
            if key in self._known:
                return self._known[key]
        digest, at = hashlib.sha256(), 0
        while at < status.st_size and (data := os.pread(handle, min(_READ, status.st_size - at), at)):
            digest.update(data)
            at += len(data)
        with self._lock:
            self._known[key] = digest.hexdigest()
            while len(self._known) > _MOST_DIGESTS:
                self._known.popitem(last=False)
        return digest.hexdigest()


def _dataset(file: Found) -> pb.Dataset:
    return pb.Dataset(name=file.path, size=file.size, created_at=convert.time(file.modified))
