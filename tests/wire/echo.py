"""A service of all four kinds of methods, for servers under test: it says what it is told, unless told to fail."""

from collections.abc import Iterator
from typing import Any

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool
from google.protobuf.wrappers_pb2 import BytesValue

from dptrain.errors import JobError
from dptrain.wire.guard import caller
from dptrain.wire.server import Service
from dptrain.wire.tokens import Role

NAME = "dptrain.tests.EchoService"
KINDS = {"Once": (False, False), "Many": (False, True), "Gather": (True, False), "Both": (True, True)}
ROLES = dict.fromkeys(KINDS, Role.submit)


def _describe() -> None:
    file = descriptor_pb2.FileDescriptorProto(
        name="dptrain/tests/echo.proto", package="dptrain.tests", dependency=["google/protobuf/wrappers.proto"]
    )
    service = file.service.add(name="EchoService")
    for method, (asks, answers) in KINDS.items():
        service.method.add(
            name=method,
            input_type=".google.protobuf.BytesValue",
            output_type=".google.protobuf.BytesValue",
            client_streaming=asks,
            server_streaming=answers,
        )
    descriptor_pool.Default().Add(file)


_describe()


class Echo:
    """What was heard is kept, for tests that ask whether something reached a method."""

    def __init__(self) -> None:
        self.heard: list[int] = []
        self.callers: list[str] = []

    def service(self, roles: dict[str, Role] | None = None) -> Service:
        return Service(NAME, self._add, roles or ROLES)

    def _add(self, server: grpc.Server) -> None:
        makers: dict[tuple[bool, bool], Any] = {
            (False, False): (grpc.unary_unary_rpc_method_handler, self._once),
            (False, True): (grpc.unary_stream_rpc_method_handler, self._many),
            (True, False): (grpc.stream_unary_rpc_method_handler, self._gather),
            (True, True): (grpc.stream_stream_rpc_method_handler, self._both),
        }
        handlers = {}
        for method, kind in KINDS.items():
            make, behaviour = makers[kind]
            handlers[method] = make(behaviour, BytesValue.FromString, BytesValue.SerializeToString)
        server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(NAME, handlers)])

    def _hear(self, message: BytesValue, context: grpc.ServicerContext) -> BytesValue:
        self.heard.append(len(message.value))
        self.callers.append(caller(context).name)
        if message.value == b"job":
            raise JobError("job.toml: train.epochs", expected="a number", found="'många'", cure="write 3")
        if message.value == b"bug":
            raise ZeroDivisionError("secret of the server")
        if message.value == b"abort":
            context.abort(grpc.StatusCode.NOT_FOUND, "as the method says")
        return message

    def _once(self, message: BytesValue, context: grpc.ServicerContext) -> BytesValue:
        return self._hear(message, context)

    def _many(self, message: BytesValue, context: grpc.ServicerContext) -> Iterator[BytesValue]:
        for _ in range(3):
            yield self._hear(message, context)

    def _gather(self, messages: Iterator[BytesValue], context: grpc.ServicerContext) -> BytesValue:
        return BytesValue(value=b"".join(self._hear(message, context).value for message in messages))

    def _both(self, messages: Iterator[BytesValue], context: grpc.ServicerContext) -> Iterator[BytesValue]:
        for message in messages:
            yield self._hear(message, context)


def call(channel: grpc.Channel, method: str, value: bytes = b"x", timeout: float = 20.0, **more: Any) -> bytes:
    """Call a method of whatever kind with one message, and return all that it answers."""
    asks, answers = KINDS[method]
    kind = f"{'stream' if asks else 'unary'}_{'stream' if answers else 'unary'}"
    made = getattr(channel, kind)(
        f"/{NAME}/{method}",
        request_serializer=BytesValue.SerializeToString,
        response_deserializer=BytesValue.FromString,
    )
    message = BytesValue(value=value)
    answer = made(iter([message]) if asks else message, timeout=timeout, **more)
    return b"".join(part.value for part in answer) if answers else answer.value
