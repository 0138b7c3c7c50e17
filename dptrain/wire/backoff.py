"""How long to wait before the next attempt to reach a server."""

import random
from collections.abc import Iterator

FIRST_SECONDS = 0.1
MOST_SECONDS = 5.0


def delays(rng: random.Random, *, first: float = FIRST_SECONDS, most: float = MOST_SECONDS) -> Iterator[float]:
    """Seconds before each further attempt, for ever: twice as long each time up to ``most``, half of it by chance.

    Chance keeps many clients of a server that went away from coming back in one moment.
    """
    ceiling = first
    while True:
        yield ceiling * rng.uniform(0.5, 1.0)
        ceiling = min(2 * ceiling, most)
