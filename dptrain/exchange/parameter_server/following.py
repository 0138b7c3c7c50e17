"""How a standby and its chief find each other."""

import contextlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import grpc

from dptrain.errors import DeadlineError
from dptrain.exchange.parameter_server.pair import Link
from dptrain.exchange.parameter_server.service import SERVICE
from dptrain.v1 import parameter_server_pb2 as pb
from dptrain.wire.address import Address
from dptrain.wire.channel import connect
from dptrain.wire.limits import Patience
from dptrain.wire.security import Calling
from dptrain.wire.version import agree


def followed(link: Link, seconds: float) -> Link:
    """A chief's link, once its standby is there. Raises DeadlineError."""
    if not link.connected.wait(seconds):
        raise DeadlineError(
            "the parameter server",
            expected=f"its standby within {seconds:g} s",
            found="none",
            cure="start it with `dptrain param-server JOB --standby-of ADDRESS`, or leave --standby out",
        )
    return link


@contextmanager
def follow(address: Address, calling: Calling | None, seconds: float = 120.0) -> Iterator[Link]:
    """A standby's link to the chief there. Raises DptrainError."""
    link = Link(pb.FollowRequest)
    with contextlib.closing(connect(address, calling)) as channel:
        agree(channel, address, Patience(connect_seconds=seconds))
        call = channel.stream_stream(
            f"/{SERVICE}/Follow", pb.FollowRequest.SerializeToString, pb.FollowResponse.FromString
        )(iter(link))

        def hear() -> None:
            with contextlib.suppress(grpc.RpcError):
                link.listen(call)
            link.end()

        thread = threading.Thread(target=hear, name="dptrain-chief", daemon=True)
        thread.start()
        try:
            yield link
        finally:
            link.leave(0)
            thread.join(seconds)
            call.cancel()
