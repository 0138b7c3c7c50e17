"""How the servers of a run find each other: all connect to the chief, which tells each where the others are.

Then each connects to those whose numbers are lower, so that each has a link to each other.
"""

import contextlib
import hmac
import json
import secrets
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import grpc

from dptrain.errors import DeadlineError, RefusedError
from dptrain.exchange.parameter_server.hub import Hub
from dptrain.exchange.parameter_server.link import Link
from dptrain.exchange.parameter_server.service import SERVICE
from dptrain.v1 import parameter_server_pb2 as pb
from dptrain.wire.address import Address, parse
from dptrain.wire.channel import connect
from dptrain.wire.limits import Patience
from dptrain.wire.security import Calling
from dptrain.wire.version import agree

_CONNECT_SECONDS, _LEAVE_SECONDS = 120.0, 10.0


class Roster(NamedTuple):
    """A server's number, how many have a segment, and the addresses of all in order of their numbers.

    ``key`` is what they know each other by.
    """

    number: int
    segments: int
    addresses: tuple[str, ...]
    key: str


class Peers:
    """The other servers of a run. A chief (``follows`` false) waits for ``others``, itself counted among ``segments``.

    Servers without a segment have numbers from ``segments`` on.
    """

    def __init__(self, hub: Hub, *, segments: int, others: int, follows: bool, silent_seconds: float) -> None:
        self._hub, self._segments, self._others, self._follows = hub, segments, others, follows
        self._silent_seconds = silent_seconds
        self._changed = threading.Condition()
        self._links: dict[int, Link] = {}
        self._addresses: dict[int, str] = {}
        self._roster: Roster | None = None

    def refuse_needless(self) -> None:
        """Raises RefusedError where no server is to connect here."""
        if not self._others and not self._follows:
            raise _refused("none: this one was started without --standby and --segment")

    def accept(self, requests: Iterator[pb.FollowRequest]) -> Link:
        """A link to the server whose stream this is. Raises RefusedError where it is none of this run."""
        hello = _content(next(requests, None))
        with self._changed:
            if self._follows and not self._changed.wait_for(lambda: self._roster is not None, _CONNECT_SECONDS):
                raise _refused("one that the chief has told of")
            number = self._number(hello)
            link = Link(pb.FollowResponse, self._hub.heed, self._hub.ring, self._silent_seconds, number)
            self._links[number] = link
            self._addresses[number] = str(hello.get("address", ""))
            self._changed.notify_all()
            return link

    def _number(self, hello: Mapping[str, Any]) -> int:
        """Who says so. Raises RefusedError."""
        number, roster = hello.get("number"), self._roster
        if not self._follows:
            if roster is not None:
                raise _refused("those that are there already")
            if number is None:
                standbys = range(self._segments, self._others + 1)
                number = next((free for free in standbys if free not in self._links), None)
            lowest, highest = 1, self._others
        else:
            assert roster is not None
            if not hmac.compare_digest(str(hello.get("key", "")), roster.key):
                raise _refused("one that the chief has told of")
            lowest, highest = roster.number + 1, len(roster.addresses) - 1
        if not isinstance(number, int) or not lowest <= number <= highest or number in self._links:
            raise _refused(f"numbers {lowest} to {highest}, each once")
        return number

    def gather(self, address: str, seconds: float) -> dict[int, Link]:
        """A chief's links to all others, once they are there. Raises DeadlineError."""
        self._await(range(1, self._others + 1), seconds)
        addresses = (address, *(self._addresses[number] for number in range(1, self._others + 1)))
        key = secrets.token_hex(16)
        self._be(Roster(0, self._segments, addresses, key))
        for number, link in self._links.items():
            link.send(json.dumps(Roster(number, self._segments, addresses, key)).encode())
        return self._links

    @contextmanager
    def join(
        self, chief: Address, number: int | None, address: str, calling: Calling | None, seconds: float
    ) -> Iterator[tuple[Roster, dict[int, Link]]]:
        """What the chief says (``number`` None: of a server without a segment), and the links to all others.

        Raises DptrainError.
        """
        with ExitStack() as left:
            hello = {"number": number, "address": address}
            first = left.enter_context(self._call(chief, calling, 0, hello))
            roster = Roster(*json.loads(first.receive(seconds)))
            links = {0: first}
            for other in range(1, roster.number):
                hello = {"number": roster.number, "address": address, "key": roster.key}
                links[other] = left.enter_context(self._call(parse(roster.addresses[other]), calling, other, hello))
            self._be(roster)
            self._await(range(roster.number + 1, len(roster.addresses)), seconds)
            yield roster, {**links, **self._links}

    def _be(self, roster: Roster) -> None:
        with self._changed:
            self._roster = roster
            self._hub.server, self._hub.servers = roster.number, list(roster.addresses)
            self._changed.notify_all()

    def _await(self, numbers: range, seconds: float) -> None:
        with self._changed:
            if not self._changed.wait_for(lambda: self._links.keys() >= set(numbers), seconds):
                missing = [str(number) for number in numbers if number not in self._links]
                raise DeadlineError(
                    "the parameter server",
                    expected=f"the other servers of the run within {seconds:g} s",
                    found=f"no server of number {', '.join(missing)}",
                    cure="start them with `dptrain param-server JOB --segment I/N --chief ADDRESS` or --standby-of "
                    "ADDRESS, or leave --segment and --standby out",
                )

    @contextmanager
    def _call(self, address: Address, calling: Calling | None, peer: int, hello: Mapping[str, Any]) -> Iterator[Link]:
        link = Link(pb.FollowRequest, self._hub.heed, self._hub.ring, self._silent_seconds, peer)
        with contextlib.closing(connect(address, calling)) as channel:
            agree(channel, address, Patience(connect_seconds=_CONNECT_SECONDS))
            link.send(json.dumps(hello).encode())
            call = channel.stream_stream(
                f"/{SERVICE}/Follow", pb.FollowRequest.SerializeToString, pb.FollowResponse.FromString
            )(iter(link))

            def hear() -> None:
                with contextlib.suppress(grpc.RpcError):
                    link.listen(call)
                link.end()

            thread = threading.Thread(target=hear, name=f"dptrain-server-{peer}", daemon=True)
            thread.start()
            try:
                yield link
            finally:
                link.leave(0)
                # The other side ends the stream when it has heard all; one that is stopped never does.
                thread.join(0.0 if link.lost else _LEAVE_SECONDS)
                call.cancel()
                thread.join()


def _content(message: pb.FollowRequest | None) -> Mapping[str, Any]:
    """What a server says of itself first. Raises RefusedError."""
    with contextlib.suppress(ValueError):
        content = json.loads(message.data) if message is not None and message.number == 0 else None
        if isinstance(content, dict):
            return content
    raise _refused("one that says who it is")


def _refused(expected: str) -> RefusedError:
    return RefusedError("a server of the run", expected=expected, found="another", cure="end this one")
