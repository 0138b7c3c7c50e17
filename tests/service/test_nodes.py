"""Agents as processes of their own, at a real server."""

import os
import queue
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from dptrain.errors import (
    ArithmeticMismatch,
    DptrainError,
    LaunchError,
    NotFoundError,
    StorageError,
    UnreachableError,
    UsageError,
)
from dptrain.rsh import NODES, parsed
from dptrain.service.agent import use
from dptrain.service.client import Client
from dptrain.service.nodes import REMEMBERED_SECONDS, SILENT_SECONDS, Here, Nodes, NodeState, mpi
from dptrain.service.scheduler import place
from dptrain.service.server import TOKENS, JobServer
from dptrain.service.shipping import CHUNK, Offers, received
from dptrain.v1 import agent_service_pb2 as pb
from dptrain.v1 import agent_service_pb2_grpc, cluster_service_pb2
from dptrain.wire.channel import connect
from dptrain.wire.security import Calling
from dptrain.wire.statuses import told
from dptrain.wire.tokens import Role, TokenFile
from tests.faults.live import until
from tests.service.jobs import JOB

Started = Callable[..., "subprocess.Popen[str]"]


def registration(**changes: Any) -> pb.Registration:
    known = {
        "name": "a",
        "instance": "1",
        "slots": 2,
        "version": version("dptrain"),
        "fingerprint": "x",
        "arithmetic": "native kernels",
        "address": "10.0.0.1",
        "mpi": "MPI 1",
        "python": "/python",
        "host": "h",
    }
    return pb.Registration(**{**known, **changes})


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def nodes(clock: Clock) -> Nodes:
    return Nodes(Here("own", "MPI 1", "/python"), lambda: None, lambda *_, **__: None, clock)


@pytest.mark.parametrize(
    ("changes", "kind", "said"),
    [
        ({"name": ""}, UsageError, "1 to 63 letters"),
        ({"name": "a b"}, UsageError, "1 to 63 letters"),
        ({"name": "-x"}, UsageError, "1 to 63 letters"),
        ({"name": "x" * 64}, UsageError, "1 to 63 letters"),
        ({"name": "own"}, LaunchError, "another name than the server's own machine"),
        ({"version": "0.0.1"}, UsageError, "found dptrain 0.0.1; install the same version on both sides"),
        ({"slots": 0}, UsageError, "1 to 4096 slots, found 0"),
        ({"slots": 1_000_000}, UsageError, "1 to 4096 slots, found 1000000"),
        ({"mpi": "MPI 2"}, LaunchError, "expected MPI 1, as the server, found MPI 2"),
        ({"mpi": ""}, LaunchError, "found no MPI"),
        ({"python": "/other"}, LaunchError, "Python at /python, as on the server"),
        ({"name": "b", "instance": "2", "fingerprint": "y"}, ArithmeticMismatch, "the arithmetic of node a"),
        ({"instance": "2"}, LaunchError, "found a at 10.0.0.1, which is there; give the agent another with --name"),
    ],
)
def test_who_can_t_take_part_is_told_why(
    nodes: Nodes, changes: dict[str, Any], kind: type[DptrainError], said: str
) -> None:
    nodes.join(registration())
    with pytest.raises(kind, match=said):
        nodes.join(registration(**changes))
    assert [view.registration.instance for view in nodes.views()] == ["1"]


def test_a_clock_that_differs_is_told_once_and_shown(clock: Clock) -> None:
    told: list[str] = []
    nodes = Nodes(
        Here("own", "MPI 1", "/python"), lambda: None, lambda _, **said: told.append(str(said)), clock, lambda: 1e9
    )
    node = nodes.join(registration())

    def shown(ahead: float) -> str:
        nodes.hear(node, pb.Health(clock=1e9 + ahead))
        return nodes.views()[0].message

    told.clear()
    assert (shown(0.0), shown(59.0), shown(-59.0), told) == ("", "", "", [])
    assert shown(-18000.0) == "its clock is 5 h 00 min behind the server's: set both, as by NTP"
    assert shown(125.0) == "its clock is 2 min ahead of the server's: set both, as by NTP"
    nodes.drain("a", True)
    assert nodes.views()[0].message.startswith("drained on request; its clock is 2 min ahead")
    assert [line for line in told if "clock" in line] == told[:1]
    assert shown(0.0) == "drained on request"
    assert "its clock is the server's again" in told[-1]
    # One that says nothing of its clock.
    nodes.hear(node, pb.Health())
    assert nodes.views()[0].message == "drained on request"


def test_an_agent_comes_back_in_place_of_its_own_broken_stream(nodes: Nodes) -> None:
    before = nodes.join(registration())
    after = nodes.join(registration(drained=True))
    assert before.told.get_nowait() is None
    # The end of the broken stream, which comes later, is not the node's.
    nodes.leave(before, "broke")
    assert [(view.state, view.registration.drained) for view in nodes.views()] == [(NodeState.DRAINED, True)]
    nodes.leave(after, "broke")
    (lost,) = nodes.views()
    assert (lost.state, lost.message) == (NodeState.LOST, "broke")
    # The name of one that is lost can be had by another.
    nodes.join(registration(instance="3", fingerprint="y"))
    assert [view.state for view in nodes.views()] == [NodeState.READY]


def test_a_node_is_lost_when_it_is_silent_and_forgotten_an_hour_later(nodes: Nodes, clock: Clock) -> None:
    node = nodes.join(registration())
    clock.now = SILENT_SECONDS - 1
    nodes.hear(node, pb.Health(load=0.5))
    clock.now += SILENT_SECONDS - 1
    assert not nodes.silent(node)
    clock.now += 2
    assert nodes.silent(node)
    nodes.leave(node, "silent")
    clock.now += REMEMBERED_SECONDS
    assert [view.health.load for view in nodes.views()] == [0.5]
    clock.now += 1
    assert nodes.views() == []


@pytest.fixture
def server(serve: Callable[..., JobServer]) -> JobServer:
    return serve(agents=True)


@pytest.fixture
def start(server: JobServer, environ: dict[str, str], tmp_path: Path) -> Iterator[Started]:
    """Starts agents of the server."""
    with ExitStack() as left:

        def begin(*arguments: str, before: Sequence[str] = (), **changes: str) -> "subprocess.Popen[str]":
            line = [
                *before,
                sys.executable,
                "-P",
                "-m",
                "dptrain",
                "agent",
                "--server",
                str(server.address),
                *arguments,
            ]
            made = subprocess.Popen(line, env={**environ, **changes}, stderr=subprocess.PIPE, text=True)
            left.callback(made.wait, 30)
            left.callback(made.kill)
            assert made.stderr is not None
            left.callback(made.stderr.close)
            return made

        yield begin


def become(client: Client, name: str, *states: "cluster_service_pb2.NodeState.ValueType | None") -> Any:
    """The node as soon as it is in one of the states; None: it is not there."""
    until = time.monotonic() + 30
    while time.monotonic() < until:
        found = next((node for node in client.nodes() if node.name == name), None)
        if (found.state if found else None) in states:
            return found
        time.sleep(0.02)
    raise AssertionError(client.nodes())


def test_an_agent_takes_part_is_drained_is_lost_and_comes_back(
    client: Client, start: Started, server: JobServer
) -> None:
    agent = start("--name", "a", "--slots", "3")
    ready = become(client, "a", cluster_service_pb2.NODE_STATE_READY)
    assert (ready.slots, ready.address) == (3, "127.0.0.1")
    assert "numpy" in ready.arithmetic
    assert client.drain("a").state == cluster_service_pb2.NODE_STATE_DRAINED
    # Another by that name is told so, and ends.
    other = start("--name", "a")
    assert other.wait(30) == 2
    assert other.stderr is not None
    assert "a name that no other node has" in other.stderr.read()
    # It says itself that it was drained.
    server.nodes.leave(server.nodes._nodes["a"], "test")
    server.nodes._nodes["a"].told.put(None)
    assert become(client, "a", cluster_service_pb2.NODE_STATE_DRAINED).message == "drained on request"
    assert client.resume_node("a").state == cluster_service_pb2.NODE_STATE_READY
    agent.kill()
    assert become(client, "a", cluster_service_pb2.NODE_STATE_LOST).message == "its agent's connection broke"
    # One that is asked to go is not lost.
    polite = start("--name", "a")
    become(client, "a", cluster_service_pb2.NODE_STATE_READY)
    polite.send_signal(signal.SIGTERM)
    assert polite.wait(30) == 0
    become(client, "a", None)
    with pytest.raises(NotFoundError, match="node a"):
        client.drain("a")


def test_a_file_says_whether_an_agent_takes_part(
    client: Client, start: Started, server: JobServer, tmp_path: Path
) -> None:
    ready = tmp_path / "ready"
    ready.touch()
    first = start("--name", "a")
    become(client, "a", cluster_service_pb2.NODE_STATE_READY)
    refused = start("--name", "a", "--ready", str(ready))
    assert refused.wait(30) == 2
    assert not ready.exists()
    # Under Open MPI a machine has one agent.
    first.kill()
    become(client, "a", cluster_service_pb2.NODE_STATE_LOST)
    agent = start("--name", "b", "--ready", str(ready))
    become(client, "b", cluster_service_pb2.NODE_STATE_READY)
    assert until(ready.exists, 30)
    agent.send_signal(signal.SIGTERM)
    assert agent.wait(30) == 0
    assert not ready.exists()
    nowhere = start("--name", "b", "--ready", str(tmp_path / "no" / "such"))
    assert nowhere.wait(30) == 2
    assert nowhere.stderr is not None
    assert "--ready" in nowhere.stderr.read()


@pytest.mark.parametrize("slots", ["0", "1000000", "-1"])
def test_slots_that_can_t_be(start: Started, slots: str) -> None:
    agent = start("--slots", slots)
    assert agent.wait(30) == 2
    assert agent.stderr is not None
    assert f"--slots: expected 1 to 4096 workers, found {slots}" in agent.stderr.read()


def test_an_address_that_is_another_machine_s(start: Started) -> None:
    agent = start("--address", "192.0.2.1")
    assert agent.wait(30) == 2
    assert agent.stderr is not None
    assert "--address: expected an IPv4 address of this machine, found 192.0.2.1" in agent.stderr.read()


def test_mpi_uses_the_network_of_the_address_that_an_agent_is_given(client: Client, start: Started) -> None:
    start("--name", "a", "--address", "127.0.0.1")
    assert become(client, "a", cluster_service_pb2.NODE_STATE_READY).address == "127.0.0.1"
    environ = {"FI_TCP_IFACE": "eth7"}
    use("127.0.0.1", environ)
    assert environ == {"FI_TCP_IFACE": "eth7", "UCX_NET_DEVICES": "lo"}


def hiding(options: str) -> list[str]:
    """Before an agent's line: its cache is a volume of its own."""
    return ["unshare", "--mount", "sh", "-c", f'mount -t tmpfs -o {options} none "$DPTRAIN_CACHE" && exec "$@"', "sh"]


@pytest.mark.skipif(os.geteuid() != 0, reason="volumes are mounted by root")
@pytest.mark.parametrize(("options", "why"), [("size=64k", "No space left on device"), ("ro", "Read-only file system")])
def test_a_node_whose_volume_is_full_or_read_only_says_so_before_a_launch(
    client: Client, start: Started, server: JobServer, tmp_path: Path, options: str, why: str
) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "own.npz").write_bytes(b"x" * (1 << 18))
    agent = start("--name", "a", before=hiding(options), DPTRAIN_CACHE=str(tmp_path / "cache"))
    become(client, "a", cluster_service_pb2.NODE_STATE_READY)
    loan = server.loans.lend({"name": "run", "root": "/r", "files": [str(tmp_path / "own.npz")], "job": {}})
    code, _, err = said(server, "a", "dptrain", "bring", DPTRAIN_TICKET=loan.ticket)
    assert code == 126
    assert len(err.splitlines()) == 1
    assert err.startswith("dptrain-rsh: node a: ")
    assert why in err or "without write permission" in err
    agent.kill()
    assert agent.stderr is not None
    assert agent.stderr.read().count('"event": "not brought"') == 1


def test_jobs_say_for_which_nodes_they_wait(client: Client, start: Started, tmp_path: Path) -> None:
    (tmp_path / "job.toml").write_text(JOB)
    job = client.submit(tmp_path / "job.toml", workers=2)
    wait_for(client, job.id, "it wants 2 workers, this server has 0 slots")
    start("--name", "a")
    wait_for(client, job.id, "it wants 2 workers, this server has 1 slot")


def wait_for(client: Client, job: str, message: str) -> None:
    until = time.monotonic() + 30
    while not client.job(job).message.endswith(message):
        assert time.monotonic() < until, client.job(job).message
        time.sleep(0.02)


def test_an_agent_waits_for_its_server_but_not_with_a_wrong_token(
    start: Started, server: JobServer, tmp_path: Path
) -> None:
    wrong = start("--name", "w", DPTRAIN_TOKEN="dptrain_" + "0" * 43)
    token = TokenFile(tmp_path / "data" / TOKENS).create("reader", Role.read)
    weak = start("--name", "r", DPTRAIN_TOKEN=token)
    for agent, said in ((wrong, "expected a token that it knows"), (weak, "expected a token for worker")):
        assert agent.wait(30) == 2
        assert agent.stderr is not None
        assert said in agent.stderr.read()
    waits = start("--name", "x", "--server", f"unix:{tmp_path}/none")
    assert waits.stderr is not None
    assert "no connection, tries again" in waits.stderr.readline()
    assert waits.poll() is None


def test_who_says_anything_else_first_is_refused(server: JobServer, tmp_path: Path) -> None:
    token = TokenFile(tmp_path / "data" / TOKENS).create("node", Role.worker)
    with connect(server.address, Calling(token)) as channel:
        stub = agent_service_pb2_grpc.AgentServiceStub(channel)
        for first in ([], [pb.ServeRequest(health=pb.Health())]):
            with pytest.raises(UsageError, match="a registration first"), told(server.address):
                list(stub.Serve(iter(first)))


def test_open_mpi_s_nodes_have_host_names_of_their_own() -> None:
    nodes = Nodes(Here("own", "Open MPI 5", "/python"), lambda: None, lambda *_, **__: None)
    nodes.join(registration(mpi="Open MPI 5"))
    with pytest.raises(LaunchError, match="found h, as node a; start one agent on a machine, with more --slots"):
        nodes.join(registration(mpi="Open MPI 5", name="b", instance="2"))
    nodes.join(registration(mpi="Open MPI 5", name="b", instance="2", host="i"))


def test_a_server_of_its_own_machine_takes_none(nodes: Nodes) -> None:
    alone = Nodes(Here("own", None, "/python"), lambda: None, lambda *_, **__: None)
    with pytest.raises(LaunchError, match="start it with `dptrain serve --agents`"):
        alone.join(registration())


@pytest.mark.parametrize(
    ("workers", "free", "placed"),
    [
        (2, {"a": 1, "b": 3, "c": 2}, {"c": 2}),
        (4, {"a": 1, "b": 3, "c": 2}, {"b": 3, "c": 1}),
        (6, {"a": 1, "b": 3, "c": 2}, {"b": 3, "c": 2, "a": 1}),
        (2, {"a": -1, "b": 1}, {"b": 1}),
        (1, {}, {}),
    ],
)
def test_as_few_nodes_as_can_be(workers: int, free: dict[str, int], placed: dict[str, int]) -> None:
    assert place(workers, free) == placed


@pytest.mark.parametrize(
    ("line", "asked"),
    [
        ('A=/x:$A;export A;/opt/bin/prted --prtemca ess "env"', ("prted", ["--prtemca", "ess", "env"])),
        (
            '( test ! -r ./.profile || . ./.profile; A=/x:$A;export A;/opt/bin/prted --prtemca ess "env" )',
            ("prted", ["--prtemca", "ess", "env"]),
        ),
        ("( test ! -r ./.profile || . ./.profile; id )", None),
        ('"/opt/bin/hydra_pmi_proxy" --proxy-id 0', ("hydra_pmi_proxy", ["--proxy-id", "0"])),
        ("test -e '/a b/.dptrain-seen-1' || exit 42", "/a b/.dptrain-seen-1"),
        ("dptrain worker --port 7 --processes 2", {"port": 7, "processes": 2}),
        ("dptrain worker --port 7 --processes 2 --data '/a b'", {"port": 7, "processes": 2, "data": "/a b"}),
        ("dptrain worker --port x --processes 2", None),
        ("dptrain worker --server 10.0.0.9:1", None),
        ("dptrain run", None),
        ("dptrain bring", {"bring": True}),
        ("dptrain bring /etc", None),
        ("sh -c id", None),
        ("A=1;export A;id", None),
        ("/opt/bin/prted 'open", None),
        ("", None),
    ],
)
def test_what_a_launcher_may_ask_for(line: str, asked: Any) -> None:
    if asked is None or isinstance(asked, dict):
        assert parsed(line) == asked
    elif isinstance(asked, str):
        assert parsed(line) == {"look": asked}
    else:
        assert parsed(line) == {"program": asked[0], "arguments": asked[1]}


def rsh(server: JobServer, *words: str, **changes: str) -> "subprocess.Popen[str]":
    environ = {**os.environ, NODES: str(server.options.data), **changes}
    line = [str(Path(sys.executable).parent / "dptrain-rsh"), *words]
    return subprocess.Popen(line, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def said(server: JobServer, *words: str, **changes: str) -> tuple[int, str, str]:
    with rsh(server, *words, **changes) as made:
        out, err = made.communicate(timeout=60)
    return made.returncode, out, err


def test_a_node_starts_daemons_and_nothing_else(
    client: Client, start: Started, server: JobServer, tmp_path: Path
) -> None:
    agent = start("--name", "a")
    become(client, "a", cluster_service_pb2.NODE_STATE_READY)
    code, _, err = said(server, "a", "sh", "-c", "id")
    assert (code, "expected one of prted, hydra_pmi_proxy, found `sh -c id`; it is not started" in err) == (255, True)
    # The agent doesn't rely on that.
    other = server.nodes.begin("a", lambda number: pb.ServeResponse(start=pb.Start(id=number, program="/bin/sh")))
    event = other.events.get(timeout=30)
    assert isinstance(event, pb.Exited)
    assert (event.code, "found '/bin/sh'; it is not started" in event.refused) == (126, True)
    other = server.nodes.begin("a", lambda number: pb.ServeResponse(look=pb.Look(id=number, path="/etc/shadow")))
    event = other.events.get(timeout=30)
    assert isinstance(event, pb.Exited)
    assert "expected the path of a mark" in event.refused
    mark = tmp_path / ".dptrain-seen-1"
    assert said(server, "a", f"test -e {mark} || exit 42")[0] == 42
    mark.touch()
    assert said(server, "a", f"test -e {mark} || exit 42") == (0, "", "")
    assert (
        "node nobody: expected its agent to be connected, found none of that name" in said(server, "nobody", "prted")[2]
    )
    daemon = "prted" if mpi().startswith("Open") else "hydra_pmi_proxy"
    code, out, err = said(server, "-x", "a", daemon, "--no-such-option")
    assert code not in (0, 126, 255)
    assert out or err
    agent.kill()
    assert agent.stderr is not None
    logged = agent.stderr.read()
    assert logged.count('"event": "refused"') == 2
    assert daemon in logged


@pytest.mark.skipif(not mpi().startswith("MPICH"), reason="MPICH's proxy waits for its launcher, quietly")
@pytest.mark.parametrize("end", ["launcher", "agent", "stream"])
def test_a_daemon_ends_with_its_launcher_its_agent_and_the_stream(
    client: Client, start: Started, server: JobServer, end: str
) -> None:
    agent = start("--name", "a")
    become(client, "a", cluster_service_pb2.NODE_STATE_READY)
    with socket.create_server(("127.0.0.1", 0)) as launcher:
        port = launcher.getsockname()[1]
        words = ["--control-port", f"elsewhere:{port}", "--rmk", "user", "--launcher", "ssh", "--demux", "poll"]
        words += ["--pgid", "0", "--retries", "10", "--usize", "-1", "--pmi-port", "0", "--proxy-id", "0"]
        with rsh(server, "-x", "a", "hydra_pmi_proxy", *words) as command:
            proxy, _ = launcher.accept()
            with proxy:
                proxy.settimeout(60)
                if end == "launcher":
                    command.kill()
                elif end == "agent":
                    agent.kill()
                else:
                    server.nodes._nodes["a"].told.put(None)
                while proxy.recv(1 << 12):
                    pass
            command.wait(60)


def test_streams_end_with_the_server(server: JobServer, tmp_path: Path) -> None:
    token = TokenFile(tmp_path / "data" / TOKENS).create("node", Role.worker)
    with connect(server.address, Calling(token)) as channel:
        stub = agent_service_pb2_grpc.AgentServiceStub(channel)
        requests: queue.SimpleQueue[Any] = queue.SimpleQueue()
        requests.put(pb.ServeRequest(registration=registration(mpi=mpi(), python=sys.executable)))
        stream = stub.Serve(iter(requests.get, None))
        with told(server.address):
            assert next(stream).welcome.health_seconds > 0
        server.nodes.close()
        with pytest.raises(UnreachableError, match="the server stops"), told(server.address):
            list(stream)
        requests.put(None)


def test_data_is_kept_by_digest_whole_or_not_at_all(tmp_path: Path) -> None:
    source = tmp_path / "set"
    (source / "deep").mkdir(parents=True)
    (source / "a").write_bytes(b"a" * (CHUNK + 1))
    (source / "deep" / "b").write_bytes(b"b")
    offers, fetched = Offers(), []

    def fetch(digest: str) -> Iterator[bytes]:
        fetched.append(digest)
        yield from offers.read(digest)

    files = offers.offer(source)
    place = received(files, fetch, tmp_path / "kept")
    assert (place / "a").read_bytes() == (source / "a").read_bytes()
    assert (place / "deep" / "b").read_bytes() == b"b"
    assert received(files, fetch, tmp_path / "kept") == place
    (one,) = offers.offer(source / "a")
    assert received([one], fetch, tmp_path / "kept").name == "a"
    assert len(fetched) == 2
    with pytest.raises(NotFoundError, match="a file of a job that was started"):
        list(offers.read("0" * 64))
    (source / "a").write_bytes(b"changed")
    with pytest.raises(StorageError, match="it changed on the server"):
        received([one], fetch, tmp_path / "other")
    assert not [path for path in (tmp_path / "other").rglob("*") if path.is_file()]
    for path in ("../x", "/x", ""):
        with pytest.raises(StorageError, match="a path below the data's folder"):
            received([pb.DataFile(path=path, sha256=one.sha256)], fetch, tmp_path / "other")
