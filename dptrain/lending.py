"""A supervisor lends its run directory, and the job's files, to the workers of a launch on nodes that see no folder of
it: by way of its server, for as long as the launch lasts."""

import json
import os
import socket
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dptrain import afar, sockets
from dptrain.errors import LaunchError, UnreachableError
from dptrain.hosts import Host, agent
from dptrain.job import located
from dptrain.job.spec import Job, plain
from dptrain.rsh import HEAD, NODES, SOCKET

BRING = "dptrain bring"
"""What a node is asked for before a launch."""

WITHIN = 600.0
"""Seconds in which the server must have read the job's files, of which it makes digests."""


class Loan:
    """What is lent, from construction until ``close``. Raises UnreachableError, LaunchError."""

    def __init__(self, job: Job, run_dir: Path, environ: Mapping[str, str]) -> None:
        self._environ = environ
        self._server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._server.settimeout(WITHIN)
        job = _whole(job)
        said = {"name": str(run_dir), "root": str(run_dir.absolute()), "files": located.paths(job), "job": plain(job)}
        try:
            with sockets.short(environ[NODES], SOCKET) as path:
                self._server.connect(path)
            self.ticket = str(self._ask({"lend": said})["ticket"])
        except OSError as error:
            self._server.close()
            raise _gone(error) from None
        except BaseException:
            self._server.close()
            raise

    def begin(self, told: Path) -> dict[str, str]:
        """From now on workers write; what they tell their supervisor goes to a folder. Returns what launchers need."""
        try:
            self._ask({"told": str(told.absolute())})
        except OSError as error:
            raise _gone(error) from None
        return {afar.TICKET: self.ticket}

    def bring(self, hosts: Sequence[Host]) -> dict[str, str]:
        """Have the job's files on all nodes; those where that can't be, and why."""
        # No deadline but the node's own: it is lost where it says nothing.
        environ = {**self._environ, afar.TICKET: self.ticket}
        asked = {
            host.name: subprocess.Popen(
                [*agent(environ), host.name, BRING],
                env=environ,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
            )
            for host in hosts
        }
        answers = {}
        for name, process in asked.items():
            said = process.communicate()[1]
            if process.returncode:
                lines = [line.strip() for line in said.splitlines() if line.strip()]
                answers[name] = lines[-1].removeprefix("dptrain-rsh: ") if lines else f"code {process.returncode}"
        return answers

    def close(self) -> None:
        """Nothing is lent any more."""
        self._server.close()

    def _ask(self, said: Mapping[str, Any]) -> Any:
        self._server.sendall(json.dumps(said).encode() + b"\n")
        with self._server.makefile("rb") as frames:
            kind, length = HEAD.unpack(_exactly(frames, HEAD.size))
            answer = json.loads(_exactly(frames, length))
        if kind == b"x":
            raise LaunchError(
                "the job's files", expected="to be lent to the nodes", found=answer["why"], cure="see the server's log"
            )
        return answer


def _whole(job: Job) -> Job:
    return replace(job, directory=os.path.abspath(job.directory))


def _exactly(frames: Any, count: int) -> bytes:
    found: bytes = frames.read(count)
    if len(found) < count:
        raise ConnectionError("the server is gone")
    return found


def _gone(error: OSError) -> UnreachableError:
    return UnreachableError(
        "the server of the nodes", expected="an answer", found=error.strerror or str(error), cure="is it running?"
    )
