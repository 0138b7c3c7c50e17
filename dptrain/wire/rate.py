"""How often somebody may do something: a bucket for each, filled at a steady rate up to a brim (token bucket)."""

import threading
from collections.abc import Callable

MOST_BUCKETS = 10_000


class Rates:
    """``take`` may be called ``burst`` times at once and ``per_second`` times a second in the long run, by each key."""

    def __init__(self, per_second: float, burst: int, clock: Callable[[], float]) -> None:
        self._per_second = per_second
        self._burst = float(burst)
        self._clock = clock
        self._lock = threading.Lock()
        self._buckets: dict[str, tuple[float, float]] = {}

    def take(self, key: str) -> bool:
        """Whether ``key`` may now; if so, it has. Threads may call it at once."""
        with self._lock:
            now = self._clock()
            left, since = self._buckets.get(key, (self._burst, now))
            left = min(self._burst, left + (now - since) * self._per_second)
            if len(self._buckets) >= MOST_BUCKETS and key not in self._buckets:
                self._forget(now)
            self._buckets[key] = (left - 1.0 if left >= 1.0 else left, now)
            return left >= 1.0

    def _forget(self, now: float) -> None:
        """Leave out the buckets that are full by now: they are as good as new ones."""
        self._buckets = {
            key: (left, since)
            for key, (left, since) in self._buckets.items()
            if left + (now - since) * self._per_second < self._burst
        }
