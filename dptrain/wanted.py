"""How many workers a parameter server is to have, in a file that is looked at again and again while it trains.

The file holds a number, which is for this machine, or the nodes of a hostfile. Beside it lies, with THERE added to its
name, how many there are: written anew whenever no worker is about to come or to leave.
"""

import contextlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from dptrain import hosts
from dptrain.errors import UsageError

THERE = ".there"

HERE = ""
"""The name of this machine among nodes."""

Workers = Mapping[str, int]
"""How many there are on each node."""


class Group(NamedTuple):
    """A worker of so many processes on a node."""

    node: str
    processes: int


class Found(NamedTuple):
    """What came of what was asked for; there is less where workers could not come."""

    asked: Workers
    there: Workers


def text_of(workers: Workers) -> str:
    """The content of the file."""
    if set(workers) == {HERE}:
        return f"{workers[HERE]}\n"
    return "".join(f"{name} slots={slots}\n" for name, slots in workers.items())


def read(path: Path) -> Workers:
    """How many workers are wanted, at least one. Raises UsageError."""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        said = path.read_text(encoding="utf-8").strip()
        if said.isascii() and said.isdigit() and len(said) < 6 and int(said):
            return {HERE: int(said)}
        if said.isascii() and said.removeprefix("-").isdigit():
            raise UsageError(str(path), expected="at least 1 worker", found=said[:20], cure="write another number")
    return {host.name: host.slots for host in hosts.read(path)}


def found(path: Path) -> Found | None:
    """What came of it at last; None where that is not known yet."""
    try:
        content = json.loads(_beside(path).read_bytes())
        return Found(content["asked"], content["there"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def forget(path: Path) -> None:
    """What was there is not there any more."""
    _beside(path).unlink(missing_ok=True)


class Watch:
    """Looks at a file for whoever starts the workers that it asks for, ``cut`` into groups."""

    def __init__(self, path: Path, asked: Workers, cut: Callable[[Workers], Sequence[Group]]) -> None:
        self._path, self._asked, self._cut = path, asked, cut
        self._seen: object = None
        self.complaint = ""
        """What is wrong with the file; nothing is changed by one that is."""

    def look(self) -> Sequence[Group] | None:
        """The groups that are asked for now; None where the file has not changed."""
        try:
            found = self._path.stat()
        except OSError:
            return None
        seen = found.st_ino, found.st_mtime_ns, found.st_size
        if seen == self._seen:
            return None
        self._seen = seen
        try:
            asked = read(self._path)
        except UsageError as error:
            self.complaint = str(error)
            return None
        if (HERE in asked) != (HERE in self._asked):
            self.complaint = f"{self._path}: expected {text_of(self._asked)!r} or the like, found {text_of(asked)!r}"
            return None
        self.complaint, self._asked = "", asked
        return self._cut(asked)

    def settle(self, groups: Sequence[Group]) -> None:
        """These are there, and nobody is about to come or to leave. A full disk is no reason not to train."""
        there: Counter[str] = Counter()
        for group in groups:
            there[group.node] += group.processes
        part = self._path.with_name(f".{self._path.name}{THERE}")
        with contextlib.suppress(OSError):
            part.write_text(json.dumps({"asked": dict(self._asked), "there": dict(there)}))
            part.replace(_beside(self._path))


def _beside(path: Path) -> Path:
    return path.with_name(path.name + THERE)
