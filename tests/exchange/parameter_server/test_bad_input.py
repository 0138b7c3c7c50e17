"""What a parameter server may be sent in the middle of a run. None of it ends the run or moves a bit."""

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from dptrain.errors import NonFiniteError
from dptrain.exchange.parameter_server.client import Client, Stub
from dptrain.exchange.parameter_server.codec import decode_pull, encode
from dptrain.exchange.parameter_server.hub import Hub, Part
from dptrain.exchange.parameter_server.outlet import Outlet
from dptrain.exchange.parameter_server.service import METHODS, SERVICE
from dptrain.job.load import check, complete
from dptrain.job.spec import Job
from dptrain.nn.accumulate import Partials
from dptrain.training import run
from dptrain.v1 import parameter_server_pb2 as pb
from dptrain.wire.address import parse
from dptrain.wire.channel import connect
from dptrain.wire.security import Calling, Serving
from dptrain.wire.tokens import Role, TokenFile, fresh
from tests.exchange.parameter_server.running import Cluster
from tests.exchange.parameter_server.test_run import CONTENT, job

Spoil = Callable[[pb.PushRequest], bytes]


def _changed(**fields: Any) -> Spoil:
    def spoil(chunk: pb.PushRequest) -> bytes:
        for name, value in fields.items():
            setattr(chunk.place, name, value)
        return chunk.SerializeToString()

    return spoil


def _of(**fields: Any) -> Spoil:
    def spoil(chunk: pb.PushRequest) -> bytes:
        for name, value in fields.items():
            setattr(chunk.place.membership, name, value)
        return chunk.SerializeToString()

    return spoil


def _data(make: Callable[[bytes], bytes], *, summed: bool = True) -> Spoil:
    """Other bytes; where ``summed``, with a checksum that is theirs."""

    def spoil(chunk: pb.PushRequest) -> bytes:
        data = make(chunk.data)
        if not summed:
            chunk.data = data
            return chunk.SerializeToString()
        return encode(chunk.place, np.frombuffer(data, np.uint8))

    return spoil


SPOILT: dict[str, Spoil] = {
    "too short": _data(lambda data: data[:-4]),
    "no whole element": _data(lambda data: data[:-1]),
    "too long": _data(lambda data: data + bytes(4)),
    "empty": _data(lambda data: b""),
    "a flipped bit": _data(lambda data: bytes([data[0] ^ 1]) + data[1:], summed=False),
    "a wrong checksum": _changed(checksum=1),
    "beside its place": _changed(offset=1),
    "behind the end": _changed(offset=1 << 60),
    "another vector": _changed(total=7),
    "another segment": _changed(segment=9),
    "no node": _changed(lo=1, hi=1),
    "another node": _changed(lo=0, hi=4096),
    "an unknown encoding": _changed(encoding=99),
    "no encoding": _changed(encoding=0),
    "a step that is over": _changed(step=(1 << 64) - 1),
    "a lease of nobody": _changed(lease=1 << 63),
    "another job": _of(job=1),
    "an older membership": _of(epoch=1),
    "nobody": _of(worker=0),
    "NaN, of somebody else": lambda chunk: _data(lambda data: b"\xff" * len(data))(
        pb.PushRequest.FromString(_of(worker=99)(chunk))
    ),
}


class Hostile(Client):
    """Sends, before every chunk of its own, what it should not; and each of its own twice, the last one first."""

    spoilt: tuple[Spoil, ...] = tuple(SPOILT.values())

    def _lend(self) -> None:
        """Chunks have their bytes with them."""

    def _push(self, task: pb.Compute, partials: Partials) -> None:
        held: list[Any] = []
        chunks = self._chunks[0]
        put, queue = chunks.queue.put, chunks.queue

        class Held:
            def put(self, message: Any) -> None:
                held.append(message)

            def get(self) -> Any:
                # The stream's own thread may look here before it waits there.
                return queue.get()

        chunks.queue = Held()  # type: ignore[assignment]
        try:
            super()._push(task, partials)
        finally:
            chunks.queue = queue
        ready = [message() for message in held]
        for number, message in enumerate(reversed(ready)):
            spoil = self.spoilt[(task.lease + number) % len(self.spoilt)]
            put(spoil(pb.PushRequest.FromString(message)))
            put(message)
            put(message)


@pytest.mark.parametrize("name", SPOILT)
def test_a_spoilt_chunk_changes_nothing(
    name: str,
    solo: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Before the right one, and the right ones reordered and each sent twice."""
    one = type("One", (Hostile,), {"spoilt": (SPOILT[name],)})
    monkeypatch.setattr("dptrain.exchange.parameter_server.client.Client", one)
    cluster = Cluster(job(), tmp_path)
    result = cluster.train(2)
    assert result.weights_sha256 == solo
    assert cluster.codes == [0, 0]


def attacked(tmp_path: Path, attack: Callable[[grpc.Channel], None]) -> str:
    """The hash of a run whose server is attacked as soon as it listens, and until the attack is over."""
    cluster = Cluster(job(), tmp_path)
    failed: list[BaseException] = []

    def go() -> None:
        try:
            with connect(parse(cluster.address)) as channel:
                attack(channel)
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=go)

    def ready() -> None:
        thread.start()
        thread.join(60)

    result = cluster.train(2, ready=ready)
    assert not failed, failed
    assert cluster.codes == [0, 0]
    return result.weights_sha256


def raw(channel: grpc.Channel, method: str) -> Any:
    kind = "unary_unary" if method in ("GetJob", "Join", "Lend", "Leave") else "stream_stream"
    return getattr(channel, kind)(f"/{SERVICE}/{method}")


def sent(channel: grpc.Channel, method: str, data: bytes, **more: Any) -> grpc.StatusCode:
    """How a call with one message ends."""
    call = raw(channel, method)
    try:
        if method in ("GetJob", "Join", "Lend", "Leave"):
            call(data, timeout=20, **more)
        else:
            list(call(iter([data]), timeout=20, **more))
    except grpc.RpcError as error:
        return error.code()
    return grpc.StatusCode.OK


def test_messages_that_are_none_too_large_or_compressed(solo: str, tmp_path: Path) -> None:
    def attack(channel: grpc.Channel) -> None:
        # A server that has no standby refuses whoever follows it before it reads a message.
        malformed = b"\x0a\xff\xff\xff\xff\x0f"
        assert sent(channel, "Follow", malformed) is grpc.StatusCode.PERMISSION_DENIED
        for method in set(METHODS) - {"Follow"}:
            assert sent(channel, method, malformed) is grpc.StatusCode.INVALID_ARGUMENT
            assert sent(channel, method, bytes(64 << 20)) is grpc.StatusCode.RESOURCE_EXHAUSTED
            gzip = grpc.Compression.Gzip
            # The last is small on the wire: a bomb.
            size = 64 << 20 if method == "Push" else 4 << 20
            assert sent(channel, method, bytes(size), compression=gzip) is grpc.StatusCode.UNIMPLEMENTED

    assert attacked(tmp_path, attack) == solo


def test_streams_without_a_message_and_of_strangers(solo: str, tmp_path: Path) -> None:
    def attack(channel: grpc.Channel) -> None:
        stranger = pb.Membership(job=3, epoch=5, worker=1)
        for method, message in (("Work", pb.WorkRequest), ("Pull", pb.PullRequest)):
            with pytest.raises(grpc.RpcError) as refused:
                list(raw(channel, method)(iter(()), timeout=20))
            assert refused.value.code() is grpc.StatusCode.PERMISSION_DENIED
            said = message(membership=stranger).SerializeToString()
            assert sent(channel, method, said) is grpc.StatusCode.PERMISSION_DENIED
        assert sent(channel, "Leave", pb.LeaveRequest(membership=stranger).SerializeToString()) is grpc.StatusCode.OK

    assert attacked(tmp_path, attack) == solo


def test_clients_that_vanish_or_never_read(solo: str, tmp_path: Path) -> None:
    place = pb.Place(membership=pb.Membership(job=1, epoch=1, worker=1), total=4, encoding=pb.ENCODING_RAW)
    chunk = encode(place, np.zeros(1 << 16, np.float32))

    def pour() -> Iterator[bytes]:
        for _ in range(200):
            yield chunk

    def attack(channel: grpc.Channel) -> None:
        held = [raw(channel, "Push")(pour()) for _ in range(4)]
        next(iter(held[0]))
        for call in held[:2]:
            call.cancel()
        with connect(parse(f"unix:{tmp_path}/server-0.sock")) as other:
            left = raw(other, "Push")(pour())
            next(iter(left))

    assert attacked(tmp_path, attack) == solo


def test_of_who_never_reads_nothing_is_kept_but_the_newest_weights() -> None:
    outlet = Outlet(1, 0, 0, 4)
    with_nothing, late = outlet.listen(0), None
    for step in range(100):
        outlet.publish(np.full(4, step, np.float32), step)
        late = late or outlet.listen(1)
    outlet.close()
    for listening in (with_nothing, late, outlet.listen(2)):
        assert listening is not None
        assert [decode_pull(message).place.step for message in listening] == [99]


def test_a_member_that_never_reads_its_weights(solo: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has joined as a worker does; it never asks for work either."""
    identity: dict[str, str] = {}
    admit = Hub.admit

    def noted(self: Hub, part: Part) -> None:
        identity.update(part.identity)
        admit(self, part)

    monkeypatch.setattr(Hub, "admit", noted)
    held: list[Any] = []

    class Joins(Client):
        """A worker that lets another join before its own first step."""

        def _push(self, task: pb.Compute, partials: Partials) -> None:
            if not held:
                channel = connect(parse(cluster.address))
                stub = Stub(channel)
                request = pb.JoinRequest(
                    job_sha256=identity["job"], data_digest=identity["data"], fingerprint=identity["fingerprint"]
                )
                membership = stub.join(request, timeout=20).membership
                asked = pb.PullRequest(membership=membership).SerializeToString()
                held.extend([channel, raw(channel, "Pull")(iter([asked]))])
            super()._push(task, partials)

    monkeypatch.setattr("dptrain.exchange.parameter_server.client.Client", Joins)
    cluster = Cluster(job(), tmp_path)
    try:
        assert cluster.train(1).weights_sha256 == solo
    finally:
        held[0].close()
    assert cluster.codes == [0]


class Poisonous(Client):
    """Worker 2 sends NaN, or an infinite number, or a loss that is NaN, at three of the steps."""

    def _push(self, task: pb.Compute, partials: Partials) -> None:
        if self._membership.worker == 2:
            vectors = np.asarray(partials.vectors)
            if task.step == 2:
                vectors[-1, 5] = np.nan
            elif task.step == 3:
                vectors[0] = np.inf
            elif task.step == 4:
                partials.tallies[0, 1] = np.nan
        super()._push(task, partials)


@pytest.mark.parametrize("bad", [2, 3, 4])
def test_gradients_with_nan_of_a_worker_are_computed_by_another(
    bad: int, solo: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    class Once(Poisonous):
        def _push(self, task: pb.Compute, partials: Partials) -> None:
            if task.step == bad and self._membership.worker == 2:
                seen.append(task.lease)
                return super()._push(task, partials)
            return Client._push(self, task, partials)

    monkeypatch.setattr("dptrain.exchange.parameter_server.client.Client", Once)
    cluster = Cluster(job(), tmp_path)
    assert cluster.train(2).weights_sha256 == solo
    assert cluster.codes == [0, 0]
    assert seen


def test_a_job_whose_gradients_are_not_finite_fails_as_it_does_alone(tmp_path: Path) -> None:
    it = complete(check({**CONTENT, "optimizer": {"lr": 1e38}}, ""))
    with pytest.raises(NonFiniteError) as alone:
        run(it, run_dir=tmp_path / "solo")
    with pytest.raises(NonFiniteError) as served:
        Cluster(it, tmp_path).train(2)
    assert str(served.value) == str(alone.value)


@pytest.mark.parametrize("method", METHODS)
def test_no_method_without_a_token_for_it(method: str, tmp_path: Path) -> None:
    file = TokenFile(tmp_path / "tokens.json")
    read, worker = file.create("reads", Role.read), file.create("works", Role.worker)
    codes: dict[str, grpc.StatusCode] = {}
    cluster = Cluster(job(steps=1), tmp_path)

    def ready() -> None:
        for name, token in (("none", None), ("wrong", fresh()), ("read", read)):
            with connect(parse(cluster.address), Calling(token)) as channel:
                codes[name] = sent(channel, method, b"")
        cluster.worker(calling=Calling(worker))

    cluster.train(0, ready=ready, serving=Serving(TokenFile(tmp_path / "tokens.json")))
    assert codes == {
        "none": grpc.StatusCode.UNAUTHENTICATED,
        "wrong": grpc.StatusCode.UNAUTHENTICATED,
        "read": grpc.StatusCode.PERMISSION_DENIED,
    }


def overflowing(folder: Path, **train: object) -> Job:
    """The gradient of two rows of every other batch is finite, and that of both isn't; their losses are."""
    random = np.random.default_rng(5)
    x = random.standard_normal((40, 6)).astype(np.float32)
    x[[3, 12], 0] = 3e38
    y = random.integers(0, 3, 40)
    y[[3, 12]] = 2
    np.savez(folder / "rows.npz", x=x, y=y)
    content = {
        "seed": 1,
        "data": {"source": str(folder / "rows.npz"), "validation": 0.0, "test": 0.0, "shuffle": False},
        "model": {"layers": [{"type": "linear", "units": 3}]},
        "train": {"steps": 6, "batch_size": 20, "shards": 20, "evaluate_steps": 0, "result": "last", **train},
    }
    return complete(check(content, ""))


@pytest.mark.parametrize(("workers", "processes"), [(3, 1), (1, 1), (1, 3)])
def test_a_sum_that_overflows_moves_no_bit_whoever_adds_it_up(workers: int, processes: int, tmp_path: Path) -> None:
    it = overflowing(tmp_path, non_finite="skip")
    alone = run(it, run_dir=tmp_path / "solo")
    lines = [json.loads(line) for line in (tmp_path / "solo" / "journal.jsonl").read_text().splitlines()]
    assert sum(line.get("skipped", 0) for line in lines) == 3
    cluster = Cluster(it, tmp_path)

    def ready() -> None:
        for _ in range(workers):
            cluster.worker(processes=processes)

    assert cluster.train(ready=ready).weights_sha256 == alone.weights_sha256
    assert cluster.codes == [0] * workers


def test_a_sum_that_overflows_ends_a_run_and_its_workers(tmp_path: Path) -> None:
    cluster = Cluster(overflowing(tmp_path), tmp_path)
    with pytest.raises(NonFiniteError):
        cluster.train(2)
    assert cluster.codes == [NonFiniteError.exit_code] * 2
