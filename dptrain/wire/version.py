"""Which dptrain a server is, told and compared."""

from importlib.metadata import version

import grpc

from dptrain.errors import UnreachableError, UsageError
from dptrain.v1 import version_pb2, version_pb2_grpc
from dptrain.wire.address import Address
from dptrain.wire.limits import Patience
from dptrain.wire.statuses import told

WIRE = 1
"""The wire's version: raised whenever client and server of before and after could misunderstand each other."""


class Version(version_pb2_grpc.VersionServiceServicer):
    """What a server says of itself."""

    def GetVersion(
        self, request: version_pb2.GetVersionRequest, context: grpc.ServicerContext
    ) -> version_pb2.GetVersionResponse:
        """As the proto says."""
        return version_pb2.GetVersionResponse(version=version("dptrain"), wire=WIRE)


_WHY_SECONDS = 2.0
"""For an answer to why there is no connection: one attempt to connect at most."""


def agree(channel: grpc.Channel, address: Address, patience: Patience | None = None) -> str:
    """The server's version; it is waited for until it can be reached, as long as ``patience`` says.

    Raises UnreachableError, RefusedError, and UsageError where the two would not understand each other.
    """
    seconds = (patience or Patience()).connect_seconds
    stub = version_pb2_grpc.VersionServiceStub(channel)
    try:
        with told(address):
            found = stub.GetVersion(version_pb2.GetVersionRequest(), timeout=seconds, wait_for_ready=True)
    except UnreachableError:
        # Who waits for a connection is not told why there is none.
        with told(address):
            found = stub.GetVersion(version_pb2.GetVersionRequest(), timeout=min(seconds, _WHY_SECONDS))
    if found.wire != WIRE:
        raise UsageError(
            f"server {address}",
            expected=f"version {WIRE} of the wire (dptrain {version('dptrain')})",
            found=f"version {found.wire} (dptrain {found.version})",
            cure="use the same version of dptrain on both sides",
        )
    return found.version
