"""Nobody in who doesn't belong: loopback by default, any other address only with a token and TLS, on both sides."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dptrain.errors import RefusedError, StorageError, UsageError
from dptrain.wire.address import Address
from dptrain.wire.tokens import Keys

if TYPE_CHECKING:
    import grpc


@dataclass(frozen=True, slots=True)
class ServerTls:
    """PEM files of a server. With ``clients`` (a CA) it takes only connections of who has a certificate of that CA."""

    certificate: Path
    key: Path
    clients: Path | None = None

    def credentials(self) -> "grpc.ServerCredentials":
        """Raises StorageError, UsageError."""
        import grpc

        pair = (_pem(self.key, "PRIVATE KEY"), _pem(self.certificate, "CERTIFICATE"))
        clients = None if self.clients is None else _pem(self.clients, "CERTIFICATE")
        return grpc.ssl_server_credentials([pair], root_certificates=clients, require_client_auth=clients is not None)


@dataclass(frozen=True, slots=True)
class ClientTls:
    """PEM files of a client: the CA that signed the server's certificate, and for mTLS a certificate of its own."""

    ca: Path
    certificate: Path | None = None
    key: Path | None = None
    server_name: str | None = None
    """The name that the server's certificate must be for, where that is not the address's host."""

    def credentials(self) -> "grpc.ChannelCredentials":
        """Raises StorageError, UsageError."""
        import grpc

        if (self.certificate is None) != (self.key is None):
            raise UsageError(
                "TLS", expected="a client certificate and its key", found="one of them", cure="give both, or neither"
            )
        return grpc.ssl_channel_credentials(
            _pem(self.ca, "CERTIFICATE"),
            None if self.key is None else _pem(self.key, "PRIVATE KEY"),
            None if self.certificate is None else _pem(self.certificate, "CERTIFICATE"),
        )


@dataclass(frozen=True, slots=True)
class Serving:
    """How a server is kept: who knows its tokens (none: everybody who reaches it may do everything), and its TLS."""

    keys: Keys | None = None
    tls: ServerTls | None = None

    def allow(self, address: Address) -> None:
        """Raise RefusedError where others than this machine could reach ``address`` and it isn't kept well enough."""
        missing = _missing(address, self.keys is not None, self.tls is not None)
        if missing:
            raise RefusedError(
                f"listen on {address}",
                expected="a token file and TLS, as for every address that is not loopback",
                found=f"no {missing}",
                cure="make them with dptrain token create and dptrain certs init, or listen on 127.0.0.1 or unix:PATH",
            )


@dataclass(frozen=True, slots=True)
class Calling:
    """How a client shows itself, and knows the server."""

    token: str | None = None
    tls: ClientTls | None = None

    def __repr__(self) -> str:
        return f"Calling(token={'set' if self.token else None}, tls={self.tls!r})"

    def allow(self, address: Address) -> None:
        """Raise RefusedError where a token or gradients would leave this machine for anybody to read or answer."""
        missing = _missing(address, self.token is not None, self.tls is not None)
        if missing:
            raise RefusedError(
                f"server {address}",
                expected="a token and the CA of its certificate, as for every address that is not loopback",
                found=f"no {missing}",
                cure="give --token-file or DPTRAIN_TOKEN, and --tls-ca",
            )


def _missing(address: Address, token: bool, tls: bool) -> str:
    if address.loopback:
        return ""
    return " and no ".join(name for name, there in (("token", token), ("TLS", tls)) if not there)


def _pem(path: Path, kind: str) -> bytes:
    try:
        text = path.read_bytes()
    except OSError as error:
        raise StorageError(
            f"{path}", expected="a PEM file", found=error.strerror or str(error), cure="dptrain certs init makes them"
        ) from None
    if f"{kind}-----".encode() not in text:
        raise UsageError(f"{path}", expected=f"PEM with a {kind}", found="none", cure="dptrain certs init makes them")
    return text
