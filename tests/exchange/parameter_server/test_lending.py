"""Vectors that lie in memory which server and worker both see: the same bits, and nothing taken on trust."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dptrain.errors import RefusedError
from dptrain.exchange.parameter_server import codec, lending
from dptrain.exchange.parameter_server.client import Client, Damaged, Weights
from dptrain.exchange.parameter_server.codec import Piece, Written, decode_pull, decode_push
from dptrain.exchange.parameter_server.hub import Hub
from dptrain.exchange.parameter_server.intake import Intake
from dptrain.exchange.parameter_server.lending import Lent, look
from dptrain.exchange.parameter_server.outlet import Outlet
from dptrain.layout import Array
from dptrain.packing import RAW
from dptrain.tree import Node
from dptrain.v1 import parameter_server_pb2 as pb
from tests.exchange.parameter_server.running import Cluster
from tests.exchange.parameter_server.test_bad_input import Hostile, Spoil
from tests.exchange.parameter_server.test_run import job

SIZE = 600_000


def lent(count: int = 1, size: int = SIZE) -> tuple[Array, Lent, Array]:
    """Rows, what lends them, and the memory as who looks at it sees it."""
    vectors, kept = lending.rows(count, size, np.float32)
    assert kept is not None
    seen = look(kept.told)
    assert seen is not None
    return vectors, kept, seen


@pytest.mark.parametrize("near", [True, False], ids=["lent", "sent"])
@pytest.mark.parametrize("workers", [1, 3, 5])
def test_the_hash_is_solos(
    near: bool, workers: int, solo: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the bytes of chunks none travel where memory is lent, and all where it isn't."""
    travelled: dict[str, set[bool]] = {"partials": set(), "weights": set()}

    def seen(what: str, decode: Callable[[bytes], Piece]) -> Callable[[bytes], Piece]:
        def decoded(message: bytes) -> Piece:
            piece = decode(message)
            travelled[what].add(bool(len(piece.data)))
            return piece

        return decoded

    monkeypatch.setattr("dptrain.exchange.parameter_server.servicer.decode_push", seen("partials", codec.decode_push))
    monkeypatch.setattr("dptrain.exchange.parameter_server.codec.decode_pull", seen("weights", codec.decode_pull))
    if not near:
        monkeypatch.setattr(Client, "_lend", lambda self: None)
    cluster = Cluster(job(), tmp_path)
    result = cluster.train(workers)
    assert result.weights_sha256 == solo
    assert cluster.codes == [0] * workers
    assert travelled["partials"] == {not near}
    # Those that are kept as the best lie elsewhere.
    assert (False in travelled["weights"]) == near


def test_near_and_far_workers_take_part_together(solo: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lend, asked = Client._lend, iter([True, False, True, False])
    monkeypatch.setattr(Client, "_lend", lambda self: lend(self) if next(asked) else None)
    cluster = Cluster(job(), tmp_path)
    assert cluster.train(4).weights_sha256 == solo
    assert cluster.codes == [0] * 4


def test_who_comes_over_a_network_is_not_looked_at(solo: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even who says that it is near."""
    monkeypatch.setattr(Hub, "lend", lambda self, request: pytest.fail("it was"))
    near: list[bool] = []
    lend = Client._lend

    def claimed(self: Client) -> None:
        for stub in self._stubs:
            stub.near = True
        lend(self)
        near.extend(self.weights.looks(segment) or bool(self._looks) for segment in range(len(self._segments)))

    monkeypatch.setattr(Client, "_lend", claimed)
    cluster = Cluster(job(), tmp_path, tcp=True)
    assert cluster.train(2).weights_sha256 == solo
    assert near == [False, False]


def test_memory_of_another_process_is_seen_until_it_is_given_back() -> None:
    program = (
        "import sys, numpy as np\n"
        "from dptrain.exchange.parameter_server import lending\n"
        "rows, kept = lending.rows(2, 3, np.float32)\n"
        "rows[:] = [[1, 2, 3], [4, 5, 6]]\n"
        "sys.stdout.buffer.write(kept.told.SerializeToString()); sys.stdout.flush()\n"
        "sys.stdin.read()\n"
    )
    line = [sys.executable, "-c", program]
    with subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        told = pb.Memory.FromString(process.stdout.read1(1 << 16))  # type: ignore[attr-defined]
        seen = look(told)
        process.stdin.close()
    assert told.process == process.pid
    assert seen is not None
    assert seen.view(np.float32).tolist() == [1, 2, 3, 4, 5, 6]
    assert not seen.flags.writeable
    assert look(told) is None


def test_nothing_else_is_opened(tmp_path: Path) -> None:
    _, kept, _ = lent()
    told = kept.told

    def of(handle: int) -> pb.Memory:
        found = os.fstat(handle)
        return pb.Memory(
            process=os.getpid(), handle=handle, device=found.st_dev, number=found.st_ino, bytes=found.st_size
        )

    def changed(**fields: int) -> pb.Memory:
        other = pb.Memory()
        other.CopyFrom(told)
        for name, value in fields.items():
            setattr(other, name, value)
        return other

    assert look(told) is not None
    for fields in ({"number": told.number + 1}, {"device": 0}, {"bytes": told.bytes - 1}, {"handle": 1 << 30}):
        assert look(changed(**fields)) is None, fields
    plain = tmp_path / "plain"
    plain.write_bytes(b"1234")
    short = os.memfd_create("short")
    os.ftruncate(short, 4)
    pipe = os.pipe()
    handles = [os.open(plain, os.O_RDONLY), short, *pipe]
    try:
        # A file that may become shorter would end who reads it.
        assert [look(of(handle)) for handle in handles] == [None] * 4
    finally:
        for handle in handles:
            os.close(handle)


def push(vector: Array, cuts: list[tuple[int, int]], kept: Lent) -> Piece:
    """The message of these chunks."""
    lo, hi = cuts[0][0], cuts[-1][1]
    place = pb.Place(lease=1, lo=0, hi=1, offset=lo, total=SIZE, encoding=pb.ENCODING_RAW)
    where = kept.where(vector[lo:hi])
    assert where is not None
    return decode_push(codec.lent(place, [vector[start:stop] for start, stop in cuts], where))


@pytest.mark.parametrize("many", [True, False], ids=["one message", "a message each"])
def test_partials_that_were_written_over_are_asked_for_again(many: bool) -> None:
    (vector,), kept, seen = lent()
    vector[:] = np.arange(SIZE)
    intake = Intake(0, 0, SIZE, np.float32, Written(RAW, SIZE))
    box = intake.expect(1, 1, 1, [Node(0, 1)])
    cuts = codec.cuts(SIZE, 4)

    def sent(*messages: list[tuple[int, int]]) -> list[Piece]:
        """The chunks that they stand for; none of the messages has any bytes."""
        pieces = [push(vector, some, kept) for some in messages]
        assert not any(len(piece.data) for piece in pieces)
        return [one for piece in pieces for one in intake.looked_at(piece, seen)]

    pieces = sent(cuts) if many else sent(*[[cut] for cut in cuts])
    vector[cuts[1][0]] = -1
    outcomes = [intake.take(piece)[0] for piece in pieces]
    assert outcomes == [pb.OUTCOME_UNSPECIFIED, pb.OUTCOME_DAMAGED, pb.OUTCOME_UNSPECIFIED]
    vector[cuts[1][0]] = cuts[1][0]
    again = sent([cuts[1]], [cuts[2]])
    assert [intake.take(piece)[0] for piece in again] == [pb.OUTCOME_COMPLETE, pb.OUTCOME_DUPLICATE]
    assert box.vectors[0].tolist() == list(range(SIZE))


def test_more_chunks_than_one_message_tells_of() -> None:
    size = (codec.TOGETHER + 1) * codec.CHUNK // 4
    vectors, kept, seen = lent(1, size)
    vectors[0] = np.arange(size)
    outlet = Outlet(1, 0, 0, size, lent=kept)
    listening = outlet.listen(1, looks=True)
    outlet.publish(vectors[0], 3)
    outlet.close()
    messages = list(listening)
    assert len(messages) == 2
    weights = Weights(np.zeros(size, np.float32), 1, [(0, size)])
    weights.look(0, seen)
    for message in messages:
        weights.take(0, decode_pull(message))
    with weights.lock:
        assert weights.wait((3, False))
    assert weights.vector.tobytes() == vectors[0].tobytes()


def test_weights_that_were_written_over_are_not_taken() -> None:
    vectors, kept, seen = lent(2)
    vectors[0] = 1
    outlet = Outlet(1, 0, 0, SIZE, lent=kept)
    listening = outlet.listen(1, looks=True)
    outlet.publish(vectors[0], 3)
    late = outlet.listen(2, looks=True)
    far = outlet.listen(3)
    outlet.close()
    weights = Weights(np.zeros(SIZE, np.float32), 1, [(0, SIZE)])
    for messages in (listening, late, far):
        chunks = [decode_pull(message) for message in messages]
        assert any(len(piece.data) for piece in chunks) == (messages is far)
    with pytest.raises(RefusedError):
        weights.take(0, decode_pull(next(iter(_published(vectors[0], kept)))))
    weights.look(0, seen)
    (message,) = (decode_pull(message) for message in _published(vectors[0], kept))
    vectors[0, -1] = 2
    with pytest.raises(Damaged):
        weights.take(0, message)
    vectors[0, -1] = 1
    weights.take(0, message)
    with weights.lock:
        assert weights.wait((3, False))
    assert set(weights.vector.tolist()) == {1.0}


def _published(vector: Array, kept: Lent) -> list[bytes]:
    outlet = Outlet(1, 0, 0, SIZE, lent=kept)
    listening = outlet.listen(1, looks=True)
    outlet.publish(vector, 3)
    outlet.close()
    return list(listening)


def _where(**fields: int) -> Spoil:
    def spoil(chunk: pb.PushRequest) -> bytes:
        for name, value in fields.items():
            setattr(chunk.place.lent, name, value)
        return chunk.SerializeToString()

    return spoil


def _following(make: Callable[[list[int]], list[int]]) -> Spoil:
    def spoil(chunk: pb.PushRequest) -> bytes:
        following = make(list(chunk.place.lent.following))
        del chunk.place.lent.following[:]
        chunk.place.lent.following.extend(following)
        return chunk.SerializeToString()

    return spoil


def _full(chunk: pb.PushRequest) -> bytes:
    chunk.data = bytes(chunk.place.lent.bytes)
    return chunk.SerializeToString()


def _rounded(chunk: pb.PushRequest) -> bytes:
    chunk.place.encoding = pb.ENCODING_BFLOAT16
    return chunk.SerializeToString()


SPOILT: dict[str, Spoil] = {
    "behind the end": _where(at=(1 << 64) - 1),
    "longer than the memory": _where(bytes=1 << 40),
    "shorter than the chunk": _where(bytes=4),
    "nothing": _where(bytes=0),
    "elsewhere": _where(at=4),
    "a chunk too many": _following(lambda checksums: [*checksums, 1]),
    "many chunks too many": _following(lambda checksums: [1] * 1000),
    "with bytes of its own": _full,
    "rounded": _rounded,
}


@pytest.mark.parametrize("name", SPOILT)
def test_a_chunk_that_says_a_wrong_place_changes_nothing(
    name: str, solo: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = type("One", (Hostile,), {"spoilt": (SPOILT[name],), "_lend": Client._lend})
    monkeypatch.setattr("dptrain.exchange.parameter_server.client.Client", one)
    cluster = Cluster(job(), tmp_path)
    assert cluster.train(2).weights_sha256 == solo
    assert cluster.codes == [0, 0]
