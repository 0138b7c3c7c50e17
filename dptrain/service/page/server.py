"""The page on an address, in a thread of the process that has it."""

import socket
import ssl
import threading

from dptrain.errors import LaunchError, UsageError
from dptrain.service.page.reading import Door, Reading
from dptrain.wire.security import ServerTls

LOOPBACK = ("127.0.0.1", "localhost", "::1")


class PageServer:
    """Serves until it is closed. Loopback alone may do without a ``door`` and without TLS.

    It may be asked for by ``host`` and by the names that the certificate is for. Raises UsageError for an open
    address without a door and TLS, or where the extra ``service`` is missing, LaunchError where the address can't be
    had.
    """

    def __init__(
        self,
        reading: Reading,
        host: str = "127.0.0.1",
        port: int = 0,
        *,
        door: Door | None = None,
        tls: ServerTls | None = None,
    ) -> None:
        if host not in LOOPBACK and (door is None or tls is None):
            raise UsageError(
                f"page on {host}",
                expected="tokens and TLS on an address that others reach",
                found="no tokens" if door is None else "no TLS",
                cure="listen on 127.0.0.1, or make tokens and certificates",
            )
        try:
            import uvicorn

            from dptrain.service.page.sessions import Sessions
            from dptrain.service.page.stream import Closing
            from dptrain.service.page.web import make_app
        except ModuleNotFoundError as error:
            raise UsageError(
                "page", expected=f"the package {error.name}", found="none", cure="pip install 'dptrain[service]'"
            ) from None

        known = [host, *(LOOPBACK if host in LOOPBACK else ())]
        if tls is not None:
            from dptrain.wire import certificates

            known += certificates.hosts(tls.certificate)
        self._socket = _bound(host, port)
        self.port: int = self._socket.getsockname()[1]
        shown = f"[{host}]" if ":" in host else host
        self.address = f"{'https' if tls else 'http'}://{shown}:{self.port}"
        self._closing = Closing()
        config = uvicorn.Config(
            make_app(reading, Sessions(door), known, self._closing),
            log_config=None,
            access_log=False,
            lifespan="off",
            ws="none",
            server_header=False,
            timeout_graceful_shutdown=2,
            limit_concurrency=512,
            ssl_certfile=str(tls.certificate) if tls else None,
            ssl_keyfile=str(tls.key) if tls else None,
            ssl_ca_certs=str(tls.clients) if tls and tls.clients else None,
            ssl_cert_reqs=ssl.CERT_REQUIRED if tls and tls.clients else ssl.CERT_NONE,
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._serve, name="page", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the streams, then the server; no port is left behind."""
        self._closing.now = True
        self._server.should_exit = True
        self._thread.join()
        self._socket.close()

    def wait(self) -> None:
        """Until it is closed, or for ever."""
        self._thread.join()

    def _serve(self) -> None:
        self._server.run(sockets=[self._socket])


def _bound(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    found = socket.socket(family, socket.SOCK_STREAM)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind((host, port))
        found.listen(256)
    except OSError as error:
        found.close()
        raise LaunchError(
            f"page on {host}:{port}",
            expected="an address that is free",
            found=error.strerror or str(error),
            cure="choose another port, or 0 for any",
        ) from None
    return found
