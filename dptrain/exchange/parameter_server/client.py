"""A worker's side of the wire: it takes tasks, has them computed, and sends what came of them.

Weights arrive by themselves, in a thread of their own; partials leave in another. The main thread computes.
"""

import contextlib
import queue
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc
import numpy as np
from google.protobuf.message import DecodeError

from dptrain.arithmetic import peak_memory
from dptrain.errors import DptrainError, RefusedError, exit_code
from dptrain.exchange.parameter_server import codec
from dptrain.exchange.parameter_server.codec import Piece, Version, Written, cuts, elements, encode
from dptrain.exchange.parameter_server.compute import Compute
from dptrain.exchange.parameter_server.lending import look
from dptrain.exchange.parameter_server.residuals import Age, parts
from dptrain.exchange.parameter_server.service import SERVICE
from dptrain.layout import Array
from dptrain.nn.accumulate import Partials
from dptrain.tree import Node
from dptrain.v1 import parameter_server_pb2 as pb

Name = Callable[[BaseException, int, int, str], DptrainError]

_LAST_WORD = 2.0
"""Seconds in which a server that hands out no more weights says why."""

_SIGNS = 4
"""How often within a lease's seconds a worker may give a sign."""

_LOOK = 0.25
"""Seconds of a wait for a server after which it is a sign of life that it goes on."""


class Stub:
    """The methods as a client calls them; chunks are bytes already when they get here.

    ``near``: by its address, the server is on this machine.
    """

    def __init__(self, channel: grpc.Channel, *, near: bool = False) -> None:
        self.near = near

        def path(method: str) -> str:
            return f"/{SERVICE}/{method}"

        self.get_job: Callable[..., pb.GetJobResponse] = channel.unary_unary(
            path("GetJob"), pb.GetJobRequest.SerializeToString, pb.GetJobResponse.FromString
        )
        self.join: Callable[..., pb.JoinResponse] = channel.unary_unary(
            path("Join"), pb.JoinRequest.SerializeToString, pb.JoinResponse.FromString
        )
        self.lend: Callable[..., pb.LendResponse] = channel.unary_unary(
            path("Lend"), pb.LendRequest.SerializeToString, pb.LendResponse.FromString
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


def stubs_of(numbers: Sequence[int], stubs: Sequence[Stub], seconds: float) -> list[Stub] | None:
    """The servers of these numbers, in their order; None where one of them doesn't answer within so many seconds."""
    found: dict[int, Stub] = {}
    for stub in stubs:
        if found.keys() >= set(numbers):
            break
        with contextlib.suppress(grpc.RpcError):
            found[stub.get_job(pb.GetJobRequest(), timeout=seconds).number] = stub
    return [found[number] for number in numbers] if found.keys() >= set(numbers) else None


class Broken(Exception):
    """The way to the server is lost, or this worker is no member any more."""


@dataclass
class Sending:
    """Messages on their way to one stream; None ends it."""

    queue: "queue.SimpleQueue[Any]" = field(default_factory=queue.SimpleQueue)

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        message = self.queue.get()
        if message is None:
            raise StopIteration
        return message() if callable(message) else message


class Damaged(Exception):
    """The bytes of a chunk are not those that its checksum is of."""


class _Arriving:
    """Elements lo to hi of the weights: the version that is on its way, and what is missing of it."""

    def __init__(self, lo: int, hi: int, itemsize: int) -> None:
        self.lo, self.size = lo, hi - lo
        self.cuts = dict(cuts(self.size, itemsize))
        self.version: Version | None = None
        self.missing: set[int] = set()
        self.lent: Array | None = None
        """The server's memory, where it may be looked at."""

    def whole(self, version: Version) -> bool:
        return not self.size or (self.version == version and not self.missing)


class Weights:
    """The vector that is computed with, as its ``segments`` arrive: chunks of one version after the other.

    Nothing is written while something is computed with it.
    """

    def __init__(self, vector: Array, job: int, segments: Sequence[tuple[int, int]]) -> None:
        self.vector = vector
        self.lock = threading.Condition()
        self._job = job
        self._segments = [_Arriving(lo, hi, vector.dtype.itemsize) for lo, hi in segments]
        self.broken = self.over = False
        self.waits = 0

    def take(self, segment: int, piece: Piece) -> None:
        """A chunk, or several that a message stands for.

        Raises RefusedError where it can't be one of these weights, Damaged where it arrived as another.
        """
        arriving = self._segments[segment]
        try:
            pieces = codec.looked_at(piece, arriving.lent, arriving.cuts, self.vector.dtype.itemsize)
        except ValueError:
            raise _no_weights() from None
        for one in pieces:
            self._take(segment, arriving, one)

    def _take(self, segment: int, arriving: _Arriving, piece: Piece) -> None:
        place = piece.place
        stop = arriving.cuts.get(place.offset)
        if (
            stop is None
            or place.segment != segment
            or place.total != arriving.size
            or place.membership.job != self._job
            or place.encoding != pb.ENCODING_RAW
            or len(piece.data) != (stop - place.offset) * self.vector.dtype.itemsize
        ):
            raise _no_weights()
        lent = place.HasField("lent")
        if not lent and codec.checksum(piece.data) != place.checksum:
            raise Damaged
        version = (place.step, place.best)
        with self.lock:
            if version != arriving.version:
                arriving.version, arriving.missing = version, set(arriving.cuts)
            into = self.vector[arriving.lo + place.offset : arriving.lo + stop]
            elements(piece, into)
            if lent and codec.checksum(into.data) != place.checksum:
                # Newer weights are written there by now.
                raise Damaged
            arriving.missing.discard(place.offset)
            if not arriving.missing:
                self.lock.notify_all()

    def look(self, segment: int, memory: Array) -> None:
        """The server of a segment lends its memory."""
        self._segments[segment].lent = memory

    def looks(self, segment: int) -> bool:
        """Whether it does."""
        return self._segments[segment].lent is not None

    def again(self, segment: int) -> None:
        """All of a segment comes once more."""
        with self.lock:
            self._segments[segment].version = None

    def stop(self) -> None:
        """No more will come."""
        with self.lock:
            self.broken = True
            self.lock.notify_all()

    def end(self) -> None:
        """No more will come, as the run is over."""
        with self.lock:
            self.over = True
            self.lock.notify_all()

    def wait(self, version: Version) -> bool:
        """To be called with the lock held: True where that version is here, False where it never will be."""
        while not (self.broken or self._whole(version) or self._passed(version) or self.over):
            self.lock.wait(_LOOK)
            self.waits += 1
        if self.broken:
            raise Broken
        return self._whole(version)

    def _whole(self, version: Version) -> bool:
        return all(arriving.whole(version) for arriving in self._segments)

    def _passed(self, version: Version) -> bool:
        return any(arriving.version is not None and arriving.version[0] > version[0] for arriving in self._segments)


def _no_weights() -> RefusedError:
    return RefusedError("the weights", expected="a chunk of them", found="something else", cure="join again")


class Client:
    """Takes part in a run, with a membership, until the server ends it.

    ``stubs`` are those of the servers, the chief first, of which those that have one add up ``segments``. ``hidden``
    are seconds without a sign after which the server would take this worker for dead. ``name`` makes an error of an
    exception, of a worker's number, the step and the phase. ``written`` is how partials are sent.
    """

    def __init__(
        self,
        stubs: Sequence[Stub],
        segments: Sequence[tuple[int, int]],
        membership: pb.Membership,
        compute: Compute,
        hidden: float,
        name: Name,
        written: Written,
    ) -> None:
        self._stubs, self._membership, self._compute, self._hidden = stubs, membership, compute, hidden
        self._segments, self._written = segments, written
        self.weights = Weights(compute.weights, membership.job, segments)
        self._said = Sending()
        self._chunks = [Sending() for lo, hi in segments]
        self._looks: set[int] = set()
        """The segments whose servers look at the partials where they lie."""
        self._name = name
        self._held: _Held | None = None
        self._ended = threading.Event()
        self._tasks: Any = None
        self.leaving = False
        self.begun = False

    def run(self) -> int:
        """Work, and return the code that the server ends it with.

        Raises Broken where the way to the server is lost, and what failed here, after the server was told of it.
        """
        self._lend()
        first = pb.WorkRequest(membership=self._membership)
        self._said.queue.put(first)
        self._tasks = self._stubs[0].work(self._said)
        owners = [segment for segment, (lo, hi) in enumerate(self._segments) if lo < hi]
        pushed = [self._stubs[segment].push(self._chunks[segment]) for segment in owners]
        self._pulled = {server: self._pull(server) for server in range(len(self._stubs))}
        threads = [threading.Thread(target=self._give_signs, name="dptrain-signs", daemon=True)]
        threads += [
            threading.Thread(target=self._receive, args=(server,), name=f"dptrain-weights-{server}", daemon=True)
            for server in self._pulled
        ]
        threads += [
            threading.Thread(
                target=self._acknowledged, args=(call, segment), name=f"dptrain-pushed-{segment}", daemon=True
            )
            for segment, call in zip(owners, pushed, strict=True)
        ]
        for thread in threads:
            thread.start()
        try:
            return self._work(self._tasks)
        finally:
            self._ended.set()
            for sending in (self._said, *self._chunks):
                sending.queue.put(None)
            for call in (*self._pulled.values(), *pushed):
                call.cancel()
            for thread in threads:
                thread.join()

    def _lend(self) -> None:
        """Let the servers of this machine look at partials, and look at their weights. Raises Broken."""
        lent = self._compute.lent
        if lent is None:
            return
        request = pb.LendRequest(membership=self._membership, partials=lent.told)
        for segment, (lo, hi) in enumerate(self._segments):
            if lo == hi or not self._stubs[segment].near:
                continue
            try:
                found = self._stubs[segment].lend(request)
            except grpc.RpcError as error:
                raise Broken from error
            if found.looks:
                self._looks.add(segment)
            memory = look(found.weights) if found.HasField("weights") else None
            if memory is not None:
                self.weights.look(segment, memory)

    def _pull(self, server: int) -> Any:
        looks = server < len(self._segments) and self.weights.looks(server)
        return self._stubs[server].pull(iter([pb.PullRequest(membership=self._membership, looks=looks)]))

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
                    else:
                        self._keep(task)
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
            version = task.weights if task.HasField("weights") else task.step
            if not self._free(task) or not self.weights.wait((version, False)):
                return since
            began = time.perf_counter()
            partials = self._computed(task)
            ended = time.perf_counter()
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

    def _computed(self, task: pb.Compute) -> Partials:
        """Raises Broken where the server is wrong about whose residuals are here."""
        compute, keeping, age = self._compute, self._compute.keeping, Age.of(task.residuals)
        self._begun(task)
        if keeping is None:
            return compute.partials(task.step, task.lo, task.hi)
        try:
            keeping.begin(age, task.lo, task.hi)
        except KeyError as error:
            raise Broken from error
        partials = compute.partials(task.step, task.lo, task.hi, age.updates)
        keeping.ended(age, task.step, task.lo, task.hi)
        return partials

    def _begun(self, task: pb.Compute | pb.Evaluate) -> None:
        if task.again:
            begun = pb.WorkRequest(membership=self._membership, begun=pb.Begun(lease=task.lease))
            self._said.queue.put(begun)

    def _keep(self, task: pb.WorkResponse) -> None:
        """Give a residual, or take a part of one. Raises Broken where it is not here, or damaged."""
        keeping = self._compute.keeping
        try:
            if keeping is None:
                raise ValueError("no residuals are kept")
            if task.HasField("residual"):
                keeping.take(task.residual)
            else:
                age, shard = Age.of(task.give.age), task.give.shard
                for part in parts(keeping.row(shard, age), shard, age):
                    self._said.queue.put(pb.WorkRequest(membership=self._membership, residual=part))
        except (KeyError, ValueError) as error:
            raise Broken from error

    def _push(self, task: pb.Compute, partials: Partials) -> None:
        """Send all that was computed, each segment to its server."""
        held = _Held(task, partials)
        chunks = [
            held.chunks(segment, lo, hi, self._written, together=self._lends(segment))
            for segment, (lo, hi) in enumerate(self._segments)
        ]
        with self.weights.lock:
            self._held = held
        for segment, some in enumerate(chunks):
            for node, part in some:
                self._send(segment, held, node, part)

    def _lends(self, segment: int) -> bool:
        """Whether a segment's partials are looked at where they lie: those that would be sent as they are."""
        return segment in self._looks and _within(self._written, self._segments[segment][0]).at(0) == pb.ENCODING_RAW

    def _free(self, task: pb.Compute) -> bool:
        """Wait until nobody may want what lies in the outbox any more; False where there is nothing more to do.

        What was computed must have left its memory, and where it is of the same step, or may be late, or is looked at
        where it lies, all servers must have taken it: they might ask for a chunk again.
        """
        weights = self.weights
        while (held := self._held) is not None and not weights.broken:
            over = held.task.step != task.step and not task.HasField("weights") and not held.lent
            if not held.leaving and (over or not held.awaited):
                break
            weights.lock.wait(_LOOK)
            weights.waits += 1
        if weights.broken:
            raise Broken
        return True

    def _send(self, segment: int, held: "_Held", node: Node, some: Sequence[tuple[int, int]]) -> None:
        """Send chunks that follow each other, elements start to stop of a segment of what is held for a node."""
        lo, hi = self._segments[segment]
        first, last = some[0][0], some[-1][1]
        place = pb.Place(
            membership=self._membership,
            step=held.task.step,
            lease=held.task.lease,
            segment=segment,
            lo=node.lo,
            hi=node.hi,
            offset=first,
            total=hi - lo,
            encoding=_within(self._written, lo).at(first),
        )

        def message() -> bytes:
            vector, where = held.vectors[node][lo:hi], None
            if self._lends(segment) and self._compute.lent is not None:
                where = self._compute.lent.where(vector[first:last])
            if where is None:
                assert len(some) == 1
                made = encode(place, vector[first:last])
            else:
                made = codec.lent(place, [vector[start:stop] for start, stop in some], where)
                held.lent = True
            with self.weights.lock:
                held.leaving -= 1
                self.weights.lock.notify_all()
            return made

        self._chunks[segment].queue.put(message)

    def _blocks(self, task: pb.Evaluate) -> None:
        with self.weights.lock:
            if not self.weights.wait((task.step, task.best)):
                return
            self._begun(task)
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

    def _receive(self, server: int) -> None:
        """Weights, or, of a server without a segment, that it is no server of the run any more."""
        try:
            while True:
                try:
                    for piece in self._pulled[server]:
                        self.weights.take(server, piece)
                    self.weights.end()
                    return
                except Damaged:
                    self._pulled[server].cancel()
                    self.weights.again(server)
                    if self._ended.is_set():
                        return
                    self._pulled[server] = self._pull(server)
        except (grpc.RpcError, DecodeError, DptrainError):
            self._break()

    def _acknowledged(self, pushed: Any, segment: int) -> None:
        """What became of chunks; a broken stream ends the membership.

        One that is not taken belongs to what others compute by now.
        """
        try:
            for answer in pushed:
                with self.weights.lock:
                    held = self._held
                    if held is None or held.task.lease != answer.lease:
                        continue
                    if answer.outcome == pb.OUTCOME_DAMAGED:
                        again = held.chunk(answer, *self._segments[segment], self._written)
                        if again is not None:
                            held.leaving += 1
                            self._send(segment, held, *again)
                    elif answer.outcome == pb.OUTCOME_COMPLETE:
                        held.awaited.discard(segment)
                    elif answer.outcome == pb.OUTCOME_STALE:
                        held.awaited.clear()
                    self.weights.lock.notify_all()
        except grpc.RpcError:
            self._break()

    def _break(self) -> None:
        """The way to one of the servers is lost, or they are others now."""
        self.weights.stop()
        if not self._ended.is_set():
            self._tasks.cancel()

    def _give_signs(self) -> None:
        """Tell of the loop's progress, never of this thread's."""
        told = -1
        while not self._ended.wait(self._hidden / _SIGNS):
            # Who waits for a server does not hang.
            beat = self._compute.beat() + self.weights.waits
            if beat != told:
                told = beat
                sign = pb.Sign(beat=beat)
                self._said.queue.put(pb.WorkRequest(membership=self._membership, sign=sign))


class _Held:
    """What was computed for a task, as long as it lies in the outbox.

    ``leaving`` messages are on their way out of it, and ``awaited`` are the segments that are not complete elsewhere.
    """

    def __init__(self, task: pb.Compute, partials: Partials) -> None:
        self.task = task
        self.vectors = dict(zip(partials.nodes, partials.vectors, strict=True))
        self.leaving = 0
        self.lent = False
        """Whether any of it is looked at where it lies."""
        self.awaited: set[int] = set()

    def chunks(
        self, segment: int, lo: int, hi: int, written: Written, *, together: bool
    ) -> list[tuple[Node, Sequence[tuple[int, int]]]]:
        """The chunks of a segment, all of which are to leave, each alone or several ``together``."""
        found = []
        for node, vector in self.vectors.items():
            every = cuts(hi - lo, vector.dtype.itemsize, _within(written, lo).parameters)
            found += [(node, some) for some in (codec.together(every) if together else [[cut] for cut in every])]
        self.leaving += len(found)
        if found:
            self.awaited.add(segment)
        return found

    def chunk(
        self, answer: pb.PushResponse, lo: int, hi: int, written: Written
    ) -> tuple[Node, Sequence[tuple[int, int]]] | None:
        """The one that an answer is about; None where there is none like that."""
        node = Node(answer.lo, answer.hi)
        if node not in self.vectors:
            return None
        border = _within(written, lo).parameters
        stop = dict(cuts(hi - lo, self.vectors[node].dtype.itemsize, border)).get(answer.offset)
        return None if stop is None else (node, [(answer.offset, stop)])


def _within(written: Written, lo: int) -> Written:
    """How a segment that begins at element ``lo`` is written."""
    return written._replace(parameters=max(0, written.parameters - lo))
