"""grpc.health.v1, answered here: grpcio-health-checking's own servicer leaves a thread waiting for ever where a watcher
goes away before it is asked for its first status.
"""

import contextlib
import threading
from collections.abc import Iterator

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from dptrain.errors import UnreachableError
from dptrain.wire.address import Address
from dptrain.wire.channel import connect
from dptrain.wire.limits import Patience
from dptrain.wire.security import Calling
from dptrain.wire.statuses import told

_Status = health_pb2.HealthCheckResponse


class Health(health_pb2_grpc.HealthServicer):  # type: ignore[misc]
    """The whole server's health, under the empty name; other names are not known."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._serving = False
        self._over = False

    def set(self, serving: bool) -> None:
        """What is told from now on."""
        with self._changed:
            self._serving = serving
            self._changed.notify_all()

    def end(self) -> None:
        """The server ends: whoever watches is told so, once and for all."""
        with self._changed:
            self._over = True
            self._serving = False
            self._changed.notify_all()

    def Check(
        self, request: health_pb2.HealthCheckRequest, context: grpc.ServicerContext
    ) -> health_pb2.HealthCheckResponse:
        """As the protocol says."""
        if request.service:
            context.abort(grpc.StatusCode.NOT_FOUND, "no health of a single service is kept")
        with self._changed:
            return self._told(request.service)

    def Watch(
        self, request: health_pb2.HealthCheckRequest, context: grpc.ServicerContext
    ) -> Iterator[health_pb2.HealthCheckResponse]:
        """As the protocol says: the status now, and whenever it is another one."""
        if not context.add_callback(self._wake):
            return
        last = None
        while context.is_active():
            with self._changed:
                now = self._told(request.service)
                while now == last and context.is_active() and not self._over:
                    self._changed.wait()
                    now = self._told(request.service)
            if now == last:
                return
            last = now
            yield now

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _told(self, service: str) -> health_pb2.HealthCheckResponse:
        if service:
            return _Status(status=_Status.SERVICE_UNKNOWN)
        return _Status(status=_Status.SERVING if self._serving else _Status.NOT_SERVING)


def ask(address: Address, calling: Calling, patience: Patience | None = None) -> None:
    """Return where a server serves. Raises UnreachableError where it doesn't, RefusedError."""
    patience = patience or Patience()
    with contextlib.closing(connect(address, calling, patience=patience)) as channel, told(address):
        stub = health_pb2_grpc.HealthStub(channel)
        answer = stub.Check(health_pb2.HealthCheckRequest(), timeout=patience.connect_seconds)
    if answer.status != _Status.SERVING:
        raise UnreachableError(
            f"server {address}",
            expected="to serve",
            found=_Status.ServingStatus.Name(answer.status),
            cure="it starts or stops; ask again",
        )
