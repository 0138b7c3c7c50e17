"""The tokens of servers that this user has started on this machine, so that their own commands need none.

A token lies in a file that its user alone can read, named after the server's address: who can read it could read the
server's folder as well.
"""

import contextlib
import os
import re
from collections.abc import Mapping
from pathlib import Path

from dptrain.wire import tokens
from dptrain.wire.address import Address


def path_of(address: Address, environ: Mapping[str, str]) -> Path:
    """Where the token of the server at an address is kept; a server of all addresses is called by this machine's."""
    if address.host in ("0.0.0.0", "::"):
        address = Address("127.0.0.1", address.port)
    home = environ.get("XDG_CONFIG_HOME") or os.path.join(environ.get("HOME") or os.path.expanduser("~"), ".config")
    name = re.sub(r"[^A-Za-z0-9.-]", "_", str(address))
    return Path(home) / "dptrain" / "servers" / f"{name}.token"


def token(address: Address, file: Path | None, environ: Mapping[str, str]) -> str | None:
    """The token for a server: of a file, DPTRAIN_TOKEN, or that of a server which this user has started here."""
    found = tokens.find(file, environ)
    if found is not None:
        return found
    path = path_of(address, environ)
    return tokens.find(path, {}) if path.exists() else None


def remember(address: Address, token: Path, environ: Mapping[str, str]) -> None:
    """Keep the operator's token of a server for its user's commands; where that can't be, they have to be given it."""
    with contextlib.suppress(OSError):
        path = path_of(address, environ)
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_private(path, token.read_text())


def write_private(path: Path, text: str) -> None:
    """Write a file that only its owner can read, whole or not at all."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
