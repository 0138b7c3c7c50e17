"""The composition root of a worker that joins a parameter server."""

import random
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dptrain import arithmetic
from dptrain.errors import UnreachableError
from dptrain.job.spec import Job, rebuild

if TYPE_CHECKING:
    from dptrain.wire.address import Address
    from dptrain.wire.security import Calling

_FIRST, _MOST = 0.1, 5.0
"""Seconds between attempts to come back to a server that was lost, at first and at most."""


def work(
    servers: Sequence[str],
    *,
    data: Path | None = None,
    calling: "Calling | None" = None,
    seconds: float = 120.0,
) -> int:
    """Take part in the run of a parameter server until it ends, and return the code that it gives its workers.

    The job comes from the server, its data from where the job says, or from ``data``. ``seconds`` are how long a
    server may be away. Raises UnreachableError after that, what the server refuses this worker with, and what fails
    here, of which the server is told too.
    """
    from dptrain.exchange.parameter_server.invitation import ask
    from dptrain.wire.address import parse
    from dptrain.wire.channel import connect

    with ExitStack() as left:
        address = parse(servers[0])
        channel = connect(address, calling)
        left.callback(channel.close)
        invitation = ask(channel, address, seconds)
        job = rebuild(Job, invitation.job)
        job = replace(
            job,
            exchange=replace(job.exchange, type="solo", coordinators=0),
            data=job.data if data is None else replace(job.data, source=str(data.resolve())),
        )
        arithmetic.choose(job.arithmetic.kernels, job.arithmetic.threads)
        left.enter_context(arithmetic.limited(job.arithmetic.threads))
        return _work(channel, address, job, seconds)


def _work(channel: Any, address: "Address", job: Job, seconds: float) -> int:
    from dptrain.exchange.communicator import Alone
    from dptrain.exchange.parameter_server.client import Broken, Client, Stub
    from dptrain.exchange.parameter_server.codec import Written
    from dptrain.exchange.parameter_server.compute import Here
    from dptrain.exchange.parameter_server.means import Means
    from dptrain.packing import encoding_of
    from dptrain.parts import HOST, Parts
    from dptrain.phases import Phases
    from dptrain.v1 import parameter_server_pb2 as pb
    from dptrain.wire.statuses import told
    from dptrain.worker import named

    parts = Parts(job, None, Alone())
    dataset = parts.assembly.dataset
    evaluated = {"validation": dataset.validation, "test": dataset.test}
    here = Here(Means(parts.accumulator, parts.evaluator, parts.reader, evaluated), Phases())
    identity = parts.identity
    request = pb.JoinRequest(
        job_sha256=identity["job"],
        data_digest=identity["data"],
        fingerprint=identity["fingerprint"],
        arithmetic=identity["arithmetic"],
        host=HOST,
        processes=1,
    )
    written = Written(encoding_of(parts.update.gradients.name), parts.update.layout.parameters)
    stub = Stub(channel)
    lost, pause = time.monotonic(), _FIRST
    try:
        while True:
            try:
                with told(address):
                    joined = stub.join(request, timeout=seconds, wait_for_ready=True)
                client = Client(stub, joined.membership, here, job.exchange.lease_seconds, named, written)
                code = client.run()
            except Broken:
                if client.begun:
                    lost, pause = time.monotonic(), _FIRST
            except UnreachableError:
                pass
            else:
                return code
            if time.monotonic() - lost > seconds:
                raise UnreachableError(
                    f"the parameter server at {address}",
                    expected="to come back",
                    found="that it is gone",
                    cure="start it again with --resume",
                )
            # With jitter: all of a lost server's workers come back at once.
            time.sleep(pause * random.uniform(0.5, 1.5))
            pause = min(_MOST, 2 * pause)
    finally:
        here.close()
