"""The parameter server's wire alone, beside a bare gRPC stream of as large chunks between the same two processes.

Vectors go back and forth over a Unix socket, nothing is computed. The bare stream neither looks at bytes nor keeps
them; dptrain's puts them into the flat vector, with checksum and place, and is read by the threads that a run has.
With ``lent`` both sides look at the other's vector where it lies, as they do in a run on one machine.
"""

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any

import grpc
import numpy as np

from dptrain import heap
from dptrain.exchange.parameter_server import codec, lending
from dptrain.exchange.parameter_server.client import Sending, Stub, Weights
from dptrain.exchange.parameter_server.codec import CHUNK, Written, cuts, encode
from dptrain.exchange.parameter_server.hub import Hub, Part
from dptrain.exchange.parameter_server.intake import Intake
from dptrain.exchange.parameter_server.outlet import Outlet
from dptrain.exchange.parameter_server.peers import Peers
from dptrain.exchange.parameter_server.servicer import Servicer
from dptrain.packing import RAW
from dptrain.tree import Node
from dptrain.v1 import parameter_server_pb2 as pb
from dptrain.wire.address import parse
from dptrain.wire.channel import connect
from dptrain.wire.limits import Patience
from dptrain.wire.server import Server
from dptrain.wire.version import agree

JOB = 1
BARE = "bench.Bare"
IDENTITY = {"job": f"sha256:{JOB:016x}", "data": "d", "fingerprint": "f", "arithmetic": "a"}
SECONDS = 60.0
"""That anything may take."""


def sizes(elements: int) -> list[int]:
    """The lengths of a vector's bare chunks: all but the last are of 1 MiB."""
    return [min(CHUNK, 4 * elements - at) for at in range(0, 4 * elements, CHUNK)]


def serve(folder: str, elements: int, lends: bool) -> None:
    """Be the server of both, until standard input ends."""
    heap.keep()
    hub = Hub({})
    (vector,), lent = lending.rows(1, elements, np.float32)
    lent = lent if lends else None
    intake = Intake(0, 0, elements, np.float32, Written(RAW, elements))
    outlet = Outlet(JOB, 0, 0, elements, lent=lent)
    part = Part(
        identity=IDENTITY,
        job=JOB,
        shards=1,
        intake=intake,
        outlet=outlet,
        rank=0,
        servers=(0,),
        segments=1,
        owners=frozenset({0}),
        era=0,
        lent=lent,
        tell=lambda notice, servers: None,
    )
    hub.admit(part)
    peers = Peers(hub, segments=1, others=0, follows=False, silent_seconds=SECONDS)
    vector[:] = np.random.default_rng(1).standard_normal(elements, dtype=np.float32)
    chunks = [bytes(size) for size in sizes(elements)]

    def lease(request: bytes, context: Any) -> bytes:
        """A lease of one node for the worker that has joined."""
        with hub.changed:
            (member,) = hub.members
            made = hub.lease(member, 0, 1, count=1)
            intake.expect(made.number, member, 1, [Node(0, 1)])
        return str(made.number).encode()

    def over(request: bytes, context: Any) -> bytes:
        """Of that lease no more comes."""
        with hub.changed:
            intake.shut([int(request)])
            del hub.open[int(request)]
        return b""

    def publish(requests: Iterator[bytes], context: Any) -> Iterator[bytes]:
        """Weights go out, of the step that each request names."""
        for request in requests:
            outlet.publish(vector, int(request))
        yield b""

    def push(requests: Iterator[bytes], context: Any) -> Iterator[bytes]:
        """An answer to as many chunks as a vector has."""
        for number, _ in enumerate(requests, 1):
            if number % len(chunks) == 0:
                yield b""

    def pull(requests: Iterator[bytes], context: Any) -> Iterator[bytes]:
        """A vector's chunks for every request."""
        for _ in requests:
            yield from chunks

    unary, stream = grpc.unary_unary_rpc_method_handler, grpc.stream_stream_rpc_method_handler
    handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
        **{each.__name__: unary(each) for each in (lease, over)},
        **{each.__name__: stream(each) for each in (push, pull, publish)},
    }
    bare = grpc.server(ThreadPoolExecutor(8))
    bare.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(BARE, handlers),))
    bare.add_insecure_port(f"unix:{folder}/bare")
    bare.start()
    ours = Server(parse(f"unix:{folder}/ours"), [Servicer(hub, SECONDS, peers).service()])
    ours.start()
    print("ready", flush=True)
    sys.stdin.read()
    hub.close(0)
    ours.stop()
    bare.stop(0).wait()


class Both:
    """The client of both: each way moves one vector, and returns when all of it is there."""

    def __init__(self, folder: str, elements: int, lends: bool, bare: grpc.Channel, ours: grpc.Channel) -> None:
        agree(ours, parse(f"unix:{folder}/ours"), Patience(connect_seconds=SECONDS))
        (self.vector,), lent = lending.rows(1, elements, np.float32)
        self.vector[:] = np.random.default_rng(2).standard_normal(elements, dtype=np.float32)
        self._bare = bare
        self._chunks = [bytes(size) for size in sizes(elements)]
        self._step = 0
        self._streams: list[Any] = []
        stub = Stub(ours)
        request = pb.JoinRequest(
            job_sha256=IDENTITY["job"], data_digest="d", fingerprint="f", arithmetic="a", host="h", processes=1
        )
        self._membership = stub.join(request).membership
        self._sent, self._pushed = self._stream(stub.push)
        self._bare_sent, self._bare_pushed = self._stream(bare.stream_stream(f"/{BARE}/push"))
        self._asked, self._bare_pulled = self._stream(bare.stream_stream(f"/{BARE}/pull"))
        self._published, _ = self._stream(bare.stream_stream(f"/{BARE}/publish"))
        self._weights = Weights(np.zeros(elements, np.float32), JOB, [(0, elements)])
        self._lent = lent if lends else None
        if self._lent is not None:
            found = stub.lend(pb.LendRequest(membership=self._membership, partials=self._lent.told))
            memory = lending.look(found.weights)
            assert found.looks
            assert memory is not None
            self._weights.look(0, memory)
        pulled = stub.pull(iter([pb.PullRequest(membership=self._membership, looks=lends)]))
        self._streams.append(pulled)
        threading.Thread(target=self._receive, args=(pulled,), daemon=True).start()

    def _stream(self, call: Callable[..., Any]) -> tuple[Sending, Any]:
        sending = Sending()
        stream = call(sending)
        self._streams.append(stream)
        return sending, stream

    def _receive(self, pulled: Any) -> None:
        try:
            for piece in pulled:
                self._weights.take(0, piece)
        except grpc.RpcError:
            self._weights.stop()

    def _tell(self, method: str, what: bytes = b"") -> bytes:
        said: bytes = self._bare.unary_unary(f"/{BARE}/{method}")(what, timeout=SECONDS)
        return said

    def push(self) -> float:
        """Seconds of a partial's way to the server."""
        number = int(self._tell("lease"))
        started = time.perf_counter()
        every = cuts(len(self.vector), 4)
        for some in codec.together(every) if self._lent is not None else [[cut] for cut in every]:
            self._sent.queue.put(self._message(number, some))
        answer = next(self._pushed)
        seconds = time.perf_counter() - started
        assert answer.outcome == pb.OUTCOME_COMPLETE, answer
        self._tell("over", str(number).encode())
        return seconds

    def _message(self, lease: int, some: Sequence[tuple[int, int]]) -> Callable[[], bytes]:
        """What makes the message of these chunks when it is its turn."""
        first, last = some[0][0], some[-1][1]
        place = pb.Place(
            membership=self._membership,
            lease=lease,
            lo=0,
            hi=1,
            offset=first,
            total=len(self.vector),
            encoding=pb.ENCODING_RAW,
        )

        def message() -> bytes:
            where = None if self._lent is None else self._lent.where(self.vector[first:last])
            if where is None:
                return encode(place, self.vector[first:last])
            return codec.lent(place, [self.vector[start:stop] for start, stop in some], where)

        return message

    def bare_push(self) -> float:
        """The same of bare chunks."""
        started = time.perf_counter()
        for chunk in self._chunks:
            self._bare_sent.queue.put(chunk)
        next(self._bare_pushed)
        return time.perf_counter() - started

    def pull(self) -> float:
        """Seconds from the word to publish to all weights being here."""
        self._step += 1
        started = time.perf_counter()
        self._published.queue.put(str(self._step).encode())
        with self._weights.lock:
            self._weights.wait((self._step, False))
        return time.perf_counter() - started

    def bare_pull(self) -> float:
        """The same of bare chunks."""
        started = time.perf_counter()
        self._asked.queue.put(b"")
        for _ in self._chunks:
            next(self._bare_pulled)
        return time.perf_counter() - started

    def close(self) -> None:
        """End the streams."""
        for sending in (self._sent, self._bare_sent, self._asked, self._published):
            sending.queue.put(None)
        for stream in self._streams:
            stream.cancel()


WAYS = ("push", "bare_push", "pull", "bare_pull")


def main(elements: int, times: int, repeats: int, lends: bool) -> None:
    """Print the bytes a second of each way in each of the interleaved repeats, as one line of JSON."""
    heap.keep()
    with tempfile.TemporaryDirectory() as folder:
        line = [sys.executable, "-m", "bench.contestants.wire", "--serve", folder, str(elements), str(int(lends))]
        with subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
            assert server.stdout is not None
            assert server.stdin is not None
            server.stdout.readline()
            with (
                grpc.insecure_channel(f"unix:{folder}/bare") as bare,
                connect(parse(f"unix:{folder}/ours")) as ours,
                closing(Both(folder, elements, lends, bare, ours)) as both,
            ):
                rates = _measured(both, elements, times, repeats)
            server.stdin.close()
            server.wait(SECONDS)
    print(json.dumps({"bytes_per_second": rates}), flush=True)
    # Threads of gRPC's may still be at a stream that was left.
    os._exit(0)


def _measured(both: Both, elements: int, times: int, repeats: int) -> dict[str, list[float]]:
    rates: dict[str, list[float]] = {way: [] for way in WAYS}
    for repeat in range(-1, repeats):
        for way in WAYS if repeat % 2 == 0 else WAYS[::-1]:
            seconds = sum(getattr(both, way)() for _ in range(times))
            if repeat >= 0:  # the round before is the warm-up
                rates[way].append(4 * elements * times / seconds)
    return rates


if __name__ == "__main__":
    if sys.argv[1] == "--serve":
        serve(sys.argv[2], int(sys.argv[3]), sys.argv[4] == "1")
    else:
        main(*map(int, sys.argv[1:4]), sys.argv[4:5] == ["lent"])
