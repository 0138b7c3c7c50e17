"""What is attacked: a server at work, the messages to start from, and what must hold whatever it is sent."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from google.protobuf import descriptor_pool, message_factory
from google.protobuf.message import Message

from dptrain.wire.address import Address
from dptrain.wire.security import Calling


class Method(NamedTuple):
    """A method of a service, with messages to mutate that it would take."""

    path: str
    request: type[Message]
    asks: bool
    answers: bool
    examples: tuple[Message, ...]


@dataclass(frozen=True)
class Live:
    """A server at work. The round ends when ``over`` says so, or before; the target then looks at what came of it."""

    address: Address
    calling: Calling
    methods: Sequence[Method]

    def over(self) -> bool:
        """Whether the work is done, so that another round is needed to go on."""
        return False


class Target(Protocol):
    """A kind of server. Leaving the context ends the round, and raises AssertionError where anything went wrong."""

    def round(self, seed: int) -> AbstractContextManager[Live]:
        """Start a server with work to do."""
        ...


def methods_of(services: Sequence[str], examples: Mapping[str, Sequence[Message]]) -> list[Method]:
    """All methods of services by their full names; ``examples`` by path, an empty message where there are none."""
    return list(_methods(services, examples))


def _methods(services: Sequence[str], examples: Mapping[str, Sequence[Message]]) -> Iterator[Method]:
    pool = descriptor_pool.Default()
    for name in services:
        for method in pool.FindServiceByName(name).methods:
            path = f"/{name}/{method.name}"
            kind = message_factory.GetMessageClass(method.input_type)
            given = tuple(examples.get(path, ())) or (kind(),)
            yield Method(path, kind, method.client_streaming, method.server_streaming, given)
