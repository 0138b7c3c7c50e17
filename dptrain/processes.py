"""Processes of this machine as the kernel tells of them."""

from typing import NamedTuple


class Process(NamedTuple):
    """A process: its name as the kernel shortens it, one letter for its state, its parent, its start in ticks."""

    name: str
    state: str
    parent: int
    born: int


def process(pid: int) -> Process | None:
    """The process of that number; None where there is none, or none that may be looked at."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            stat = file.read()
    except OSError:
        return None
    # The name, in parentheses, may hold anything, these too.
    name, rest = stat[stat.index(b"(") + 1 : stat.rindex(b")")], stat[stat.rindex(b")") + 1 :].split()
    return Process(name.decode(errors="replace"), rest[0].decode(), int(rest[1]), int(rest[19]))
