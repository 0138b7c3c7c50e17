"""Nodes on two networks: the server is reached by one, MPI uses the other."""

import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.faults.network import Cluster, missing
from tests.service import over_nodes
from tests.service.jobs import solo_hash
from tests.service.over_nodes import of_steps

FEW = 300
PARAMETERS = 64 * 10
"""At least so many, of four bytes each, does the job exchange in a step."""


def second(node: int) -> str:
    """A node's address on the second network."""
    return f"10.97.0.{node + 1}"


def lay(cluster: Cluster, nodes: Sequence[int]) -> None:
    """Join nodes by a second network, which goes with them."""
    switch = cluster.space(0)
    _ip("-n", switch, "link", "add", "second", "type", "bridge")
    _ip("-n", switch, "link", "set", "second", "up")
    for node in nodes:
        space, port = cluster.space(node), f"second{node}"
        _ip("link", "add", "eth1", "netns", space, "type", "veth", "peer", "name", port, "netns", switch)
        _ip("-n", switch, "link", "set", port, "master", "second", "up")
        _ip("-n", space, "addr", "add", f"{second(node)}/24", "dev", "eth1")
        _ip("-n", space, "link", "set", "eth1", "up")


def sent(cluster: Cluster, node: int, device: str) -> int:
    """Bytes that a node has sent by a network."""
    path = f"/sys/class/net/{device}/statistics/tx_bytes"
    line = ["ip", "netns", "exec", cluster.space(node), "cat", path]
    return int(subprocess.run(line, capture_output=True, text=True, timeout=10, check=True).stdout)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], capture_output=True, text=True, timeout=10, check=True)


@pytest.mark.skipif(missing() != "", reason=missing() or "nodes can be made")
def test_mpi_goes_by_the_address_that_the_agent_names(tmp_path: Path) -> None:
    text = of_steps(FEW)
    truth = solo_hash(tmp_path, text)
    with over_nodes.service(tmp_path / "place") as service:
        nodes = (1, 2, 3)
        # UCX would find out that they share a kernel, and use no network.
        service.environ["UCX_TLS"] = "tcp"
        lay(service.cluster, nodes)
        for node in nodes:
            service.agent(node, "--address", second(node))
        service.seen("node joined", len(nodes))
        job = service.submit("-n", "3", text=f'{text}\n[exchange]\ntype = "segments"\n')
        assert service.result(job)["weights_sha256"] == truth
        for node in nodes[1:]:
            least = FEW * PARAMETERS * 4
            by = {device: sent(service.cluster, node, device) for device in ("eth0", "eth1")}
            assert by["eth1"] > least > by["eth0"], by
