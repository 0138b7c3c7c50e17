"""Nodes whose wall clocks differ from the server's by hours, which must decide nothing, and be told."""

import json
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.faults.live import until
from tests.faults.network import missing as no_nodes
from tests.faults.oracle import Command
from tests.service import over_nodes
from tests.service.over_nodes import WHAT, Service

HOURS = 3600
COMMANDS = {"node": "run", "ps": "worker"}
"""What the command of a worker of each kind of job has among its words."""
SHIFTS = {1: 5 * HOURS, 2: 0, 3: -5 * HOURS}


def missing() -> str:
    """Why no clock can be other than it is; "" where one can."""
    return no_nodes() or ("" if shutil.which("gcc") else "clocks: no gcc here: apt-get install gcc libc6-dev")


pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(missing() != "", reason=missing() or "clocks can be shifted"),
]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("clock") / "clock.so"
    line = [
        "gcc",
        "-O2",
        "-Wall",
        "-Werror",
        "-shared",
        "-fPIC",
        "-o",
        str(made),
        str(Path(__file__).with_name("clock.c")),
    ]
    done = subprocess.run([*line, "-ldl"], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return made


def shifted(library: Path, seconds: int) -> dict[str, str]:
    """The environment of programs whose clock is so far ahead."""
    return {"LD_PRELOAD": str(library), "CLOCK_SHIFT": str(seconds)} if seconds else {}


def workers(service: Service, node: int) -> dict[str, str]:
    """What a worker of each kind of job, if there is one on a node, has mapped."""
    found = {}
    for pid in service.cluster.processes(node):
        try:
            words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
            kind = next((kind for kind, word in COMMANDS.items() if word in words and "dptrain" in words), None)
            if kind is not None and "python" in Path(f"/proc/{pid}/exe").readlink().name:
                found[kind] = Path(f"/proc/{pid}/maps").read_text()
        except OSError:
            continue
    return found


@pytest.mark.parametrize("what", ["nothing", "agent stopped"])
def test_clocks_that_differ_by_hours_decide_nothing_and_are_told(what: str, library: Path, tmp_path: Path) -> None:
    truths = over_nodes.truths(tmp_path)
    with over_nodes.service(tmp_path / "place") as service:
        service.apart = True
        agents: Mapping[int, Command] = {
            node: service.agent(node, slots=2, **shifted(library, seconds)) for node, seconds in SHIFTS.items()
        }
        service.seen("clock", 2)
        jobs = service.submit_each()
        maps: dict[tuple[int, str], str] = {}

        def all_seen() -> bool:
            for node in SHIFTS:
                maps.update({(node, kind): mapped for kind, mapped in workers(service, node).items()})
            return {node for node, _ in maps} == set(SHIFTS) and {kind for _, kind in maps} == set(COMMANDS)

        # Workers' clocks are as their agent's.
        assert until(all_seen, 90, nap=0.05), (maps.keys(), service.server.err)
        assert {node for (node, _), mapped in maps.items() if str(library) in mapped} == {1, 3}
        assert {node for (node, _), mapped in maps.items() if str(library) not in mapped} == {2}
        if what != "nothing":
            service.have_begun(jobs)
            WHAT[what](service, agents)
        service.end_as(jobs, truths)
        said = {node["name"]: node.get("message", "") for node in json.loads(service.said("nodes", "-o", "json"))}
        assert said["node-1"] == "its clock is 5 h 00 min ahead of the server's: set both, as by NTP"
        assert said["node-2"] == ""
        assert said["node-3"] == "its clock is 5 h 00 min behind the server's: set both, as by NTP"
        told = {(line["node"], line["message"]) for line in service.events("clock")}
        assert told == {(name, said[name]) for name in ("node-1", "node-3")}


@pytest.mark.parametrize(("days", "found"), [(-3, "that is not valid yet"), (3, "that has expired")])
def test_a_certificate_that_is_not_valid_by_a_node_s_clock_is_told_there(
    days: int, found: str, library: Path, tmp_path: Path
) -> None:
    with over_nodes.service(tmp_path / "place") as service:
        agent = service.agent(1, **shifted(library, 24 * HOURS * days))
        assert until(lambda: "\n" in agent.err, 60, nap=0.1)
        (line,) = map(json.loads, agent.err.splitlines())
        assert line["event"] == "no connection, tries again"
        assert "expected a certificate that is valid now, 2" in line["error"]
        assert f"by this machine's clock, found one {found}; set the clocks of both machines" in line["error"]
