"""The one interceptor of a server: who may call what, how often, and what an error becomes.

It decides before a message is read: who is refused has nothing of theirs parsed.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn
from weakref import WeakKeyDictionary

import grpc

from dptrain.errors import BusyError, DptrainError, RefusedError, UsageError, WorkerCrashed
from dptrain.wire import statuses
from dptrain.wire.limits import Limits
from dptrain.wire.rate import Rates
from dptrain.wire.tokens import HEADER, SCHEME, Identity, Keys, Role

ANYBODY = Identity("anybody on this machine", Role.admin)
"""Who calls where a server has no tokens, which it may on loopback alone."""

if TYPE_CHECKING:
    Handler = grpc.RpcMethodHandler[Any, Any]

_log = logging.getLogger("dptrain.wire")
_callers: "WeakKeyDictionary[grpc.ServicerContext, Identity]" = WeakKeyDictionary()
_callers_lock = threading.Lock()


def caller(context: grpc.ServicerContext) -> Identity:
    """Who makes the call that a method is answering."""
    with _callers_lock:
        return _callers[context]


class Guard(grpc.ServerInterceptor):
    """``roles`` says for every method, ``/package.Service/Method``, what a token must be for; others are refused."""

    def __init__(
        self,
        roles: Mapping[str, Role],
        keys: Keys | None,
        limits: Limits,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._roles = dict(roles)
        self._keys = keys
        self._calls = Rates(limits.calls_per_second, limits.burst, clock)

    def intercept_service(
        self,
        continuation: "Callable[[grpc.HandlerCallDetails], Handler | None]",
        handler_call_details: grpc.HandlerCallDetails,
    ) -> "Handler | None":
        """As gRPC calls it, for every call before its first message."""
        try:
            identity = self._identify(handler_call_details)
        except DptrainError as error:  # the tokens can't be read: the operator is told, the caller only refused
            _log.error("%s", error)
            identity = None
        if identity is None:
            return _ending(_stranger(), grpc.StatusCode.UNAUTHENTICATED)
        method = handler_call_details.method
        asked = self._roles.get(method)
        handler = continuation(handler_call_details)
        if asked is None or handler is None:
            return _ending(_unknown(method), grpc.StatusCode.UNIMPLEMENTED)
        if not identity.role.grants(asked):
            return _ending(_too_little(identity, method, asked), grpc.StatusCode.PERMISSION_DENIED)
        return self._guarded(handler, method, identity)

    def _identify(self, details: grpc.HandlerCallDetails) -> Identity | None:
        if self._keys is None:
            return ANYBODY
        given = [value for key, value in details.invocation_metadata or () if key == HEADER]
        if len(given) != 1 or not isinstance(given[0], str) or not given[0].startswith(SCHEME):
            return None
        return self._keys.identify(given[0].removeprefix(SCHEME))

    def _guarded(self, handler: Any, method: str, identity: Identity) -> "Handler":
        """The handler as it was, with the caller known to it, calls counted, and errors told as they should be.

        Messages are parsed here: gRPC would end the call at one that doesn't parse, then let the method go on as if the
        caller had said all, and end it once more, which leaves a call behind that no server can stop with.
        """

        def parsed(data: bytes) -> Any:
            try:
                return handler.request_deserializer(data)
            except Exception as error:
                raise _malformed(method) from error

        def requests(given: Any) -> Any:
            return map(parsed, given) if handler.request_streaming else parsed(given)

        def once(behaviour: Callable[[Any, grpc.ServicerContext], Any]) -> Callable[[Any, grpc.ServicerContext], Any]:
            def answer(given: Any, context: grpc.ServicerContext) -> Any:
                with self._call(context, identity):
                    return behaviour(requests(given), context)

            return answer

        def many(behaviour: Callable[[Any, grpc.ServicerContext], Any]) -> Callable[[Any, grpc.ServicerContext], Any]:
            def answer(given: Any, context: grpc.ServicerContext) -> Iterator[Any]:
                with self._call(context, identity):
                    yield from behaviour(requests(given), context)

            return answer

        coding = (None, handler.response_serializer)
        if handler.request_streaming and handler.response_streaming:
            return grpc.stream_stream_rpc_method_handler(many(handler.stream_stream), *coding)
        if handler.request_streaming:
            return grpc.stream_unary_rpc_method_handler(once(handler.stream_unary), *coding)
        if handler.response_streaming:
            return grpc.unary_stream_rpc_method_handler(many(handler.unary_stream), *coding)
        return grpc.unary_unary_rpc_method_handler(once(handler.unary_unary), *coding)

    @contextmanager
    def _call(self, context: grpc.ServicerContext, identity: Identity) -> Iterator[None]:
        who = identity.name if self._keys is not None else _host(context.peer())
        if not self._calls.take(who):
            _end(context, _too_many(who))
        with _callers_lock:
            _callers[context] = identity
        try:
            yield
        except DptrainError as error:
            _end(context, error)
        except Exception as error:
            # Not the end that the method itself gave its call, nor a caller that went away.
            if context.code() is None and context.is_active():  # type: ignore[attr-defined]
                _log.exception("a method failed that should not")
                _end(context, _bug(error), grpc.StatusCode.INTERNAL)
            raise


def _ending(error: DptrainError, code: grpc.StatusCode) -> "Handler":
    """A handler that ends every call, of whatever kind, without waiting for a message."""

    def end(_: Iterator[Any], context: grpc.ServicerContext) -> Iterator[Any]:
        _end(context, error, code)

    return grpc.stream_stream_rpc_method_handler(end)


def _end(context: grpc.ServicerContext, error: DptrainError, code: grpc.StatusCode | None = None) -> NoReturn:
    context.abort_with_status(statuses.to_status(error, code))
    raise AssertionError("abort_with_status raises")


def _host(peer: str) -> str:
    """The peer without its port: ``ipv4:127.0.0.1:50123``, ``ipv6:%5B::1%5D:50123``, ``unix:``."""
    return peer if peer.startswith("unix") else peer.rpartition(":")[0]


def _stranger() -> RefusedError:
    return RefusedError(
        "server",
        expected="a token that it knows",
        found="none, or another",
        cure="give the token with --token-file or DPTRAIN_TOKEN",
    )


def _too_little(identity: Identity, method: str, asked: Role) -> RefusedError:
    return RefusedError(
        method,
        expected=f"a token for {asked}",
        found=f"one for {identity.role}",
        cure=f"use another token: dptrain token create --role {asked} makes one",
    )


def _unknown(method: str) -> UsageError:
    return UsageError(
        "server",
        expected="a method that it has",
        found=repr(method),
        cure="use the same version of dptrain on both sides",
    )


def _malformed(method: str) -> UsageError:
    return UsageError(
        method,
        expected="a message of its kind",
        found="bytes that are none",
        cure="use the same version of dptrain on both sides",
    )


def _too_many(who: str) -> BusyError:
    return BusyError(
        f"calls of {who}", expected="fewer of them a second", found="more than are allowed", cure="call less often"
    )


def _bug(error: Exception) -> WorkerCrashed:
    return WorkerCrashed(
        "server", expected="an answer", found=f"an error of its own ({type(error).__name__})", cure="see its log"
    )
