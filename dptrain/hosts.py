"""The hosts that workers run on: a file that names them, and which of them answer.

The file's lines are Open MPI's, ``host slots=N``, or Hydra's, ``host:N``; without a number a host has one slot. What
follows a ``#`` is a comment.
"""

import contextlib
import os
import re
import shlex
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from dptrain.errors import LaunchError, UsageError

DEADLINE = 10.0
"""Seconds in which a host must answer."""

AGENTS = ("PRTE_MCA_plm_ssh_agent", "HYDRA_LAUNCHER_EXEC")
"""Where Open MPI and MPICH are told by which program to reach a host, if not by ssh."""

_SSH = ["ssh", "-o", "BatchMode=yes"]
_UNSHARED = 42
"""The code with which a host says that it doesn't see this folder."""

_LINE = re.compile(r"(?P<name>[^\s:=]+)(?::(?P<hydra>\S+)|\s+slots\s*=\s*(?P<prrte>\S+))?")


class Host(NamedTuple):
    """A host and how many workers it takes."""

    name: str
    slots: int

    @property
    def here(self) -> bool:
        """Whether it is the machine of this process, by its name."""
        return self.name in ("localhost", "127.0.0.1", os.uname().nodename)


def read(path: Path) -> tuple[Host, ...]:
    """The hosts of a file, each once, in order. Raises UsageError, which names the line."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            "--hostfile", expected="a readable text file", found=f"{path}: {error}", cure="name one"
        ) from None
    found: dict[str, Host] = {}
    for number, line in enumerate(text.splitlines(), 1):
        said = line.partition("#")[0].strip()
        if said:
            host = _host(said, f"{path} line {number}")
            if host.name in found:
                raise _wrong(f"{path} line {number}", "each host once", f"{host.name} again")
            found[host.name] = host
    if not found:
        raise _wrong(str(path), "at least one host", "none")
    return tuple(found.values())


def _host(said: str, where: str) -> Host:
    match = _LINE.fullmatch(said)
    if match is None:
        raise _wrong(where, "`host`, `host slots=N` or `host:N`", f"`{said}`")
    slots = match["hydra"] or match["prrte"] or "1"
    if not slots.isascii() or not slots.isdigit() or int(slots) < 1:
        raise _wrong(where, "at least 1 slot", f"`{said}`")
    return Host(match["name"], int(slots))


def _wrong(where: str, expected: str, found: str) -> UsageError:
    return UsageError(where, expected=expected, found=found, cure="one host a line, such as `node1 slots=4`")


def agent(environ: Mapping[str, str]) -> list[str]:
    """The command to which a host and a shell's line are added to run that line there."""
    said = next((environ[name] for name in AGENTS if environ.get(name)), "")
    return shlex.split(said) or _SSH


def silent(
    hosts: Sequence[Host],
    environ: Mapping[str, str],
    folder: Path,
    deadline: float = DEADLINE,
    apart: set[str] | None = None,
) -> dict[str, str]:
    """Which of the hosts can't take workers, and why, asked all at once by the launch agent.

    A host must answer within ``deadline`` seconds and see ``folder``, in which this process makes a file, by the
    same path; where ``apart`` is given, those that don't see it are named there, and can take workers. Raises
    LaunchError where there is no launch agent.
    """
    reach = agent(environ)
    until = time.monotonic() + deadline
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".dptrain-seen-") as mark, contextlib.ExitStack() as left:
        line = f"test -e {shlex.quote(mark.name)} || exit {_UNSHARED}"
        asked = {host.name: left.enter_context(_Asked([*reach, host.name, line])) for host in hosts if not host.here}
        answers = {name: one.answer(until, deadline, folder) for name, one in asked.items()}
        if apart is not None:
            apart |= {name for name, one in asked.items() if one.apart}
            answers = {name: why for name, why in answers.items() if name not in apart}
    return {name: why for name, why in answers.items() if why}


class _Asked:
    """A host that was asked, by a launch agent that is ended when this is left."""

    def __init__(self, line: Sequence[str]) -> None:
        # A file, not a pipe: whoever says much must not wait for its turn to be heard.
        self._said = tempfile.TemporaryFile()  # noqa: SIM115
        try:
            self._process = subprocess.Popen(
                line, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=self._said, start_new_session=True
            )
        except OSError as error:
            self._said.close()
            raise LaunchError(
                "the launch agent",
                expected="a program that reaches other hosts",
                found=f"{line[0]}: {error.strerror}",
                cure=f"install ssh, or name another by {' or '.join(AGENTS)}",
            ) from None

    def __enter__(self) -> "_Asked":
        return self

    def __exit__(self, *error: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._said.close()

    @property
    def apart(self) -> bool:
        """Whether the host has said that it doesn't see the folder."""
        return self._process.returncode == _UNSHARED

    def answer(self, until: float, deadline: float, folder: Path) -> str:
        """Why the host can't be used; "" where it can."""
        try:
            # Where that time is over, what was answered before still counts.
            code = self._process.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            return f"no answer within {deadline:g} s"
        if code == _UNSHARED:
            return f"it doesn't see {folder}, which all hosts must share"
        if code:
            self._said.seek(0)
            lines = self._said.read().decode(errors="replace").split("\n")
            return next((line.strip() for line in reversed(lines) if line.strip()), f"code {code}")
        return ""


def share(n: int, hosts: Sequence[Host]) -> int:
    """How many of ``n`` wanted workers the hosts take."""
    return min(n, sum(host.slots for host in hosts))


def spread(n: int, hosts: Sequence[Host]) -> list[Host]:
    """The hosts that ``n`` workers are on, in order, with as many slots as each has of them."""
    found = []
    for host in hosts:
        if n > 0:
            found.append(host._replace(slots=min(n, host.slots)))
            n -= host.slots
    return found


def listed(hosts: Sequence[Host]) -> str:
    """The hosts as both MPIs' mpirun takes them on its command line."""
    return ",".join(f"{host.name}:{host.slots}" for host in hosts)
