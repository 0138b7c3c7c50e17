"""A server, whatever it serves: one factory for address, security, limits, health, reflection and errors."""

import hashlib
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import grpc
from google.protobuf import descriptor_pool
from grpc_health.v1 import health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from dptrain.errors import LaunchError
from dptrain.v1 import version_pb2_grpc
from dptrain.wire.address import Address
from dptrain.wire.guard import Guard
from dptrain.wire.health import Health
from dptrain.wire.limits import METADATA_BYTES, Limits, Patience
from dptrain.wire.security import Serving
from dptrain.wire.tokens import Role
from dptrain.wire.version import Version

_UNREAD = 2.0
"""Seconds after which a call that was ended must be over."""

abandoned = False
"""Whether calls of this process are left behind, whose threads would keep its interpreter from ending."""


@dataclass(frozen=True, slots=True)
class Service:
    """Something to serve: its full name, what adds it to a gRPC server, and for each method the least role."""

    name: str
    add: Callable[[grpc.Server], None]
    roles: Mapping[str, Role]


class Server:
    """Listens from construction on and answers from ``start`` on; a context manager that does both and ends it.

    ``address`` is where it can be reached, with the port that port 0 became. Raises RefusedError for an address that
    isn't safe enough, LaunchError for one that is taken or not this machine's.
    """

    def __init__(
        self,
        address: Address,
        services: Sequence[Service],
        *,
        serving: Serving | None = None,
        limits: Limits | None = None,
        patience: Patience | None = None,
    ) -> None:
        serving, limits, patience = serving or Serving(), limits or Limits(), patience or Patience()
        serving.allow(address)
        self._health = Health()
        everything = [*services, *self._of_every_server(services)]
        roles = {path: role for service in everything for path, role in _paths(service)}
        self._pool = ThreadPoolExecutor(limits.calls, thread_name_prefix="dptrain-call")
        self._server = grpc.server(
            self._pool,
            interceptors=[Guard(roles, serving.keys, limits)],
            options=_options(limits, patience),
            maximum_concurrent_rpcs=limits.calls,
        )
        for service in everything:
            service.add(self._server)
        self._path = _Path(address.path) if address.path else None
        try:
            port = self._bind(address, serving)
        except (RuntimeError, OSError) as error:
            self._close()
            raise _not_there(address, error) from None
        if port == 0:
            self._close()
            raise _not_there(address, None)
        if self._path is not None:
            self._path.bound()
        self.address = address.at(port)

    def start(self) -> None:
        """Answer from now on."""
        self._server.start()
        self.serves(True)

    def serves(self, healthy: bool) -> None:
        """What health checks are told of the whole server."""
        self._health.set(healthy)

    def stop(self, grace_seconds: float = 0.0) -> None:
        """Take no more calls, give those under way ``grace_seconds``, then end them. Returns when all is over.

        A caller that is stopped and whose connection is full keeps its call from ending for as long as it is there:
        such calls are left behind, ``abandoned``.
        """
        self._health.end()
        over = self._server.stop(grace_seconds).wait(grace_seconds + _UNREAD)
        self._close(over)

    def _close(self, over: bool = True) -> None:
        global abandoned
        if over:
            self._server.stop(None).wait()
        else:
            abandoned = True
        self._pool.shutdown(wait=over)
        if self._path is not None:
            self._path.leave()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _bind(self, address: Address, serving: Serving) -> int:
        if serving.tls is None or address.path:
            return self._server.add_insecure_port(str(address))
        return self._server.add_secure_port(str(address), serving.tls.credentials())

    def _of_every_server(self, services: Sequence[Service]) -> list[Service]:
        names = (*(service.name for service in services), "dptrain.v1.VersionService", "grpc.health.v1.Health")
        return [
            Service(
                "dptrain.v1.VersionService",
                lambda server: version_pb2_grpc.add_VersionServiceServicer_to_server(Version(), server),
                {"GetVersion": Role.any},
            ),
            Service(
                "grpc.health.v1.Health",
                lambda server: health_pb2_grpc.add_HealthServicer_to_server(self._health, server),
                dict.fromkeys(_methods("grpc.health.v1.Health"), Role.any),
            ),
            Service(
                reflection.SERVICE_NAME,
                lambda server: reflection.enable_server_reflection((*names, reflection.SERVICE_NAME), server),
                dict.fromkeys(_methods(reflection.SERVICE_NAME), Role.any),
            ),
        ]


class _Path:
    """A Unix socket's file, and that no other server has it: gRPC takes a path from who listens there, without a word.

    The lock is a name in the kernel's abstract space, which goes with the process; what another network namespace
    can't see of it, a connection finds out.
    """

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        self._made: tuple[int, int] | None = None
        try:
            folder = self.path.parent.stat()
        except OSError as error:
            raise _not_there(Address(path=path), error) from None
        name = hashlib.sha256(f"{folder.st_dev}:{folder.st_ino}:{self.path.name}".encode()).hexdigest()
        self._lock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._lock.bind(f"\0dptrain-{name}")
        except OSError:
            self._lock.close()
            raise _taken(Address(path=path)) from None
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            if probe.connect_ex(path) == 0:
                self._lock.close()
                raise _taken(Address(path=path))
        if self.path.exists() and not self.path.is_socket():
            self._lock.close()
            raise LaunchError(
                f"listen on unix:{path}",
                expected="no file there, or a socket that nobody listens on",
                found="another file",
                cure="choose another path",
            )

    def bound(self) -> None:
        """The socket is there: from now on for its owner alone."""
        self.path.chmod(0o600)
        status = self.path.stat()
        self._made = (status.st_dev, status.st_ino)

    def leave(self) -> None:
        """Take the file away if it is still the one that was made here."""
        try:
            status = self.path.stat()
            if self._made == (status.st_dev, status.st_ino):
                self.path.unlink()
        except FileNotFoundError:
            pass
        self._lock.close()


def _paths(service: Service) -> Iterator[tuple[str, Role]]:
    """The service's methods as they are called, each with its role; every method must have one."""
    methods = _methods(service.name)
    if set(methods) != set(service.roles):
        raise ValueError(f"{service.name} has the methods {sorted(methods)}, roles are for {sorted(service.roles)}")
    for method in methods:
        yield f"/{service.name}/{method}", service.roles[method]


def _methods(service: str) -> list[str]:
    return [method.name for method in descriptor_pool.Default().FindServiceByName(service).methods]


def _options(limits: Limits, patience: Patience) -> list[tuple[str, int]]:
    return [
        # Two servers on one port must not share it in silence.
        ("grpc.so_reuseport", 0),
        ("grpc.max_receive_message_length", limits.message_bytes),
        ("grpc.max_send_message_length", -1),
        ("grpc.max_metadata_size", METADATA_BYTES),
        ("grpc.absolute_max_metadata_size", METADATA_BYTES),
        ("grpc.max_concurrent_streams", limits.streams),
        ("grpc.max_allowed_incoming_connections", limits.connections),
        ("grpc.server_handshake_timeout_ms", int(1000 * limits.handshake_seconds)),
        # Bit 0 alone: not compressed. Anything else is answered UNIMPLEMENTED before it is unpacked.
        ("grpc.compression_enabled_algorithms_bitset", 1),
        ("grpc.keepalive_time_ms", int(1000 * patience.keepalive_seconds)),
        ("grpc.keepalive_timeout_ms", int(1000 * patience.ping_seconds)),
        ("grpc.http2.min_ping_interval_without_data_ms", int(500 * patience.keepalive_seconds)),
    ]


def _taken(address: Address) -> LaunchError:
    return LaunchError(
        f"listen on {address}",
        expected="an address that no server has",
        found="another server there",
        cure="end that one, or choose another address",
    )


def _not_there(address: Address, error: Exception | None) -> LaunchError:
    return LaunchError(
        f"listen on {address}",
        expected="an address of this machine that no server has",
        found=(isinstance(error, OSError) and error.strerror) or "one that can't be listened on",
        cure="end who listens there, or choose another address",
    )
