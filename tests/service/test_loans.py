"""A run directory on the server's machine, written by a worker's side of it over a real server and a real carrier."""

import errno
import json
import os
import socket
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dptrain import afar, appended, checkpoint, rundir, sockets, supervision
from dptrain.afar import CHUNK, FarPath, Line
from dptrain.errors import NotFoundError, StorageError
from dptrain.journal import Journal, read_all
from dptrain.layout import Layout
from dptrain.service.carrier import Carrier, brought
from dptrain.service.loans import Loan
from dptrain.service.server import TOKENS, JobServer
from dptrain.state import State
from dptrain.v1 import agent_service_pb2 as pb
from dptrain.v1 import agent_service_pb2_grpc
from dptrain.wire.channel import connect
from dptrain.wire.security import Calling
from dptrain.wire.statuses import told
from dptrain.wire.tokens import Role, TokenFile


def ask(asked: Mapping[str, Any], data: bytes = b"") -> None:
    with closing(Line()) as line:
        line.ask(asked, data)


class Lent:
    """A loan, the run directory that it is of, and what workers reach it by."""

    def __init__(self, server: JobServer, place: Path) -> None:
        self.server, self.root, self.told = server, place / "server" / "run", place / "told"
        self.told.mkdir()
        (place / "server").mkdir()
        (place / "node").mkdir()
        self.node = place / "node"
        self.loan = self.lend()
        token = TokenFile(place / "data" / TOKENS).create("node", Role.worker)
        self.channel = connect(server.address, Calling(token))
        self.stub = agent_service_pb2_grpc.AgentServiceStub(self.channel)
        self.calls: list[Any] = []

    def lend(self, *files: Path) -> Loan:
        said = {"name": "run", "root": str(self.root), "files": list(map(str, files)), "job": {"name": "x"}}
        loan = self.server.loans.lend(said)
        loan.begin(self.told)
        return loan

    def carry(self, asked: Iterator[pb.CarryRequest]) -> Iterator[pb.CarryResponse]:
        call = self.stub.Carry(asked)
        self.calls.append(call)
        with told(self.server.address):
            yield from call

    def fetch(self, digest: str) -> Iterator[bytes]:
        with told(self.server.address):
            for part in self.stub.FetchFile(pb.FetchFileRequest(sha256=digest)):
                yield part.data


@pytest.fixture
def lent(serve: Callable[..., JobServer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Lent]:
    """This process is a worker of a node, and chief."""
    made = Lent(serve(agents=True), tmp_path)
    monkeypatch.setenv(afar.FOLDER, str(made.node))
    monkeypatch.setattr(afar._Standing, "epoch", None)
    with Carrier(made.node, made.loan.ticket, made.carry, b"{}", {}):
        afar.renew(0, 0)
        afar.claim()
        yield made
        afar._LINE.close()
    made.channel.close()


def test_files_are_made_read_renamed_and_removed_there(lent: Lent) -> None:
    run = afar.place("run")
    assert isinstance(run, FarPath)
    assert not run.exists()
    assert rundir.claim(run, resume=False) == run
    (run / "a" / "b").mkdir()
    content = os.urandom(3 * CHUNK + 5)
    (run / "a" / "b" / "part").write_whole([memoryview(content[:7]), memoryview(content[7:])])
    (run / "a" / "b" / "part").rename(run / "whole")
    assert (lent.root / "whole").read_bytes() == (run / "whole").read_bytes() == content
    assert supervision.identity(run / "whole") == supervision.identity(lent.root / "whole")
    assert sorted(path.name for path in run.iterdir()) == ["a", "whole"]
    assert (run / "a").is_dir()
    assert (run / "whole").is_file()
    rundir.write_json(run / rundir.RESULT, {"state": "done"})
    assert rundir.read_json(lent.root / rundir.RESULT) == {"state": "done"}
    (run / "a").remove()
    (run / "whole").unlink()
    assert [path.name for path in lent.root.iterdir()] == [rundir.RESULT]
    with pytest.raises(FileNotFoundError):
        (run / "whole").read_bytes()


def test_what_a_far_path_can_t_do_fails_loudly(lent: Lent) -> None:
    with pytest.raises(TypeError, match="a path of another machine"):
        open(afar.place("run") / "x")  # noqa: SIM115
    with pytest.raises(TypeError, match="a path of another machine"):
        (afar.place("run") / "x").touch()


@pytest.mark.parametrize("path", ["run/../other", "other", "/etc/passwd", "run/a/../../x", "", "run/\0"])
def test_no_path_leads_out_of_the_run_directory(lent: Lent, path: str) -> None:
    lent.root.mkdir()
    for do in ("stat", "list", "read", "end", "mkdir", "remove", "sync"):
        with pytest.raises(OSError, match="something else"):
            ask({"do": do, "path": path, "at": 0})
    with pytest.raises(OSError, match="something else"):
        ask({"do": "rename", "path": "run", "to": path})
    with pytest.raises(OSError, match="something else"):
        ask({"do": "write", "path": path, "at": 0, "total": 1, "crc": zlib.crc32(b"x")}, b"x")


def test_a_root_is_not_removed_and_no_link_is_followed(lent: Lent, tmp_path: Path) -> None:
    lent.root.mkdir()
    with pytest.raises(OSError, match="something else"):
        FarPath("run").remove()
    (tmp_path / "secret").write_text("x")
    (lent.root / "link").symlink_to(tmp_path / "secret")
    with pytest.raises(OSError, match="symbolic"):
        ask({"do": "append", "path": "run/link", "at": 1, "crc": zlib.crc32(b"y")}, b"y")
    assert (tmp_path / "secret").read_text() == "x"


@pytest.mark.parametrize("asked", [{}, {"do": "format"}, {"do": "write"}, {"do": "tell", "name": "x"}, {"do": []}])
def test_what_is_no_request_is_told_so(lent: Lent, asked: dict[str, Any]) -> None:
    with pytest.raises(OSError, match="it was asked for something else"):
        ask(asked)


def test_checkpoints_have_one_code_for_both(lent: Lent) -> None:
    layout = Layout([("w", (1000, 300)), ("b", (7,))])
    weights = np.random.default_rng(1).standard_normal(layout.size).astype(np.float32)
    folder = afar.place("run") / rundir.CHECKPOINTS
    for step in (1, 2, 3, 3):
        state = State(step, step, weights, [], 0)
        checkpoint.save(folder, checkpoint.Snapshot.of(state, None, (), {}), layout)
    checkpoint.prune(folder, 2)
    near = checkpoint.generations(lent.root / rundir.CHECKPOINTS)
    assert [one.name for one in near] == [one.name for one in checkpoint.generations(folder)]
    assert list(map(checkpoint.step_of, near)) == [3, 2]
    for one in (near[0], checkpoint.generations(folder)[0]):
        np.testing.assert_array_equal(checkpoint.read(one, layout).groups["weights"], weights)
    # A broken one is passed over and set aside, over there.
    (near[0] / checkpoint.STATE).write_bytes(b"")
    said: list[str] = []
    snapshot = checkpoint.newest(folder, lambda one: checkpoint.read(one, layout), said.append)
    assert snapshot is not None
    assert (snapshot.manifest["step"], len(said)) == (2, 1)
    (folder / ".writing-x").mkdir()
    checkpoint.clean(folder)
    names = {path.name for path in (lent.root / rundir.CHECKPOINTS).iterdir()}
    assert names == {near[1].name, f"broken-{near[0].name}"}


def test_lines_are_appended_in_order_and_a_torn_one_is_ended(lent: Lent) -> None:
    lent.root.mkdir()
    (lent.root / "journal.jsonl").write_bytes(b'{"step":1,"attempt":1}\n{"st')
    journal = Journal(afar.place("run") / "journal.jsonl")
    assert journal.attempt == 2
    for step in range(2000):
        journal.write({"step": step})
    journal.close()
    lines = read_all(lent.root / "journal.jsonl")
    assert [line["step"] for line in lines if line["attempt"] == 2] == list(range(2000))
    journal.close()


def test_a_broken_connection_is_made_again_and_goes_on(lent: Lent) -> None:
    lent.root.mkdir()
    content = os.urandom(40 * CHUNK)
    end = appended.opened(afar.place("run") / "lines")

    def pieces() -> Iterator[memoryview]:
        for at in range(0, len(content), CHUNK):
            end.write(content[at : at + 1000])
            if at % (7 * CHUNK) == 0:
                for call in lent.calls:
                    call.cancel()
            yield memoryview(content)[at : at + CHUNK]

    far = afar.place("run") / "part"
    # All at once they would be gathered before the first is sent.
    requests = (
        ({"do": "write", "path": str(far), "at": i * CHUNK, "total": len(content), "crc": zlib.crc32(piece)}, piece)
        for i, piece in enumerate(pieces())
    )
    with closing(Line()) as line:
        assert len(list(line.all(requests))) == 40
    end.close()
    assert (lent.root / "part").read_bytes() == content
    assert (lent.root / "lines").read_bytes() == b"".join(content[i * CHUNK :][:1000] for i in range(40))
    assert len(lent.calls) > 4


def test_requests_may_come_twice(lent: Lent) -> None:
    run = afar.place("run")
    run.mkdir()
    run.mkdir()
    (run / "a").write_whole([memoryview(b"x")])
    (run / "a").rename(run / "b")
    (run / "a").rename(run / "b")
    (run / "a").remove()
    line = Line()
    for at, data in ((0, b"one"), (0, b"one"), (3, b"two"), (0, b"onetwo"), (2, b"etwo!")):
        line.ask({"do": "append", "path": "run/lines", "at": at, "crc": zlib.crc32(data)}, data)
    assert (lent.root / "lines").read_bytes() == b"onetwo!"
    for at, data in ((0, b"other"), (9, b"x")):
        with pytest.raises(OSError, match="another wrote to it"):
            line.ask({"do": "append", "path": "run/lines", "at": at, "crc": zlib.crc32(data)}, data)
    with pytest.raises(OSError, match="checksum"):
        line.ask({"do": "append", "path": "run/lines", "at": 7, "crc": 1}, b"x")
    with pytest.raises(OSError, match="reads back differently"):
        line.ask({"do": "settle", "path": "run/lines", "total": 7, "sha256": "0" * 64})
    line.close()


def test_nobody_writes_under_an_epoch_that_is_over(lent: Lent) -> None:
    lent.root.mkdir()
    run = afar.place("run")
    rundir.write_json(run / "a", {"by": "first"})
    journal = Journal(run / "journal.jsonl")
    # Another worker has taken over after a recovery.
    afar.renew(1, 2)
    rundir.take_over()
    rundir.write_json(run / "a", {"by": "second"})
    # The first goes on as if nothing had been.
    afar.renew(0, 0)
    with pytest.raises(StorageError, match="others lead this run since"):
        rundir.write_json(run / "a", {"by": "first"})
    with pytest.raises(StorageError, match="others lead this run since"):
        rundir.take_over()
    journal.write({"step": 1})
    with pytest.raises(StorageError, match="others lead this run since"):
        journal.close()
    with pytest.raises(OSError, match="others lead this run since"):
        afar.tell(supervision.FAILURE, {"code": 1, "error": "cut off"})
    # So does the other side of a split, with as many recoveries as the one that came first.
    afar.renew(1, 3)
    with pytest.raises(StorageError, match="others lead this run since"):
        rundir.take_over()
    assert rundir.read_json(lent.root / "a") == {"by": "second"}
    assert (lent.root / "journal.jsonl").read_bytes() == b""
    assert not (lent.told / supervision.FAILURE).exists()
    # It is the same one that asks again; and a later one may.
    afar.renew(1, 2)
    rundir.take_over()
    afar.renew(2, 5)
    rundir.take_over()


def test_nobody_writes_when_the_launch_is_over(lent: Lent) -> None:
    run = afar.place("run")
    (run / "x").mkdir()
    lent.server.loans.end(lent.loan)
    # Over a connection that was there before, and over a new one.
    with pytest.raises(OSError, match="this launch is over"):
        (run / "y").mkdir()
    with pytest.raises(NotFoundError, match="found that it is over"):
        list(lent.carry(iter([pb.CarryRequest(ticket=lent.loan.ticket)])))
    with pytest.raises(NotFoundError, match="found that it is over"):
        list(lent.carry(iter([pb.CarryRequest(ticket="guessed")])))
    assert not (lent.root / "y").exists()


def test_what_workers_tell_goes_to_the_supervisor_by_its_own_clock(lent: Lent, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(supervision.FOLDER, "/of/another/machine")
    lent.root.mkdir()
    supervision.opened(afar.place("run"), 3, 7)
    supervision.opened(afar.place("run"), 4, 8)
    run = json.loads((lent.told / supervision.RUN).read_text())
    assert run == {"run_dir": "run", "attempt": 3, "step": 7, "result": None}
    supervision.failed(2, "bad")
    assert json.loads((lent.told / supervision.FAILURE).read_text()) == {"code": 2, "error": "bad"}
    supervision.lost("gone")
    assert json.loads((lent.told / supervision.LOST).read_text()) == {"error": "gone"}
    now = time.time()
    # A node whose clock is hours behind.
    afar.tell(supervision.ENDED, {"rank": 1, "time": now - 7200}, added=True)
    afar.tell(supervision.ENDED, {"rank": 2, "time": now + 7200}, added=True)
    lines = [json.loads(line) for line in (lent.told / supervision.ENDED).read_text().splitlines()]
    assert [line["rank"] for line in lines] == [1, 2]
    assert all(abs(line["time"] - now) < 60 for line in lines)


def test_a_full_disk_there_is_to_the_journal_what_one_here_is(lent: Lent, monkeypatch: pytest.MonkeyPatch) -> None:
    lent.root.mkdir()
    journal = Journal(afar.place("run") / "journal.jsonl")
    # What was there is a folder now: nothing can be written.
    (lent.root / "journal.jsonl").unlink()
    (lent.root / "journal.jsonl").mkdir()
    refused: list[int] = []
    until = time.monotonic() + 30
    for step in range(10**6):
        try:
            journal.write({"step": step})
        except StorageError:
            refused.append(step)
            break
        assert time.monotonic() < until
        time.sleep(0.001)
    (lent.root / "journal.jsonl").rmdir()
    # As soon as there is room, what was taken goes there, and what was refused is taken.
    while refused:
        assert time.monotonic() < until
        try:
            journal.write({"step": refused[0]})
            refused.pop()
        except StorageError:
            time.sleep(0.01)
    journal.close()
    assert [line["step"] for line in read_all(lent.root / "journal.jsonl")] == list(range(step + 1))


def test_files_of_a_job_are_brought_once(lent: Lent, tmp_path: Path) -> None:
    source = tmp_path / "server" / "data"
    source.mkdir()
    for name in ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "notes"):
        (source / name).write_text(name)
    (tmp_path / "server" / "model.py").write_text("x = 1")
    files = [source / "train-images-idx3-ubyte", tmp_path / "server" / "model.py", source]
    loan = lent.lend(*files)
    job, found = brought(loan.ticket, lent.carry, lent.fetch, tmp_path / "cache")
    assert json.loads(job) == {"name": "x"}
    images = Path(found[str(files[0])])
    assert images.read_text() == "train-images-idx3-ubyte"
    assert (images.parent / "train-labels-idx1-ubyte").exists()
    assert not (images.parent / "notes").exists()
    assert Path(found[str(files[1])]).read_text() == "x = 1"
    assert sorted(path.name for path in Path(found[str(source)]).iterdir()) == sorted(os.listdir(source))
    calls = len(lent.calls)
    assert brought(loan.ticket, lent.carry, lent.fetch, tmp_path / "cache")[1] == found
    assert len(lent.calls) == calls + 1


def test_who_is_not_answered_waits_no_longer_than_its_patience(
    lent: Lent, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(afar, "PATIENCE", 0.2)
    monkeypatch.setenv(afar.FOLDER, str(tmp_path))
    with pytest.raises(OSError, match="not reached") as gone:
        ask({"do": "stat", "path": "run"})
    assert gone.value.errno == errno.EHOSTUNREACH
    # One that is there and says nothing.
    monkeypatch.setattr(afar, "SILENCE", 0.2)
    with socket.socket(socket.AF_UNIX) as deaf, sockets.short(tmp_path, afar.SOCKET) as path:
        deaf.bind(path)
        deaf.listen(1)
        with pytest.raises(TimeoutError):
            ask({"do": "stat", "path": "run"})
