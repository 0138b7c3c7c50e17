"""``dptrain serve``: a server from its start until it is asked to stop."""

import contextlib
import os
import resource
import signal
import threading

from dptrain.service import known, log
from dptrain.service.server import TOKEN, JobServer, Options

MOST_FILES = 65_536


def keep_serving(options: Options) -> None:
    """Serve until SIGTERM or SIGINT. What runs goes on, and the next server finds it again."""
    asked = threading.Event()
    handler = log.begin()
    _hold_many_files()
    before = {number: signal.signal(number, lambda *_: asked.set()) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        with JobServer(options, os.environ) as server:
            address = server.address
            print(f"dptrain serves at {address}", flush=True)
            if options.page is not None:
                print(f"its page: {server.page}", flush=True)
            print(f"jobs are kept in {options.data}; Ctrl-C ends the server, not the jobs", flush=True)
            if known.path_of(address, os.environ).exists():
                print(f"try: dptrain submit JOB.toml -f{_elsewhere(str(address))}", flush=True)
            else:
                print(f"commands need DPTRAIN_TOKEN, or --token-file {options.data / TOKEN}", flush=True)
            asked.wait()
            log.tell("asked to stop")
    finally:
        for number, old in before.items():
            signal.signal(number, old)
        handler.close()


def _hold_many_files() -> None:
    """Every client is a file; what a shell allows is often 1024 of them, and what the system allows far more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, MOST_FILES)), hard))


def _elsewhere(address: str) -> str:
    from dptrain.service.client import DEFAULT_SERVER

    return "" if address == DEFAULT_SERVER else f" --server {address}"
