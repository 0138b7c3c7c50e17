"""A parameter server's composition root: training with the workers that join."""

import os
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from dptrain import arithmetic
from dptrain.errors import exit_code
from dptrain.job.spec import Job, plain

if TYPE_CHECKING:
    from dptrain.result import Result
    from dptrain.wire.security import Serving

_JOIN_SECONDS = 300.0
"""How long a worker that joins waits for a server that still reads its data."""

_LEAVE_SECONDS = 5.0


def serve(
    job: Job,
    address: str,
    *,
    serving: "Serving | None" = None,
    ready: Callable[[str], None] | None = None,
    **options: Any,
) -> "Result":
    """Train a complete job with the workers that join at ``address``; ``options`` are training.run's.

    However it ends, the workers that take part are told. ``ready`` is called with the address when they can connect.
    """
    job = replace(job, exchange=replace(job.exchange, type="ps"))
    arithmetic.choose(job.arithmetic.kernels, job.arithmetic.threads)
    from dptrain.exchange.parameter_server.exchange import Chief
    from dptrain.exchange.parameter_server.hub import Hub
    from dptrain.exchange.parameter_server.servicer import Servicer
    from dptrain.training import run
    from dptrain.wire.address import parse
    from dptrain.wire.server import Server

    told = replace(job, directory=os.path.abspath(job.directory))
    hub = Hub(plain(told))
    server = Server(parse(address), [Servicer(hub, _JOIN_SECONDS).service()], serving=serving)
    hub.servers = [str(server.address)]
    server.start()
    if ready is not None:
        ready(str(server.address))
    code = 1
    try:
        result = run(job, communicator=Chief(hub), **options)
        code = 0
        return result
    except BaseException as error:
        code = exit_code(error)
        raise
    finally:
        hub.close(code)
        server.stop(_LEAVE_SECONDS)
