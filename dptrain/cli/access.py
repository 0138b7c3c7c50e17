"""Who may connect, as the command line says it: of a server, and of who calls one."""

import functools
import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from dptrain.errors import UsageError

if TYPE_CHECKING:
    from dptrain.service.client import Client
    from dptrain.wire.security import Calling, ServerTls, Serving

Tokens = Annotated[
    Path | None,
    typer.Option("--tokens", metavar="FILE", help="Who may connect: what `dptrain token create` writes."),
]
TlsCert = Annotated[Path | None, typer.Option("--tls-cert", metavar="PEM", help="The server's certificate.")]
TlsKey = Annotated[Path | None, typer.Option("--tls-key", metavar="PEM", help="Its key.")]
TlsClients = Annotated[
    Path | None, typer.Option("--tls-clients", metavar="PEM", help="A CA: only clients with its certificates.")
]
Token = Annotated[Path | None, typer.Option("--token-file", metavar="FILE", help="Default: DPTRAIN_TOKEN.")]
TlsCa = Annotated[
    Path | None, typer.Option("--tls-ca", metavar="PEM", envvar="DPTRAIN_TLS_CA", help="The CA of the server.")
]

Server = Annotated[
    str | None,
    typer.Option("--server", metavar="ADDRESS", envvar="DPTRAIN_SERVER", help="Default: this machine's server."),
]
TokenFile = Annotated[
    Path | None,
    typer.Option("--token-file", metavar="FILE", help="Default: DPTRAIN_TOKEN, or the server's own on this machine."),
]


def server_tls(cert: Path | None, key: Path | None, clients: Path | None) -> "ServerTls | None":
    """A server's TLS; None without. Raises UsageError for a part of it."""
    from dptrain.wire.security import ServerTls

    if (cert is None) != (key is None) or (clients is not None and cert is None):
        raise UsageError("TLS", expected="--tls-cert and --tls-key", found="one of them", cure="give both, or neither")
    return None if cert is None or key is None else ServerTls(cert, key, clients)


def serving(tokens: Path | None, cert: Path | None, key: Path | None, clients: Path | None) -> "Serving":
    """How a server is kept. Raises UsageError, StorageError."""
    from dptrain.wire.security import Serving
    from dptrain.wire.tokens import TokenFile

    return Serving(None if tokens is None else TokenFile(tokens), server_tls(cert, key, clients))


def calling(token_file: Path | None, ca: Path | None) -> "Calling":
    """How a client shows itself. Raises UsageError, StorageError."""
    from dptrain.wire.security import Calling, ClientTls
    from dptrain.wire.tokens import find

    return Calling(find(token_file, os.environ), None if ca is None else ClientTls(ca))


class Reach(NamedTuple):
    """The server that a command line means, the token and the CA that it names."""

    server: str | None
    token_file: Path | None
    tls_ca: Path | None

    def client(self) -> "Client":
        """A client of that server, to be entered."""
        from dptrain.service.client import Client
        from dptrain.wire.security import ClientTls

        tls = None if self.tls_ca is None else ClientTls(self.tls_ca)
        return Client(self.server, token_file=self.token_file, tls=tls)


_OPTIONS = {"server": Server, "token_file": TokenFile, "tls_ca": TlsCa}


def asking(command: Callable[..., None]) -> Callable[..., None]:
    """The command with these options, of which it is handed a Reach, its first parameter."""

    @functools.wraps(command)
    def whole(**given: Any) -> None:
        command(Reach(**{name: given.pop(name) for name in _OPTIONS}), **given)

    kept = list(inspect.signature(command).parameters.values())[1:]
    kind = inspect.Parameter.KEYWORD_ONLY
    added = [inspect.Parameter(name, kind, default=None, annotation=what) for name, what in _OPTIONS.items()]
    every = [parameter.replace(kind=kind) for parameter in kept] + added
    whole.__signature__ = inspect.Signature(every)  # type: ignore[attr-defined]
    whole.__annotations__ = {parameter.name: parameter.annotation for parameter in every}
    return whole
