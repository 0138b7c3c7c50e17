"""Where a server listens: ``unix:PATH``, ``HOST:PORT`` or ``[IPV6]:PORT``, and which stay on the machine."""

import ipaddress
from dataclasses import dataclass, replace

from dptrain.errors import UsageError

LONGEST_PATH = 107
"""Bytes that the kernel keeps of a Unix socket's path (sun_path, unix(7)), its closing zero left out."""


@dataclass(frozen=True, slots=True)
class Address:
    """A Unix socket's ``path``, or ``host`` and ``port`` (0: any free one); ``str`` gives what was parsed."""

    host: str = ""
    port: int = 0
    path: str = ""

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach it: a Unix socket, localhost, 127.0.0.0/8, ::1. Other names may move."""
        if self.path or self.host == "localhost":
            return True
        try:
            address = ipaddress.ip_address(self.host)
        except ValueError:
            return False
        mapped = getattr(address, "ipv4_mapped", None)
        return (mapped or address).is_loopback

    def at(self, port: int) -> "Address":
        """The same host with another port; a Unix socket as it is."""
        return self if self.path else replace(self, port=port)

    def __str__(self) -> str:
        if self.path:
            return f"unix:{self.path}"
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse(text: str) -> Address:
    """The address that ``text`` says. Raises UsageError."""
    if text.startswith("unix:"):
        path = text.removeprefix("unix:")
        path = path.removeprefix("//") if path.startswith("///") else path
        if not path or "\0" in path or len(path.encode()) > LONGEST_PATH:
            raise _wrong(text, f"unix:PATH with 1 to {LONGEST_PATH} bytes of path")
        return Address(path=path)
    host, colon, port = text.rpartition(":")
    if not colon or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise _wrong(text, "HOST:PORT, [IPV6]:PORT or unix:PATH, with a port from 0 to 65535")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
        try:
            ipaddress.IPv6Address(host)
        except ValueError:
            raise _wrong(text, "an IPv6 address between [ and ]") from None
    elif not host or not all(c.isalnum() or c in "-._" for c in host):
        raise _wrong(text, "a host before the colon (all interfaces: 0.0.0.0 or [::]), an IPv6 address between [ and ]")
    return Address(host=host, port=int(port))


def _wrong(text: str, expected: str) -> UsageError:
    return UsageError(
        "address", expected=expected, found=repr(text), cure="such as 127.0.0.1:7070 or unix:/run/dp.sock"
    )
