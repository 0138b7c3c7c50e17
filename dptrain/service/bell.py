"""Waiting for what others do: a counter for each thing, and a wait for it to move."""

import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence


class Bell:
    """Threads wait for a key to be rung. A ring between looking and waiting is not missed: each wait names the count
    that it saw.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._counts: Counter[str] = Counter()
        self._closed = False
        self._listeners: list[Callable[[tuple[str, ...]], None]] = []

    def listen(self, listener: Callable[[tuple[str, ...]], None]) -> None:
        """Call this with the keys at every ring. It must neither wait nor raise."""
        self._listeners.append(listener)

    def ring(self, *keys: str) -> None:
        """Something has happened to these keys."""
        with self._changed:
            self._counts.update(keys)
            self._changed.notify_all()
        for listener in self._listeners:
            listener(keys)

    def count(self, key: str) -> int:
        """How often it was rung so far. Take it before looking at the thing itself."""
        with self._changed:
            return self._counts[key]

    def wait_any(self, seen: Sequence[tuple[str, int]], seconds: float) -> bool:
        """Return True when a key's count is another than was seen, False after some time or when all is closed."""
        until = time.monotonic() + seconds
        with self._changed:
            while not self._moved(seen) and not self._closed:
                left = until - time.monotonic()
                if left <= 0 or not self._changed.wait(left):
                    break
            return self._moved(seen)

    def _moved(self, seen: Sequence[tuple[str, int]]) -> bool:
        return any(self._counts[key] != count for key, count in seen)

    @property
    def closed(self) -> bool:
        """Whether nothing more will happen."""
        return self._closed

    def close(self) -> None:
        """Let everyone go who waits, now and later."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
