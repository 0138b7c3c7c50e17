"""What a server puts up with from those who connect, and how long a client waits."""

from dataclasses import dataclass

MESSAGE_BYTES = (1 << 20) + (64 << 10)
"""A chunk of a vector and what surrounds it."""
METADATA_BYTES = 16 << 10


@dataclass(frozen=True, slots=True)
class Limits:
    """Of a server. Past one of them a call is refused with RESOURCE_EXHAUSTED, a connection closed."""

    message_bytes: int = MESSAGE_BYTES
    """Of a message that is received. Compressed ones are refused: their size says nothing about what they become."""
    calls: int = 256
    """At a time, of all clients together. Each has a thread of its own, so none waits for another to end."""
    streams: int = 64
    """At a time, of one connection."""
    connections: int = 512
    calls_per_second: float = 500.0
    """Of one client: of a token, or where there are none of a host."""
    burst: int = 1000
    """Calls that a client may make at once after it was quiet."""
    refusals_per_second: float = 20.0
    """Of one host: calls with no token or a wrong one. More of them are refused unread, however right."""
    handshake_seconds: float = 20.0
    """From the connection to the end of its TLS and HTTP/2 handshakes."""


@dataclass(frozen=True, slots=True)
class Patience:
    """Of both sides with a peer that says nothing, and of a client with a call."""

    keepalive_seconds: float = 20.0
    """Without a byte from the peer while calls are open: a ping."""
    ping_seconds: float = 10.0
    """Without an answer to a ping: the connection is dead, and so are its calls."""
    call_seconds: float = 30.0
    """The deadline of a unary call that names none."""
    connect_seconds: float = 10.0
