"""Agents as processes of their own, at a real server."""

import queue
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
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
    UnreachableError,
    UsageError,
)
from dptrain.service.client import Client
from dptrain.service.nodes import REMEMBERED_SECONDS, SILENT_SECONDS, Nodes, NodeState
from dptrain.service.server import TOKENS, JobServer
from dptrain.v1 import agent_service_pb2 as pb
from dptrain.v1 import agent_service_pb2_grpc, cluster_service_pb2
from dptrain.wire.channel import connect
from dptrain.wire.security import Calling
from dptrain.wire.statuses import told
from dptrain.wire.tokens import Role, TokenFile

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
    return Nodes("own", lambda: None, lambda *_, **__: None, clock)


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
def start(server: JobServer, environ: dict[str, str], tmp_path: Path) -> Iterator[Started]:
    """Starts agents of the server."""
    with ExitStack() as left:

        def begin(*arguments: str, **changes: str) -> "subprocess.Popen[str]":
            line = [sys.executable, "-P", "-m", "dptrain", "agent", "--server", str(server.address), *arguments]
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


@pytest.mark.parametrize("slots", ["0", "1000000", "-1"])
def test_slots_that_can_t_be(start: Started, slots: str) -> None:
    agent = start("--slots", slots)
    assert agent.wait(30) == 2
    assert agent.stderr is not None
    assert f"--slots: expected 1 to 4096 workers, found {slots}" in agent.stderr.read()


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


def test_streams_end_with_the_server(server: JobServer, tmp_path: Path) -> None:
    token = TokenFile(tmp_path / "data" / TOKENS).create("node", Role.worker)
    with connect(server.address, Calling(token)) as channel:
        stub = agent_service_pb2_grpc.AgentServiceStub(channel)
        said: queue.SimpleQueue[Any] = queue.SimpleQueue()
        said.put(pb.ServeRequest(registration=registration()))
        stream = stub.Serve(iter(said.get, None))
        with told(server.address):
            assert next(stream).welcome.health_seconds > 0
        server.nodes.close()
        with pytest.raises(UnreachableError, match="the server stops"), told(server.address):
            list(stream)
        said.put(None)
