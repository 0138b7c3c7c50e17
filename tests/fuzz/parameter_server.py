"""A parameter server in the middle of a run, with its workers: whatever it is sent, the run ends with solo's hash."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import grpc
import numpy as np
from google.protobuf.message import Message

from dptrain.exchange.parameter_server.codec import encode
from dptrain.exchange.parameter_server.service import SERVICE
from dptrain.v1 import parameter_server_pb2 as pb
from dptrain.wire.address import Address, parse
from dptrain.wire.channel import connect
from dptrain.wire.limits import Patience
from dptrain.wire.security import Calling
from dptrain.wire.version import agree
from tests.fuzz.target import Live, methods_of

WORKERS = 2
STEPS = 1500
JOB = f"""
seed = 5
data.source = "digits"
model.layers = [{{ type = "linear", units = 32 }}, {{ type = "relu" }}, {{ type = "linear", units = 10 }}]
optimizer = {{ type = "adam", lr = 0.01 }}
train = {{ steps = {STEPS}, batch_size = 64, shards = 4 }}
"""


@dataclass(frozen=True)
class Run(Live):
    """A server with its run's directory."""

    server: "subprocess.Popen[bytes]"

    def over(self) -> bool:
        return self.server.poll() is not None


@cache
def truth() -> str:
    """The hash of the job in one process."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "job.toml").write_text(JOB)
        subprocess.run(
            [*_dptrain("run", "job.toml", "--run-dir", "solo"), "--progress", "none"], cwd=folder, check=True
        )
        return _hash(folder / "solo")


@contextmanager
def round(seed: int) -> Iterator[Live]:
    """A run from its beginning; its end is waited for, and its hash compared."""
    expected = truth()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "job.toml").write_text(JOB)
        address = parse(f"unix:{folder}/s")
        line = _dptrain("param-server", "job.toml", "--listen", str(address), "--run-dir", "run", "--progress", "none")
        server = subprocess.Popen(line, cwd=folder, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        workers = [subprocess.Popen(_dptrain("worker", "--server", str(address)), cwd=folder) for _ in range(WORKERS)]
        try:
            yield Run(address, Calling(), methods_of([SERVICE], _examples(address)), server)
            assert server.wait(600) == 0
            assert [worker.wait(60) for worker in workers] == [0] * WORKERS
            assert _hash(folder / "run") == expected
        finally:
            for process in (server, *workers):
                if process.poll() is None:
                    process.kill()
                    process.wait()


def _dptrain(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "dptrain", *arguments]


def _hash(folder: Path) -> str:
    return str(json.loads((folder / "result.json").read_text())["weights_sha256"])


def _examples(address: Address) -> dict[str, Sequence[Message]]:
    """Messages as workers send them. Only chunks carry a membership that counts: its owner computes nothing."""
    nobody = pb.Membership(job=1, epoch=1, worker=1)
    with connect(address) as channel:
        agree(channel, address, Patience(connect_seconds=60.0))
        call = channel.unary_unary(
            f"/{SERVICE}/GetJob", pb.GetJobRequest.SerializeToString, pb.GetJobResponse.FromString
        )
        job = call(pb.GetJobRequest()).job_number
        join = pb.JoinRequest(
            job_sha256="x", data_digest="y", fingerprint="z", arithmetic="a", host="here", processes=1
        )
        with suppress(grpc.RpcError):
            channel.unary_unary(f"/{SERVICE}/Join", pb.JoinRequest.SerializeToString, None)(join)
    somebody = pb.Membership(job=job, epoch=1, worker=1)
    vector = np.arange(64, dtype=np.float32)
    chunks = []
    for membership in (nobody, somebody):
        for vector_ in (vector, np.full(64, np.nan, np.float32)):
            place = pb.Place(membership=membership, step=3, lease=2, lo=0, hi=2, total=64, encoding=pb.ENCODING_RAW)
            chunks.append(pb.PushRequest.FromString(encode(place, vector_)))
    said = [
        pb.WorkRequest(membership=somebody),
        pb.WorkRequest(membership=somebody, answer=pb.Answer(lease=2, tallies=bytes(24))),
        pb.WorkRequest(membership=somebody, blocks=pb.Blocks(lease=2, sums=bytes(24))),
        pb.WorkRequest(membership=somebody, sign=pb.Sign(beat=4)),
        pb.WorkRequest(membership=somebody, failure=pb.Failure(kind="JobError", where="a", expected="b", found="c")),
    ]
    return {
        f"/{SERVICE}/Join": [join],
        f"/{SERVICE}/Leave": [pb.LeaveRequest(membership=nobody), pb.LeaveRequest(membership=somebody)],
        f"/{SERVICE}/Work": said,
        f"/{SERVICE}/Push": chunks,
        f"/{SERVICE}/Pull": [pb.PullRequest(membership=nobody), pb.PullRequest(membership=somebody)],
    }
