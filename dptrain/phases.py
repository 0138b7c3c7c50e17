"""Where a worker's time goes: every moment of it belongs to one phase."""

import time
from enum import IntEnum


class Phase(IntEnum):
    """What a worker is at. WAITING is for others; EXCHANGE moves and adds what others computed."""

    OTHER = 0
    DATA = 1
    FORWARD = 2
    BACKWARD = 3
    PARTIALS = 4
    WAITING = 5
    EXCHANGE = 6
    UPDATE = 7
    EVALUATION = 8
    CHECKPOINT = 9


class Phases:
    """Adds up the seconds of each phase. One call at each border: what begins ends what was before."""

    def __init__(self) -> None:
        self.seconds = [0.0] * len(Phase)
        self._phase = Phase.OTHER
        self._since = time.perf_counter()

    def begin(self, phase: Phase, detail: str = "") -> None:
        """From now on time belongs to ``phase``; ``detail`` says more, such as a layer's name."""
        now = time.perf_counter()
        self.seconds[self._phase] += now - self._since
        self._phase, self._since = phase, now
