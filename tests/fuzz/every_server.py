"""What every server has, beside an echo: the interceptor, health, reflection and the version."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from google.protobuf.wrappers_pb2 import BytesValue
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from dptrain.wire.address import parse
from dptrain.wire.channel import connect
from dptrain.wire.security import Calling
from dptrain.wire.version import agree
from tests.fuzz.target import Live, methods_of
from tests.wire.echo import NAME

SERVICES = (NAME, "dptrain.v1.VersionService", "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection")
EXAMPLES = {
    **{f"/{NAME}/{method}": [BytesValue(value=b"abc")] for method in ("Once", "Many", "Gather", "Both")},
    "/grpc.health.v1.Health/Check": [health_pb2.HealthCheckRequest(service="x"), health_pb2.HealthCheckRequest()],
    "/grpc.health.v1.Health/Watch": [health_pb2.HealthCheckRequest(service="x"), health_pb2.HealthCheckRequest()],
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": [
        reflection_pb2.ServerReflectionRequest(list_services=""),
        reflection_pb2.ServerReflectionRequest(file_containing_symbol=NAME),
        reflection_pb2.ServerReflectionRequest(file_by_filename="dptrain/v1/version.proto"),
    ],
}


@contextmanager
def round(seed: int) -> Iterator[Live]:
    """The server in a process of its own."""
    line = [sys.executable, "-m", "tests.wire.serve"]
    with subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        address = parse(process.stdout.readline().decode().strip())
        try:
            yield Live(address, Calling(), methods_of(SERVICES, EXAMPLES))
            with connect(address) as channel:
                agree(channel, address)
        finally:
            process.stdin.close()
        assert process.wait(60) == 0
