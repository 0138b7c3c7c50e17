"""How a worker finds a run: a channel to its server, and the job it is asked to take part in.

Nothing here imports numpy: only the job says with which kernels it is to be loaded.
"""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import grpc

from dptrain.exchange.parameter_server.service import SERVICE
from dptrain.v1 import parameter_server_pb2 as pb
from dptrain.wire.address import Address
from dptrain.wire.limits import Patience
from dptrain.wire.statuses import told
from dptrain.wire.version import agree


class Invitation(NamedTuple):
    """The job, as plain data, and the addresses of its servers."""

    job: Mapping[str, Any]
    servers: tuple[str, ...]


def ask(channel: grpc.Channel, address: Address, seconds: float) -> Invitation:
    """The server's invitation; it is waited for until it can be reached. Raises DptrainError."""
    agree(channel, address, Patience(connect_seconds=seconds))
    call = channel.unary_unary(f"/{SERVICE}/GetJob", pb.GetJobRequest.SerializeToString, pb.GetJobResponse.FromString)
    with told(address):
        answer = call(pb.GetJobRequest(), timeout=seconds)
    return Invitation(json.loads(answer.job), tuple(answer.servers))
