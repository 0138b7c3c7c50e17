"""Waiting for what others do: a counter for each thing, and a wait for it to move."""

import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence


class Bell:
    """Threads wait for a key to be rung, and only those that wait for it are woken. A ring between looking and waiting
    is not missed: each wait names the count that it saw.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._waiting: defaultdict[str, set[threading.Event]] = defaultdict(set)
        self._closed = False
        self._listeners: list[Callable[[tuple[str, ...]], None]] = []

    def listen(self, listener: Callable[[tuple[str, ...]], None]) -> None:
        """Call this with the keys at every ring. It must neither wait nor raise."""
        self._listeners.append(listener)

    def ring(self, *keys: str) -> None:
        """Something has happened to these keys."""
        with self._lock:
            self._counts.update(keys)
            woken = {event for key in keys for event in self._waiting.get(key, ())}
        for event in woken:
            event.set()
        for listener in self._listeners:
            listener(keys)

    def count(self, key: str) -> int:
        """How often it was rung so far. Take it before looking at the thing itself."""
        with self._lock:
            return self._counts[key]

    def wait_any(self, seen: Sequence[tuple[str, int]], seconds: float) -> bool:
        """Return True when a key's count is another than was seen, False after some time or when all is closed."""
        woken = threading.Event()
        with self._lock:
            if self._closed or self._moved(seen):
                return self._moved(seen)
            for key, _ in seen:
                self._waiting[key].add(woken)
        woken.wait(seconds)
        with self._lock:
            for key, _ in seen:
                self._waiting[key].discard(woken)
                if not self._waiting[key]:
                    del self._waiting[key]
            return self._moved(seen)

    def _moved(self, seen: Sequence[tuple[str, int]]) -> bool:
        return any(self._counts[key] != count for key, count in seen)

    @property
    def closed(self) -> bool:
        """Whether nothing more will happen."""
        return self._closed

    def close(self) -> None:
        """Let everyone go who waits, now and later."""
        with self._lock:
            self._closed = True
            woken = set().union(*self._waiting.values())
        for event in woken:
            event.set()
