"""A parameter server's composition root: training with the workers that join."""

import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from dptrain import arithmetic, heap
from dptrain.errors import exit_code
from dptrain.job.spec import Job, plain

if TYPE_CHECKING:
    from dptrain.result import Result
    from dptrain.wire.security import Calling, Serving

_JOIN_SECONDS = 300.0
"""How long a worker that joins waits for a server that still reads its data."""

_LEAVE_SECONDS = 5.0


def serve(
    job: Job,
    address: str,
    *,
    servers: int = 1,
    place: int | None = 0,
    standby: bool = False,
    chief: str = "",
    calling: "Calling | None" = None,
    serving: "Serving | None" = None,
    ready: Callable[[str], None] | None = None,
    **options: Any,
) -> "Result":
    """Train a complete job with the workers that join at ``address``; ``options`` are training.run's.

    However it ends, the workers that take part are told. ``ready`` is called with the address when they can connect.
    It is server ``place`` of ``servers`` that have a segment each, or has none (None). All but the first are told where
    that is, the ``chief``, which waits for them, and with ``standby`` for one more without a segment. When one dies the
    others do what it would have done.
    """
    job = replace(job, exchange=replace(job.exchange, type="ps", servers=servers, standby=standby))
    heap.keep()
    arithmetic.choose(job.arithmetic.kernels, job.arithmetic.threads)
    from dptrain.exchange.parameter_server.hub import Hub
    from dptrain.exchange.parameter_server.peers import Peers
    from dptrain.exchange.parameter_server.servers import Chief, Servers
    from dptrain.exchange.parameter_server.servicer import Servicer
    from dptrain.training import run
    from dptrain.wire.address import parse
    from dptrain.wire.server import Server

    told = replace(job, directory=os.path.abspath(job.directory))
    hub = Hub(plain(told))
    hub.stands_by = bool(chief)
    deadline, silent = job.exchange.deadline, job.exchange.lease_seconds
    others = 0 if chief else servers - 1 + standby
    peers = Peers(hub, segments=servers, others=others, follows=bool(chief), silent_seconds=silent)
    server = Server(parse(address), [Servicer(hub, _JOIN_SECONDS, peers).service()], serving=serving)
    here = str(server.address)
    hub.servers = [here]
    server.start()
    if ready is not None:
        ready(here)
    code = 1
    try:
        with ExitStack() as left:
            communicator = Chief(hub)
            if chief:
                roster, links = left.enter_context(peers.join(parse(chief), place, here, calling, deadline))
                job = replace(job, exchange=replace(job.exchange, servers=roster.segments))
                communicator = Servers(hub, roster.number, links, silent)
            elif others:
                communicator = Servers(hub, 0, peers.gather(here, deadline), silent)
            left.callback(communicator.leave, 0)
            left.push(lambda kind, error, trace: communicator.leave(exit_code(error)) if error is not None else None)
            result = run(job, communicator=communicator, **options)
        code = 0
        return result
    except BaseException as error:
        code = exit_code(error)
        raise
    finally:
        hub.close(code)
        server.stop(_LEAVE_SECONDS)
