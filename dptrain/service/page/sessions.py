"""Who sits at the page: a token comes in once, by POST; after that a cookie that no script can read stands for it."""

import hmac
import secrets
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass

from dptrain.service.page.reading import Door, Local, Who

COOKIE = "dptrain_session"
CSRF = "x-dptrain-csrf"
LASTS = 12 * 3600.0
"""Seconds after which a token is asked for again."""

_MOST = 1000
_FAILURES, _WINDOW = 10, 60.0


@dataclass(frozen=True)
class Session:
    """A browser. ``token`` is looked up again at every request, so that a revoked one is refused at once."""

    token: str
    csrf: str
    ends: float


class Sessions:
    """The browsers that have come in. Without a ``door`` everyone may, and is ``Local``: on loopback only."""

    def __init__(self, door: Door | None) -> None:
        self.door = door
        self._lock = threading.Lock()
        self._known: dict[str, Session] = {}
        self._failures: list[float] = []

    def enter(self, token: str) -> tuple[str, Session] | None:
        """A new session and its cookie's value; None for a token that is nobody's, or after too many of those."""
        now = time.monotonic()
        if self.door is not None:
            with self._lock:
                self._failures = [at for at in self._failures if now - at < _WINDOW]
                if len(self._failures) >= _FAILURES:
                    return None
            if self.door.identify(token) is None:
                with self._lock:
                    self._failures.append(now)
                return None
        name, session = secrets.token_urlsafe(32), Session(token, secrets.token_urlsafe(32), now + LASTS)
        with self._lock:
            self._known = {key: old for key, old in self._known.items() if old.ends > now}
            while len(self._known) >= _MOST:
                self._known.pop(next(iter(self._known)))
            self._known[name] = session
        return name, session

    def leave(self, cookies: Mapping[str, str]) -> None:
        """Forget a browser."""
        with self._lock:
            self._known.pop(cookies.get(COOKIE, ""), None)

    def find(self, cookies: Mapping[str, str]) -> Session | None:
        """The session of a request."""
        with self._lock:
            session = self._known.get(cookies.get(COOKIE, ""))
        return session if session is not None and session.ends > time.monotonic() else None

    def who(self, session: Session | None) -> Who | None:
        """Who that is now; None: nobody."""
        if self.door is None:
            return Local()
        return None if session is None else self.door.identify(session.token)


def genuine(session: Session | None, headers: Mapping[str, str]) -> bool:
    """Whether a request that changes something comes from the page itself."""
    given = headers.get(CSRF, "")
    return session is not None and hmac.compare_digest(given.encode(), session.csrf.encode())
