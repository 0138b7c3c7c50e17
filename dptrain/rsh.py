"""``dptrain-rsh HOST COMMAND``: what a launcher starts instead of ssh where nodes are those of agents.

It hands the command over to the server, whose folder DPTRAIN_NODES names, and ends with the command's code. The server
hands it on to the node's agent. Known are Open MPI's daemon, MPICH's proxy, a worker of a parameter server, the
question whether a folder is seen, and that the files of a launch be brought. Imports are few: a launcher waits for it.
"""

import json
import os
import re
import shlex
import socket
import struct
import sys
import time
from collections.abc import Sequence

from dptrain import sockets, supervision
from dptrain.afar import TICKET

NODES = "DPTRAIN_NODES"
"""Of the environment: names the folder of the server whose nodes are meant."""

ACCESS = "nodes.json"
"""Of that folder: how other servers beside it are to listen."""

PROGRAMS = ("prted", "hydra_pmi_proxy")
"""What may be started on a node."""

SOCKET = "nodes.sock"
"""Of that folder: where the server listens for this program."""

UNREACHED = 255
"""The code where a node was not reached, as ssh has it."""

HEAD = struct.Struct("!cI")
"""Before what comes back: its kind and its length."""

PATIENCE = 8.0
"""Seconds for which the server may be away, which is started again."""

_AGAIN = 0.1
_LOOK = re.compile(r"test -e (?P<path>.+) \|\| exit 42")
_EXPORT = re.compile(r"\w+=[^;]*;\s*export \w+;")
_PROFILE = re.compile(r"\( test ! -r \./\.profile \|\| \. \./\.profile;(?P<line>.*)\)", re.DOTALL)
"""What Open MPI puts around a line for whose login shell is sh."""


def parsed(line: str) -> dict[str, object] | None:
    """What the server is asked for by a shell's line; None where it is none of the known ones.

    Variables that the line sets are left out: a node knows where its own libraries are.
    """
    look = _LOOK.fullmatch(line)
    try:
        if look is not None:
            (path,) = shlex.split(look["path"])
            return {"look": path}
        profile = _PROFILE.fullmatch(line)
        words = shlex.split(_EXPORT.sub("", line if profile is None else profile["line"]))
    except ValueError:
        return None
    if words == ["dptrain", "bring"]:
        return {"bring": True}
    if words[:2] == ["dptrain", "worker"]:
        said = dict(zip(words[2::2], words[3::2], strict=False))
        try:
            data = {"data": said["--data"]} if "--data" in said else {}
            return {"port": int(said["--port"]), "processes": int(said["--processes"]), **data}
        except (KeyError, ValueError):
            return None
    if not words or os.path.basename(words[0]) not in PROGRAMS:
        return None
    return {"program": os.path.basename(words[0]), "arguments": words[1:]}


def access(folder: str) -> dict[str, str]:
    """How a parameter server beside the server of a folder is to listen: host, certificate and key, "" without TLS."""
    with open(os.path.join(folder, ACCESS), encoding="utf-8") as file:
        found: dict[str, str] = json.load(file)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run it and return the code: the command's, or UNREACHED."""
    words = list(sys.argv[1:] if argv is None else argv)
    # Hydra asks ssh for no X11.
    words = words[1:] if words[:1] == ["-x"] else words
    if len(words) < 2:
        return _fail("usage: dptrain-rsh HOST COMMAND")
    host, line = words[0], " ".join(words[1:])
    asked = parsed(line)
    if asked is None:
        return _fail(f"node {host}: expected one of {', '.join(PROGRAMS)}, found `{line[:80]}`; it is not started")
    folder = os.environ.get(NODES)
    if not folder:
        return _fail(f"expected {NODES} to name a server's folder, found none; jobs of `dptrain serve` have it")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as server:
        if not _reach(server, folder):
            return _fail(f"server of {folder}: expected an answer, found none within {PATIENCE:g} s; is it running?")
        if TICKET in os.environ and ("program" in asked or "bring" in asked):
            asked["ticket"] = os.environ[TICKET]
        if "port" in asked:
            # Not on a command line, which every user of a machine can read.
            asked["token"] = os.environ.get("DPTRAIN_TOKEN", "")
        server.sendall(json.dumps({"node": host, **asked}).encode() + b"\n")
        code, why = _follow(server, host)
        if code == UNREACHED and "program" in asked:
            # Hydra would wait for its proxy there, and workers for those that were with it.
            supervision.lost(why)
        return code


def _reach(server: socket.socket, folder: str) -> bool:
    until = time.monotonic() + PATIENCE
    while True:
        try:
            with sockets.short(folder, SOCKET) as path:
                server.connect(path)
        except OSError:
            if time.monotonic() > until:
                return False
            time.sleep(_AGAIN)
        else:
            return True


def _follow(server: socket.socket, host: str) -> tuple[int, str]:
    """Print what comes, until the end: the code, and why where there was no program to end."""
    with server.makefile("rb") as frames:
        while head := frames.read(HEAD.size):
            kind, length = HEAD.unpack(head)
            content = frames.read(length)
            if kind == b"x":
                said = json.loads(content)
                if said["why"]:
                    print(f"dptrain-rsh: {said['why']}", file=sys.stderr, flush=True)
                return int(said["code"]), str(said["why"])
            os.write(2 if kind == b"e" else 1, content)
    gone = f"node {host}: the server is gone"
    return _fail(gone), gone


def _fail(why: str) -> int:
    print(f"dptrain-rsh: {why}", file=sys.stderr, flush=True)
    return UNREACHED


if __name__ == "__main__":
    sys.exit(main())
