"""A parameter server's composition root: training with the workers that join."""

import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from dptrain import arithmetic
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
    standby: bool = False,
    standby_of: str = "",
    calling: "Calling | None" = None,
    serving: "Serving | None" = None,
    ready: Callable[[str], None] | None = None,
    **options: Any,
) -> "Result":
    """Train a complete job with the workers that join at ``address``; ``options`` are training.run's.

    However it ends, the workers that take part are told. ``ready`` is called with the address when they can connect.
    With ``standby`` it waits for a server that follows it, with ``standby_of`` it is the one that follows the server
    there, until that dies, and does then what it would have done.
    """
    job = replace(job, exchange=replace(job.exchange, type="ps"))
    arithmetic.choose(job.arithmetic.kernels, job.arithmetic.threads)
    from dptrain.exchange.parameter_server.following import follow, followed
    from dptrain.exchange.parameter_server.hub import Hub
    from dptrain.exchange.parameter_server.pair import Chief, Link, Pair
    from dptrain.exchange.parameter_server.servicer import Servicer
    from dptrain.training import run
    from dptrain.v1 import parameter_server_pb2 as pb
    from dptrain.wire.address import parse
    from dptrain.wire.server import Server

    told = replace(job, directory=os.path.abspath(job.directory))
    hub = Hub(plain(told))
    hub.stands_by = bool(standby_of)
    link = Link(pb.FollowResponse) if standby else None
    server = Server(parse(address), [Servicer(hub, _JOIN_SECONDS, link).service()], serving=serving)
    hub.servers = [str(server.address)]
    server.start()
    if ready is not None:
        ready(str(server.address))
    code = 1
    try:
        with ExitStack() as left:
            communicator = Chief(hub)
            if link is not None:
                communicator = Pair(hub, followed(link, job.exchange.deadline), 0)
                left.callback(link.leave, 0)
            elif standby_of:
                communicator = Pair(hub, left.enter_context(follow(parse(standby_of), calling)), 1)
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
