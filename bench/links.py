"""Machines on slow links, made of network namespaces on a bridge; for root on Linux."""

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence

from bench.spawn import NotRun


def address(node: int) -> str:
    """By which the others know a node."""
    return f"10.98.0.{node + 1}"


@contextlib.contextmanager
def nodes(rates: Sequence[str]) -> Iterator[list[list[str]]]:
    """What a command is put behind to run on each node; "100mbit" limits what comes to one and what goes from it.

    "" is no limit. Raises NotRun where there can be no such nodes.
    """
    if os.geteuid() != 0 or not all(map(shutil.which, ("ip", "tc"))):
        raise NotRun("links are limited by root with iproute2")
    prefix = f"dptrain-links-{os.getpid()}"
    switch = f"{prefix}-switch"
    spaces = [f"{prefix}-{node}" for node in range(len(rates))]
    with contextlib.ExitStack() as made:
        for space in (switch, *spaces):
            _do("ip", "netns", "add", space)
            made.callback(_do, "ip", "netns", "delete", space)
        _do("ip", "-n", switch, "link", "add", "bridge", "type", "bridge")
        _do("ip", "-n", switch, "link", "set", "bridge", "up")
        for node, (space, rate) in enumerate(zip(spaces, rates, strict=True)):
            port = f"port{node}"
            _do("ip", "link", "add", "eth0", "netns", space, "type", "veth", "peer", "name", port, "netns", switch)
            _do("ip", "-n", switch, "link", "set", port, "master", "bridge", "up")
            _do("ip", "-n", space, "addr", "add", f"{address(node)}/24", "dev", "eth0")
            _do("ip", "-n", space, "link", "set", "eth0", "up")
            _do("ip", "-n", space, "link", "set", "lo", "up")
            for where, device in ((space, "eth0"), (switch, port)) if rate else ():
                limit = ["tbf", "rate", rate, "burst", "64kb", "latency", "50ms"]
                _do("tc", "-n", where, "qdisc", "add", "dev", device, "root", *limit)
        yield [["ip", "netns", "exec", space] for space in spaces]


def _do(*line: str) -> None:
    done = subprocess.run(line, capture_output=True, text=True, timeout=10, check=False)
    if done.returncode:
        raise NotRun(f"{' '.join(line[:3])}: {done.stderr.strip()}")
