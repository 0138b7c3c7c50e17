"""A worker's side of the wire: it takes tasks, has them computed, and sends what came of them.

Weights arrive by themselves, in a thread of their own; partials leave in another. The main thread computes.
"""

import contextlib
import queue
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import grpc
import numpy as np
from google.protobuf.message import DecodeError

from dptrain.arithmetic import peak_memory
from dptrain.errors import DptrainError, RefusedError, exit_code
from dptrain.exchange.parameter_server import codec
from dptrain.exchange.parameter_server.codec import Piece, Written, cuts, elements, encode
from dptrain.exchange.parameter_server.compute import Compute
from dptrain.exchange.parameter_server.service import SERVICE
from dptrain.layout import Array
from dptrain.nn.accumulate import Partials
from dptrain.v1 import parameter_server_pb2 as pb

Name = Callable[[BaseException, int, int, str], DptrainError]

_LAST_WORD = 2.0
"""Seconds in which a server that hands out no more weights says why."""

_SIGNS = 4
"""How often within a lease's seconds a worker may give a sign."""


class Stub:
    """The methods as a client calls them; chunks are bytes already when they get here."""

    def __init__(self, channel: grpc.Channel) -> None:
        def path(method: str) -> str:
            return f"/{SERVICE}/{method}"

        self.get_job: Callable[..., pb.GetJobResponse] = channel.unary_unary(
            path("GetJob"), pb.GetJobRequest.SerializeToString, pb.GetJobResponse.FromString
        )
        self.join: Callable[..., pb.JoinResponse] = channel.unary_unary(
            path("Join"), pb.JoinRequest.SerializeToString, pb.JoinResponse.FromString
        )
        self.leave: Callable[..., pb.LeaveResponse] = channel.unary_unary(
            path("Leave"), pb.LeaveRequest.SerializeToString, pb.LeaveResponse.FromString
        )
        self.work: Callable[..., Any] = channel.stream_stream(
            path("Work"), pb.WorkRequest.SerializeToString, pb.WorkResponse.FromString
        )
        self.push: Callable[..., Any] = channel.stream_stream(path("Push"), None, pb.PushResponse.FromString)
        self.pull: Callable[..., Any] = channel.stream_stream(
            path("Pull"), pb.PullRequest.SerializeToString, codec.decode_pull
        )


class Broken(Exception):
    """The way to the server is lost, or this worker is no member any more."""


@dataclass
class _Sending:
    """Messages on their way to one stream; None ends it."""

    queue: "queue.SimpleQueue[Any]" = field(default_factory=queue.SimpleQueue)

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        message = self.queue.get()
        if message is None:
            raise StopIteration
        return message() if callable(message) else message


class Weights:
    """The vector that is computed with, as it arrives: chunks of one version after the other.

    Nothing is written while something is computed with it.
    """

    def __init__(self, vector: Array, job: int) -> None:
        self.vector = vector
        self.lock = threading.Condition()
        self.version: tuple[int, bool] | None = None
        self._job = job
        self._arriving: tuple[int, bool] | None = None
        self._cuts = dict(cuts(len(vector), vector.dtype.itemsize))
        self._missing: set[int] = set()
        self.broken = False

    def take(self, piece: Piece) -> None:
        """A chunk. Raises RefusedError where it can't be one of these weights."""
        place = piece.place
        stop = self._cuts.get(place.offset)
        itemsize = self.vector.dtype.itemsize
        if (
            stop is None
            or place.total != len(self.vector)
            or place.membership.job != self._job
            or place.encoding != pb.ENCODING_RAW
            or len(piece.data) != (stop - place.offset) * itemsize
            or codec.checksum(piece.data) != place.checksum
        ):
            raise RefusedError("the weights", expected="a chunk of them", found="something else", cure="join again")
        version = (place.step, place.best)
        with self.lock:
            if version != self._arriving:
                self.version, self._arriving, self._missing = None, version, set(self._cuts)
            elements(piece, self.vector[place.offset : stop])
            self._missing.discard(place.offset)
            if not self._missing:
                self.version = version
                self.lock.notify_all()

    def stop(self) -> None:
        """No more will come."""
        with self.lock:
            self.broken = True
            self.lock.notify_all()

    def wait(self, version: tuple[int, bool]) -> bool:
        """To be called with the lock held: True where that version is here, False where a later one is coming."""
        self.lock.wait_for(lambda: self.broken or self.version == version or self._later(version))
        if self.broken:
            raise Broken
        return self.version == version

    def _later(self, version: tuple[int, bool]) -> bool:
        return self._arriving is not None and self._arriving[0] > version[0]


class Client:
    """Takes part in a run, with a membership, until the server ends it.

    ``hidden`` are seconds without a sign after which the server would take this worker for dead. ``name`` makes an
    error of an exception, of a worker's number, the step and the phase. ``written`` is how partials are sent.
    """

    def __init__(
        self,
        stub: Stub,
        membership: pb.Membership,
        compute: Compute,
        hidden: float,
        name: Name,
        written: Written,
    ) -> None:
        self._stub, self._membership, self._compute, self._hidden = stub, membership, compute, hidden
        self._written = written
        self.weights = Weights(compute.weights, membership.job)
        self._said, self._chunks = _Sending(), _Sending()
        self._name = name
        self._sending = False
        self._ended = threading.Event()
        self.leaving = False
        self.begun = False

    def run(self) -> int:
        """Work, and return the code that the server ends it with.

        Raises Broken where the way to the server is lost, and what failed here, after the server was told of it.
        """
        first = pb.WorkRequest(membership=self._membership)
        self._said.queue.put(first)
        tasks = self._stub.work(self._said)
        pulled = self._stub.pull(iter([pb.PullRequest(membership=self._membership)]))
        pushed = self._stub.push(self._chunks)
        threads = [
            threading.Thread(target=self._receive, args=(pulled,), name="dptrain-weights", daemon=True),
            threading.Thread(target=self._acknowledged, args=(pushed,), name="dptrain-pushed", daemon=True),
            threading.Thread(target=self._give_signs, name="dptrain-signs", daemon=True),
        ]
        for thread in threads:
            thread.start()
        try:
            return self._work(tasks)
        finally:
            self._ended.set()
            self._said.queue.put(None)
            self._chunks.queue.put(None)
            for call in (pulled, pushed):
                call.cancel()
            for thread in threads:
                thread.join()

    def leave(self) -> None:
        """Take part no more after the task at hand; from a signal handler."""
        self.leaving = True

    def _work(self, tasks: Any) -> int:
        since = time.perf_counter()
        try:
            for task in tasks:
                kind = task.WhichOneof("task")
                if kind == "end":
                    return int(task.end.code)
                self.begun = True
                try:
                    if kind == "compute":
                        since = self._partials(task.compute, since)
                    elif kind == "evaluate":
                        self._blocks(task.evaluate)
                except Broken:
                    return self._last_word(tasks)
                except grpc.RpcError:
                    raise
                except BaseException as error:
                    self._fail(error, task)
                    self._until_heard(tasks)
                    raise
        except grpc.RpcError as error:
            raise Broken from error
        raise Broken

    def _last_word(self, tasks: Any) -> int:
        """The code that the server ends this worker with, where weights end because the run does. Raises Broken."""
        timer = threading.Timer(_LAST_WORD, tasks.cancel)
        timer.start()
        try:
            for task in tasks:
                if task.WhichOneof("task") == "end":
                    return int(task.end.code)
        finally:
            timer.cancel()
            timer.join()
        raise Broken

    def _partials(self, task: pb.Compute, since: float) -> float:
        with self.weights.lock:
            # What was computed before must have left the memory that it lies in.
            self.weights.lock.wait_for(lambda: not self._sending or self.weights.broken)
            if not self.weights.wait((task.step, False)):
                return since
            began = time.perf_counter()
            partials = self._compute.partials(task.step, task.lo, task.hi)
            ended = time.perf_counter()
            self._sending = True
        self._push(task, partials)
        answer = pb.Answer(
            lease=task.lease,
            tallies=np.ascontiguousarray(partials.tallies, "<f8").tobytes(),
            compute_seconds=ended - began,
            wait_seconds=began - since,
            peak_memory_bytes=peak_memory(),
            processes=[pb.ProcessFigures(**figures) for figures in self._compute.report()],
        )
        self._said.queue.put(pb.WorkRequest(membership=self._membership, answer=answer))
        return ended

    def _push(self, task: pb.Compute, partials: Partials) -> None:
        size = len(self._compute.weights)
        put = self._chunks.queue.put
        places = [
            (node, vector, start, stop)
            for node, vector in zip(partials.nodes, partials.vectors, strict=True)
            for start, stop in cuts(size, vector.dtype.itemsize, self._written.parameters)
        ]
        last = len(places) - 1
        for i, (node, vector, start, stop) in enumerate(places):
            place = pb.Place(
                membership=self._membership,
                step=task.step,
                lease=task.lease,
                lo=node.lo,
                hi=node.hi,
                offset=start,
                total=size,
                encoding=self._written.at(start),
            )

            def message(place: pb.Place = place, part: Array = vector[start:stop], ends: bool = i == last) -> bytes:
                made = encode(place, part)
                if ends:
                    with self.weights.lock:
                        self._sending = False
                        self.weights.lock.notify_all()
                return made

            put(message)

    def _blocks(self, task: pb.Evaluate) -> None:
        with self.weights.lock:
            if not self.weights.wait((task.step, task.best)):
                return
            sums = self._compute.evaluate(task.part, task.lo, task.hi, task.step)
        blocks = pb.Blocks(lease=task.lease, sums=np.ascontiguousarray(sums, "<f8").tobytes())
        self._said.queue.put(pb.WorkRequest(membership=self._membership, blocks=blocks))

    def _fail(self, error: BaseException, task: pb.WorkResponse) -> None:
        compute = task.compute if task.HasField("compute") else None
        step = compute.step if compute else task.evaluate.step
        named = self._name(error, self._membership.worker, step, "forward and backward" if compute else "evaluation")
        failure = pb.Failure(
            kind=type(named).__name__,
            where=named.where,
            expected=named.expected,
            found=named.found,
            cure=named.cure,
            code=exit_code(named),
            traceback="".join(traceback.format_exception(error)),
        )
        self._said.queue.put(pb.WorkRequest(membership=self._membership, failure=failure))

    def _until_heard(self, tasks: Any) -> None:
        """Return when the server has ended the stream, which it does once it knows of a failure; or is as good as gone.

        What is still on its way when a channel is closed never arrives.
        """
        timer = threading.Timer(self._hidden, tasks.cancel)
        timer.start()
        with contextlib.suppress(grpc.RpcError):
            for _ in tasks:
                pass
        timer.cancel()
        timer.join()

    def _receive(self, pulled: Any) -> None:
        try:
            for piece in pulled:
                self.weights.take(piece)
        except (grpc.RpcError, DecodeError, DptrainError):
            pass
        finally:
            self.weights.stop()

    def _acknowledged(self, pushed: Any) -> None:
        """A chunk that is not taken belongs to what others compute by now; a broken stream ends the membership."""
        try:
            for _ in pushed:
                pass
        except grpc.RpcError:
            self.weights.stop()

    def _give_signs(self) -> None:
        """Tell of the loop's progress, never of this thread's."""
        told = -1
        while not self._ended.wait(self._hidden / _SIGNS):
            beat = self._compute.beat()
            if beat != told:
                told = beat
                sign = pb.Sign(beat=beat)
                self._said.queue.put(pb.WorkRequest(membership=self._membership, sign=sign))
