"""``python -m tests.wire.serve``: the echo server in a process of its own, until its stdin ends. Says its address."""

import sys

from dptrain.wire.address import parse
from dptrain.wire.server import Server
from tests.wire.echo import Echo

if __name__ == "__main__":
    with Server(parse("127.0.0.1:0"), [Echo().service()]) as server:
        print(server.address, flush=True)
        sys.stdin.read()
