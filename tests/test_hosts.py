"""Hosts: the file that names them, and which of them answer; the launch agents are programs that really run."""

import os
import re
from pathlib import Path

import pytest

from dptrain import hosts, launch
from dptrain.errors import DptrainError, LaunchError, UsageError
from dptrain.hosts import Host


def written(folder: Path, text: str) -> Path:
    path = folder / "hosts"
    path.write_text(text)
    return path


def agent(folder: Path, body: str) -> dict[str, str]:
    """An environment whose launch agent runs ``$line`` for the host ``$host`` as the body of a shell script says."""
    path = folder / "agent"
    path.write_text(f"#!/bin/sh\nhost=$1\nline=$2\n{body}\n")
    path.chmod(0o755)
    return {**os.environ, "PRTE_MCA_plm_ssh_agent": str(path)}


def test_both_mpis_ways_to_write_hosts_are_read(tmp_path: Path) -> None:
    path = written(tmp_path, "# all of them\n\nnode1 slots=4\nnode2:2   # by Hydra\n10.0.0.3\n node4  slots = 1 \n")
    assert hosts.read(path) == (Host("node1", 4), Host("node2", 2), Host("10.0.0.3", 1), Host("node4", 1))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("node1\nnode2 slots=0\n", "line 2: expected at least 1 slot, found `node2 slots=0`"),
        ("node1:-1\n", "line 1: expected at least 1 slot"),
        ("node1:many\n", "line 1: expected at least 1 slot"),
        ("node1 4\n", "line 1: expected `host`, `host slots=N` or `host:N`, found `node1 4`"),
        ("node1 slots=2 max_slots=3\n", "line 1: expected"),
        ("node1:2\nnode1 slots=2\n", "line 2: expected each host once, found node1 again"),
        ("# nobody\n", "expected at least one host, found none"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(UsageError, match=re.escape(said)):
        hosts.read(written(tmp_path, text))


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nowhere: "):
        hosts.read(tmp_path / "nowhere")


def test_who_does_not_answer_is_told_with_the_reason(tmp_path: Path) -> None:
    body = """case $host in
    up) exec sh -c "$line" ;;
    elsewhere) exec sh -c "cd / && $(echo "$line" | sed s,.dptrain-seen-,gone-,)" ;;
    unknown) echo "no such host" >&2; exit 255 ;;
    mute) exit 7 ;;
    slow) exec sleep 600 ;;
    esac"""
    asked = [Host(name, 1) for name in ("localhost", "slow", "up", "elsewhere", "unknown", "mute")]
    found = hosts.silent(asked, agent(tmp_path, body), tmp_path, 5.0)
    assert found == {
        "elsewhere": f"it doesn't see {tmp_path}, which all hosts must share",
        "unknown": "no such host",
        "mute": "code 7",
        "slow": "no answer within 5 s",
    }
    assert [path.name for path in tmp_path.iterdir()] == ["agent"]


def test_without_a_launch_agent_that_is_told(tmp_path: Path) -> None:
    environ = {"HYDRA_LAUNCHER_EXEC": str(tmp_path / "none")}
    with pytest.raises(LaunchError, match="expected a program that reaches other hosts"):
        hosts.silent([Host("far", 1)], environ, tmp_path, 5.0)


def test_ssh_reaches_hosts_where_nothing_else_is_said() -> None:
    assert hosts.agent({})[0] == "ssh"
    assert hosts.agent({"PRTE_MCA_plm_ssh_agent": "ssh -p 2222"}) == ["ssh", "-p", "2222"]


def test_a_command_over_hosts_names_them_and_hands_our_variables_on(tmp_path: Path) -> None:
    environ = {**agent(tmp_path, ""), "DPTRAIN_TRAIN__STEPS": "3"}
    line, said = launch.command(3, ["run"], environ, hosts=[Host("a", 2), Host("b", 1)])
    assert "a:2,b:1" in line
    assert "PRTE_MCA_rmaps_default_mapping_policy" not in said
    if launch.library() == "Open MPI":
        handed = [line[at + 1] for at, word in enumerate(line) if word == "-x"]
        assert {"DPTRAIN_TRAIN__STEPS", "DPTRAIN_SUPERVISED"} <= set(handed)
        assert line[line.index("--bind-to") + 1] == "none"
    else:
        assert said["HYDRA_LAUNCHER_EXEC"] == str(tmp_path / "agent")


def test_fewer_slots_mean_fewer_workers() -> None:
    assert hosts.share(5, [Host("a", 2), Host("b", 2)]) == 4
    assert hosts.share(3, [Host("a", 2), Host("b", 2)]) == 3


def test_the_command_line_refuses_what_can_not_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dptrain.cli.run import Request, train

    path = written(tmp_path, "far slots=2\n")
    monkeypatch.chdir(tmp_path)
    for name, value in agent(tmp_path, 'echo "no route to $host" >&2; exit 255').items():
        monkeypatch.setenv(name, value)
    alone = launch.Announced(None, None, "")

    def refused(request: Request, place: launch.Announced = alone) -> str:
        with pytest.raises(DptrainError) as caught:
            train(request, place, None)
        return str(caught.value)

    assert "expected at most 2, the slots in" in refused(Request(n=3, hostfile=path))
    assert "expected no launcher, found hydra" in refused(Request(hostfile=path), launch.Announced(0, 2, "hydra"))
    assert "host far: expected an answer by the launch agent, found no route to far" in refused(Request(hostfile=path))
