"""``dptrain page``: runs in a browser."""

import signal
import threading
from pathlib import Path

from dptrain.errors import UsageError
from dptrain.service.page.runs import Runs
from dptrain.service.page.server import LOOPBACK, PageServer


def serve(runs: Path, listen: str) -> None:
    """Serve the page until SIGINT or SIGTERM."""
    host, port = _address(listen)
    if not runs.is_dir():
        raise UsageError(str(runs), expected="a folder of runs", found="none", cure="train something, or name another")
    ends = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ends.set())
    server = PageServer(Runs(runs), host, port)
    print(f"{server.address}  shows {runs}; Ctrl-C ends it", flush=True)
    ends.wait()
    server.close()


def _address(listen: str) -> tuple[str, int]:
    host, _, port = listen.rpartition(":")
    host = host.strip("[]")
    if host not in LOOPBACK or not (port.isascii() and port.isdigit()) or int(port) > 65535:
        raise UsageError(
            f"--listen {listen}",
            expected="a loopback address and a port, such as 127.0.0.1:8470",
            found="another",
            cure="for others to see runs, use `dptrain serve`, which has tokens and TLS",
        )
    return host, int(port)
