"""A client's way to a server: one factory that puts address, token, TLS, deadlines, retries and keepalive together."""

import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import grpc

from dptrain.wire.address import Address
from dptrain.wire.backoff import FIRST_SECONDS, MOST_SECONDS
from dptrain.wire.limits import MESSAGE_BYTES, Patience
from dptrain.wire.security import Calling
from dptrain.wire.tokens import HEADER, SCHEME

ATTEMPTS = 4
"""Of a call that may be made twice, the first one included."""


def connect(
    address: Address,
    calling: Calling | None = None,
    *,
    patience: Patience | None = None,
    message_bytes: int = MESSAGE_BYTES,
    twice: Sequence[str] = (),
) -> grpc.Channel:
    """A channel to the server at ``address``, which need not be there yet; ``version.agree`` waits for it.

    A unary call that names no deadline gets ``patience``'s. Calls of the services and methods in ``twice``
    (``package.Service`` or ``package.Service/Method``), which must do no harm when they are made twice, are made again
    with growing pauses while the server is unavailable. Messages up to ``message_bytes`` are received. Raises
    RefusedError where a token would leave this machine unprotected.
    """
    calling, patience = calling or Calling(), patience or Patience()
    calling.allow(address)
    options = _options(patience, message_bytes, twice)
    tls = None if address.path else calling.tls
    if tls is None:
        channel = grpc.insecure_channel(str(address), options)
    else:
        if tls.server_name is not None:
            options.append(("grpc.ssl_target_name_override", tls.server_name))
        channel = grpc.secure_channel(str(address), tls.credentials(), options)
    return grpc.intercept_channel(channel, _Shown(calling.token, patience.call_seconds))


class _Details(NamedTuple):
    """A call's details, as grpc.ClientCallDetails has them."""

    method: str
    timeout: float | None
    metadata: Any
    credentials: Any
    wait_for_ready: bool | None
    compression: Any


class _Shown(
    grpc.UnaryUnaryClientInterceptor,
    grpc.UnaryStreamClientInterceptor,
    grpc.StreamUnaryClientInterceptor,
    grpc.StreamStreamClientInterceptor,
):
    """Shows the token with every call, of every kind: call credentials don't travel over an insecure channel."""

    def __init__(self, token: str | None, seconds: float) -> None:
        self._shown = () if token is None else ((HEADER, SCHEME + token),)
        self._seconds = seconds

    def intercept_unary_unary(self, continuation: Callable[..., Any], details: Any, request: Any) -> Any:
        return continuation(self._with(details, self._seconds), request)

    def intercept_unary_stream(self, continuation: Callable[..., Any], details: Any, request: Any) -> Any:
        return continuation(self._with(details, None), request)

    def intercept_stream_unary(self, continuation: Callable[..., Any], details: Any, requests: Any) -> Any:
        return continuation(self._with(details, None), requests)

    def intercept_stream_stream(self, continuation: Callable[..., Any], details: Any, requests: Any) -> Any:
        return continuation(self._with(details, None), requests)

    def _with(self, details: Any, seconds: float | None) -> _Details:
        return _Details(
            details.method,
            seconds if details.timeout is None else details.timeout,
            (*(details.metadata or ()), *self._shown),
            details.credentials,
            details.wait_for_ready,
            details.compression,
        )


def _options(patience: Patience, message_bytes: int, twice: Sequence[str]) -> list[tuple[str, Any]]:
    return [
        ("grpc.max_receive_message_length", message_bytes),
        ("grpc.max_send_message_length", -1),
        # A proxy of the environment has no business between machines of one cluster.
        ("grpc.enable_http_proxy", 0),
        # Two channels to one server are two connections, each with its own token and streams.
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.keepalive_time_ms", int(1000 * patience.keepalive_seconds)),
        ("grpc.keepalive_timeout_ms", int(1000 * patience.ping_seconds)),
        ("grpc.initial_reconnect_backoff_ms", int(1000 * FIRST_SECONDS)),
        # In spite of its name: how long one attempt to connect may take.
        ("grpc.min_reconnect_backoff_ms", int(1000 * patience.connect_seconds)),
        ("grpc.max_reconnect_backoff_ms", int(1000 * MOST_SECONDS)),
        ("grpc.service_config", _service_config(twice)),
    ]


def _service_config(twice: Sequence[str]) -> str:
    if not twice:
        return "{}"
    names = [dict(zip(("service", "method"), name.split("/"), strict=False)) for name in twice]
    policy = {
        "maxAttempts": ATTEMPTS,
        "initialBackoff": f"{FIRST_SECONDS}s",
        "maxBackoff": f"{MOST_SECONDS}s",
        "backoffMultiplier": 2,
        "retryableStatusCodes": ["UNAVAILABLE"],
    }
    return json.dumps({"methodConfig": [{"name": names, "retryPolicy": policy}]})
