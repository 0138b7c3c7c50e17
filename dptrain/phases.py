"""Where a worker's time goes: every moment of it belongs to one phase."""

import time
from collections.abc import Callable
from enum import IntEnum

from dptrain.board import BEAT, BEGUN, PHASE, STEP, private


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
    RECOVERY = 10


NAMES = tuple(phase.name.lower() for phase in Phase)
"""The phases as journal, result and trace call them."""

OWN = (Phase.DATA, Phase.FORWARD, Phase.BACKWARD, Phase.PARTIALS)
"""What a worker does of a step before it enters the exchange; no other worker can keep it waiting there."""


class Phases:
    """Adds up the seconds of each phase. One call at each border: what begins ends what was before.

    ``step`` is the step that time belongs to, as the journal counts; ``since`` is when the phase began, by the clock.
    ``cell`` is told of every border and step, for who watches this worker from outside.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock = clock
        self.cell = private()
        self.start()

    def start(self) -> None:
        """Forget all; time counts from now."""
        self.seconds = [0.0] * len(Phase)
        self.at(0)
        self._phase = Phase.OTHER
        self.since = self.clock()

    def at(self, step: int) -> None:
        """From now on time belongs to ``step``."""
        self.step = self.cell[STEP] = step
        if step:
            self.cell[BEGUN] += 1

    def begin(self, phase: Phase, detail: str = "") -> None:
        """From now on time belongs to ``phase``; ``detail`` says more, such as a layer's name."""
        now = self.clock()
        self.seconds[self._phase] += now - self.since
        self._phase = phase
        self.since = now
        cell = self.cell
        cell[PHASE] = phase
        cell[BEAT] += 1

    def named(self) -> dict[str, float]:
        """The seconds of each phase until the last border, by the phase's name."""
        return dict(zip(NAMES, self.seconds, strict=True))
