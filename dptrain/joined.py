"""The composition root of a worker that joins a parameter server."""

import itertools
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from dptrain import arithmetic, heap
from dptrain.errors import BusyError, UnreachableError
from dptrain.job.spec import Job, plain, rebuild

if TYPE_CHECKING:
    from dptrain.exchange.parameter_server.compute import Compute
    from dptrain.exchange.parameter_server.invitation import Invitation
    from dptrain.parts import Parts
    from dptrain.wire.address import Address
    from dptrain.wire.security import Calling

_LEAVE_SECONDS = 2.0
"""In which a server must have answered a worker that leaves."""

_FIRST, _MOST = 0.1, 5.0
"""Seconds between attempts to come back to a server that was lost, at first and at most."""

_FIND_SECONDS = 1.0
"""Seconds in which one of several servers must be reached before the next is asked for the job."""

_ASK_SECONDS = 5.0
"""Seconds, at most, in which one of several servers must say which one it is."""


def work(
    servers: Sequence[str],
    *,
    data: Path | None = None,
    processes: int = 1,
    calling: "Calling | None" = None,
    seconds: float = 120.0,
) -> int:
    """Take part in the run of a parameter server until it ends, and return the code that it gives its workers.

    The job comes from the server, its data from where the job says, or from ``data``. ``processes`` of this machine,
    this one among them, compute, and send one sum. ``seconds`` are how long a server may be away. Raises
    UnreachableError after that, what the server refuses this worker with, and what fails here, of which the server is
    told too.
    """
    from dptrain.wire.address import parse
    from dptrain.wire.channel import connect

    heap.keep()
    addresses = [parse(server) for server in servers]
    with ExitStack() as left:
        channels = []

        def open_to(address: "Address") -> None:
            channels.append((address, connect(address, calling)))
            left.callback(channels[-1][1].close)

        for address in addresses:
            open_to(address)
        invitation = _invited(channels, seconds)
        if len(addresses) < len(invitation.servers):
            # The chief knows where the others are; by names of its own, so it is asked only for want of other ones.
            for address in map(parse, invitation.servers):
                if address not in addresses:
                    open_to(address)
        job = rebuild(Job, invitation.job)
        job = replace(
            job,
            exchange=replace(job.exchange, type="solo", coordinators=0, mode="sync"),
            data=job.data if data is None else replace(job.data, source=str(data.resolve())),
        )
        arithmetic.choose(job.arithmetic.kernels, job.arithmetic.threads)
        left.enter_context(arithmetic.limited(job.arithmetic.threads))
        return _work(channels, job, processes, seconds)


def _invited(servers: Sequence[tuple["Address", Any]], seconds: float) -> "Invitation":
    """The invitation of any of the servers, asked in turn: the first of them may be gone. Raises DptrainError."""
    from dptrain.exchange.parameter_server.invitation import ask

    until = time.monotonic() + seconds
    for address, channel in itertools.cycle(servers):
        left = until - time.monotonic()
        try:
            return ask(channel, address, left if len(servers) == 1 else max(0.1, min(_FIND_SECONDS, left)))
        except UnreachableError:
            if time.monotonic() >= until:
                raise
    raise AssertionError("there is no server")


@contextmanager
def _leaving(leave: Callable[[], object]) -> Iterator[None]:
    """Within it, SIGTERM ends this worker only after the server was told, which would take it for dead otherwise.

    Workers that are ended together must not look as if a shard ended one after the other.
    """

    def tell() -> None:
        try:
            leave()
        except Exception:  # a server that can't be told notices by itself
            pass
        finally:
            os.kill(os.getpid(), signal.SIGKILL)

    def asked(number: int, frame: FrameType | None) -> None:
        threading.Thread(target=tell, name="dptrain-leaving", daemon=True).start()

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, asked)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _work(servers: Sequence[tuple["Address", Any]], job: Job, processes: int, seconds: float) -> int:
    from dptrain.exchange.communicator import Alone
    from dptrain.exchange.parameter_server.client import Broken, Client, Stub, stubs_of
    from dptrain.exchange.parameter_server.codec import Written
    from dptrain.layout import segments
    from dptrain.packing import encoding_of
    from dptrain.parts import HOST, Parts
    from dptrain.v1 import parameter_server_pb2 as pb
    from dptrain.wire.statuses import told
    from dptrain.worker import named

    parts = Parts(job, None, Alone())
    here = _compute(parts, processes)
    identity = parts.identity
    request = pb.JoinRequest(
        job_sha256=identity["job"],
        data_digest=identity["data"],
        fingerprint=identity["fingerprint"],
        arithmetic=identity["arithmetic"],
        host=HOST,
        processes=processes,
    )
    written = Written(encoding_of(parts.update.gradients.name), parts.update.layout.parameters)
    lost, pause, patience = time.monotonic(), _FIRST, seconds
    asking = min(_ASK_SECONDS, job.exchange.lease_seconds)
    try:
        for turn in itertools.count():
            address, channel = servers[turn % len(servers)]
            stub = Stub(channel)
            # The last that is left is waited for; of several that are, one is the chief.
            waits = len(servers) == 1
            client = None
            if here.keeping is not None:
                del request.residuals[:]
                request.residuals.extend(here.keeping.claims())
            try:
                with told(address):
                    if not waits:
                        # One that is stopped would keep a worker from finding the one that goes on.
                        stub.get_job(pb.GetJobRequest(), timeout=asking)
                    joined = stub.join(request, timeout=patience, wait_for_ready=waits)
                here.who = f"worker {joined.membership.worker}"
                stubs = stubs_of(
                    joined.servers, [Stub(channel, near=bool(address.path)) for address, channel in servers], asking
                )
                if stubs is None:
                    raise Broken
                cuts = segments(parts.update.layout.size, joined.segments)
                client = Client(stubs, cuts, joined.membership, here, job.exchange.lease_seconds, named, written)
                leaves = pb.LeaveRequest(membership=joined.membership)
                # Residuals are handed over first.
                leaving = _LEAVE_SECONDS if here.keeping is None else _LEAVE_SECONDS + job.exchange.lease_seconds
                with _leaving(partial(stub.leave, leaves, timeout=leaving)):
                    code = client.run()
            except Broken:
                if client is not None and client.begun:
                    lost, pause = time.monotonic(), _FIRST
                    patience = seconds if waits else min(seconds, _ASK_SECONDS)
            except (UnreachableError, BusyError):
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
    raise AssertionError("servers never run out")


def _compute(parts: "Parts", processes: int) -> "Compute":
    """What computes on this machine."""
    from dptrain.exchange.parameter_server.compute import Here
    from dptrain.exchange.parameter_server.means import Means
    from dptrain.phases import Phases

    dataset, job = parts.assembly.dataset, parts.job
    evaluated = {"validation": dataset.validation, "test": dataset.test}
    means = Means(parts.accumulator, parts.evaluator, parts.reader, evaluated)
    if processes == 1:
        return Here(means, Phases())
    from dptrain.exchange.parameter_server.several import Several

    several = Several(
        means,
        plain(job),
        parts.plan,
        processes=processes,
        fingerprint=parts.probe.fingerprint,
        hang_seconds=job.exchange.hang_seconds,
        deadline=job.exchange.deadline,
    )
    several.phases = Phases()
    try:
        several.await_all()
    except BaseException:
        several.close()
        raise
    return several
