"""What is too much: of bytes, calls, streams and connections. The server goes on, for everybody else too."""

import random
import resource
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from google.protobuf.wrappers_pb2 import BytesValue

from dptrain.errors import BusyError, UnreachableError
from dptrain.wire.address import Address, parse
from dptrain.wire.backoff import delays
from dptrain.wire.channel import connect
from dptrain.wire.limits import MESSAGE_BYTES, Limits
from dptrain.wire.rate import Rates
from dptrain.wire.security import Calling, Serving
from dptrain.wire.server import Server
from dptrain.wire.statuses import told
from dptrain.wire.tokens import TokenFile
from tests.wire.conftest import HERE
from tests.wire.echo import KINDS, NAME, Echo, call

BIG = 64 << 20


@pytest.fixture
def server(echo: Echo) -> Iterator[Server]:
    with Server(HERE, [echo.service()]) as server:
        yield server


def goes_on(server: Server) -> None:
    with connect(server.address) as channel:
        assert all(call(channel, method) for method in KINDS)


@pytest.mark.parametrize("method", KINDS)
def test_a_chunk_passes_and_a_message_of_64_mb_does_not(server: Server, echo: Echo, method: str) -> None:
    with connect(server.address) as channel:
        assert len(call(channel, method, bytes(1 << 20))) % (1 << 20) == 0
        with pytest.raises(BusyError), told(server.address):
            call(channel, method, bytes(BIG))
    assert max(echo.heard) == 1 << 20
    goes_on(server)


@pytest.mark.parametrize(
    ("method", "algorithm"),
    [*((method, grpc.Compression.Gzip) for method in KINDS), ("Once", grpc.Compression.Deflate)],
)
def test_a_compressed_message_is_not_unpacked(method: str, algorithm: grpc.Compression) -> None:
    """64 MB of zeros are 64 kB on the wire, and would pass the limit of a message's size."""
    with serving() as (address, process), connect(address) as channel:
        call(channel, method)
        before = process.memory_info().rss
        with pytest.raises(grpc.RpcError) as refused:
            call(channel, method, bytes(BIG), compression=algorithm, timeout=120)
        assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED
        assert process.memory_info().rss - before < 8 << 20
        assert all(call(channel, each) for each in KINDS)


@contextmanager
def serving() -> Iterator[tuple[Address, psutil.Process]]:
    """The echo server in a process of its own, whose memory is its alone."""
    line = [sys.executable, "-m", "tests.wire.serve"]
    with subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        yield parse(process.stdout.readline().decode().strip()), psutil.Process(process.pid)
        process.stdin.close()
        assert process.wait(60) == 0


@pytest.mark.parametrize("method", KINDS)
def test_a_message_that_lies_about_its_length_is_refused(method: str, echo: Echo) -> None:
    """And is no end of a stream as if all had been said, nor a call that the server can't stop with."""
    asks, answers = KINDS[method]
    lie = b"\x0a\xff\xff\xff\xff\x0f" + b"x"
    with Server(HERE, [echo.service()]) as server, connect(server.address) as channel:
        made = getattr(channel, f"{'stream' if asks else 'unary'}_{'stream' if answers else 'unary'}")(
            f"/{NAME}/{method}"
        )
        with pytest.raises(grpc.RpcError) as refused:
            list(made(iter([lie, lie]) if asks else lie, timeout=20))
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        goes_on(server)
    assert set(echo.heard) == {1}


@pytest.mark.parametrize(
    "said",
    [b"", b"GET / HTTP/1.1\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\xff" * 64, b"\x16\x03\x01" + b"\0" * 64],
)
def test_whoever_speaks_something_else_is_left(server: Server, said: bytes) -> None:
    with socket.create_connection((server.address.host, server.address.port), timeout=20) as connection:
        connection.sendall(said)
        goes_on(server)
        if said:
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(4096):
                pass


def test_frames_of_chance_don_t_end_a_server(server: Server) -> None:
    rng = random.Random(5)
    for _ in range(50):
        with socket.create_connection((server.address.host, server.address.port), timeout=20) as connection:
            connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(3) + b"\x04" + bytes(5))
            for _ in range(rng.randrange(1, 9)):
                body = rng.randbytes(rng.randrange(64))
                frame = len(body).to_bytes(3, "big") + bytes([rng.randrange(10), rng.randrange(256)])
                try:
                    connection.sendall(frame + rng.randrange(8).to_bytes(4, "big") + body)
                except OSError:
                    break
    goes_on(server)


def test_a_client_that_never_reads_holds_up_nobody(echo: Echo) -> None:
    """It sends for as long as the server takes: the server stops taking when nobody takes its answers."""
    sent, full = [0], threading.Event()

    def pour() -> Iterator[BytesValue]:
        while not full.is_set():
            sent[0] += 1
            yield BytesValue(value=bytes(1 << 16))

    with Server(HERE, [echo.service()]) as server:
        with connect(server.address) as channel:
            both = channel.stream_stream(
                f"/{NAME}/Both", request_serializer=BytesValue.SerializeToString, response_deserializer=None
            )
            calls = [both(pour()) for _ in range(3)]
            for _ in range(10):
                goes_on(server)
            full.set()
            for answers in calls:
                answers.cancel()
        goes_on(server)
    assert sum(echo.heard) < 1 << 30


def test_a_client_that_vanishes_in_mid_stream_frees_its_place(echo: Echo) -> None:
    with Server(HERE, [echo.service()], limits=Limits(calls=1)) as server:
        for _ in range(5):
            with connect(server.address) as channel:
                both = channel.stream_stream(
                    f"/{NAME}/Both", request_serializer=BytesValue.SerializeToString, response_deserializer=None
                )
                wait = threading.Event()

                def one(wait: threading.Event = wait) -> Iterator[BytesValue]:
                    yield BytesValue(value=b"x")
                    wait.wait(60)

                answers = both(one())
                next(answers)
                channel.close()
                wait.set()
            with connect(server.address) as channel:
                while not answered(channel):  # the server hears of it in its own time; the test has a deadline
                    pass


def answered(channel: grpc.Channel) -> bool:
    """Whether there was room for a call."""
    try:
        call(channel, "Once")
    except grpc.RpcError as error:
        if error.code() is not grpc.StatusCode.RESOURCE_EXHAUSTED:
            raise
        return False
    return True


def test_more_calls_than_there_is_room_for_are_refused_at_once(echo: Echo) -> None:
    wait = threading.Event()

    def one() -> Iterator[BytesValue]:
        yield BytesValue(value=b"x")
        wait.wait(60)

    with Server(HERE, [echo.service()], limits=Limits(calls=3)) as server, connect(server.address) as channel:
        both = channel.stream_stream(
            f"/{NAME}/Both", request_serializer=BytesValue.SerializeToString, response_deserializer=None
        )
        held = [both(one()) for _ in range(3)]
        for answers in held:
            next(answers)
        with pytest.raises(BusyError), told(server.address):
            call(channel, "Once")
        wait.set()
        for answers in held:
            assert list(answers) == []


def test_more_connections_than_there_is_room_for_are_closed(echo: Echo) -> None:
    with (
        Server(HERE, [echo.service()], limits=Limits(connections=2)) as server,
        connect(server.address) as first,
        connect(server.address) as second,
        connect(server.address) as third,
    ):
        assert call(first, "Once") == call(second, "Once") == b"x"
        with pytest.raises(UnreachableError), told(server.address):
            call(third, "Once", timeout=5)
        assert call(first, "Both") == b"x"


def test_whoever_calls_too_often_is_told_so_and_nobody_else(tokens: dict[str, str], echo: Echo, tmp_path: Path) -> None:
    keys = Serving(TokenFile(tmp_path / "tokens.json"))
    limits = Limits(calls_per_second=0.001, burst=5)
    with Server(HERE, [echo.service()], serving=keys, limits=limits) as server:
        with connect(server.address, Calling(tokens["submit"])) as channel:
            for _ in range(5):
                assert call(channel, "Once") == b"x"
            with pytest.raises(BusyError, match="the submit"), told(server.address):
                call(channel, "Many")
        with connect(server.address, Calling(tokens["admin"])) as channel:
            assert call(channel, "Once") == b"x"
    assert len(echo.heard) == 6


def test_metadata_without_end_is_refused(server: Server, echo: Echo) -> None:
    with connect(server.address) as channel, pytest.raises(grpc.RpcError):
        call(channel, "Once", metadata=[("x-long", "y" * (64 << 10))])
    assert echo.heard == []
    goes_on(server)


def test_a_bucket_fills_at_its_rate_up_to_its_brim() -> None:
    now = [0.0]
    rates = Rates(2.0, 3, lambda: now[0])
    assert [rates.take("a") for _ in range(4)] == [True, True, True, False]
    assert rates.take("b")
    now[0] = 0.5
    assert [rates.take("a") for _ in range(2)] == [True, False]
    now[0] = 1000.0
    assert [rates.take("a") for _ in range(4)] == [True, True, True, False]


def test_buckets_of_those_who_are_quiet_are_forgotten() -> None:
    now = [0.0]
    rates = Rates(1.0, 1, lambda: now[0])
    for i in range(10_000):
        rates.take(f"{i}")
    now[0] = 2.0
    rates.take("one more")
    assert len(rates._buckets) == 1


def test_pauses_grow_to_their_limit_and_differ() -> None:
    def first(seed: int) -> list[float]:
        made: Any = delays(random.Random(seed), first=0.1, most=1.0)
        return [next(made) for _ in range(8)]

    for seed in range(20):
        for pause, most in zip(first(seed), (0.1, 0.2, 0.4, 0.8, 1.0, 1.0, 1.0, 1.0), strict=True):
            assert most / 2 <= pause <= most
    assert first(1) != first(2)
    assert first(1) == first(1)


def test_a_chunk_and_what_surrounds_it_fit_into_a_message() -> None:
    assert 1 << 20 < MESSAGE_BYTES < 2 << 20


def test_descriptors_are_given_back(echo: Echo, tmp_path: Path) -> None:
    def opened() -> int:
        return psutil.Process().num_fds()

    def round_trip() -> None:
        with Server(parse(f"unix:{tmp_path}/s"), [echo.service()]) as server, connect(server.address) as channel:
            assert call(channel, "Once") == b"x"

    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > 64
    round_trip()
    before = opened()
    for _ in range(5):
        round_trip()
    assert opened() <= before + 3
