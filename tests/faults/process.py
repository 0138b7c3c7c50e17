"""Workers that die: one or several, in a chosen phase, all at once or while the others recover."""

import random
import signal
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from dptrain.board import RANK, STEP, Cell
from dptrain.phases import Phase
from tests.faults import jobs
from tests.faults.fault import Fault, Outcome
from tests.faults.live import Job, begun, pace, signalled, until, usual_step
from tests.faults.oracle import Surroundings, judge, undisturbed

KIND = "process"

PHASES = (
    Phase.DATA,
    Phase.FORWARD,
    Phase.BACKWARD,
    Phase.PARTIALS,
    Phase.WAITING,
    Phase.EXCHANGE,
    Phase.UPDATE,
    Phase.EVALUATION,
    Phase.CHECKPOINT,
    Phase.OTHER,
    Phase.RECOVERY,
)
"""In which a worker is to die. Only the chief writes checkpoints."""

HOW_MANY = ("one", "one", "one", "one", "several", "several", "all but one", "all")


def faults(seed: int, phases: Sequence[Phase] = PHASES) -> Iterator[Fault]:
    """Deaths without end, every one of ``phases`` in turn."""
    number = 0
    while True:
        for phase in phases:
            one = seed * 1_000_003 + number
            rng = random.Random(one)
            how_many = rng.choice(HOW_MANY)
            yield Fault(
                KIND,
                f"SIGKILL to {how_many} in {phase.name.lower()}, seed {one}",
                partial(kill, seed=one, phase=phase, how_many=how_many),
            )
            number += 1


def kill(folder: Path, *, seed: int, phase: Phase, how_many: str) -> Outcome:
    """Kill workers of a job that trains, and see what becomes of it."""
    rng = random.Random(seed)
    job = jobs.choose(rng)
    workers = rng.choice((2, 3, 4, 5))
    truth = undisturbed(job.text)
    place = Surroundings(folder)
    command, live = begun(place, job.text, workers)
    struck, recovery = "before training", None
    if live is not None:
        pace(live, rng.randrange(2, job.steps // 2))
        usual = usual_step(live)
        died = strike(live, rng, phase, how_many)
        struck = died.phase or "over"
        before = max((cell[STEP] for cell in live.cells), default=0)
        if until(lambda: live.step > before or not live.living, 10) and live.living:
            recovery = max(0.0, time.perf_counter() - died.at - usual)
    ended = place.ended(command, 240)
    return judge(place, ended, folder / "run", truth, phase=struck, recovery_seconds=recovery)


class Died:
    """In which phase the first of them was, and when the last had died."""

    def __init__(self, phase: str) -> None:
        self.phase = phase
        self.at = time.perf_counter()


def strike(live: Job, rng: random.Random, phase: Phase, how_many: str) -> Died:
    """Kill workers, the first of them in that phase if it can be had."""
    cells = live.living
    most = len(cells) - 1
    count = {"one": 1, "several": rng.randint(1, max(1, most)), "all but one": most, "all": len(cells)}[how_many]
    victims: list[Cell] = rng.sample(cells, count)
    if phase is Phase.CHECKPOINT:
        chief = min(cells, key=lambda cell: cell[RANK])
        victims = [chief, *(cell for cell in victims if cell is not chief)][: len(victims)]
    if not victims:
        return Died("over")
    if phase is Phase.RECOVERY and len(cells) > 2:
        # One dies so that the others recover; the rest die at that.
        first = victims[0]
        others = [cell for cell in cells if cell is not first]
        live.freeze(first, rng.choice(PHASES[:7]))
        signalled(first, signal.SIGKILL)
        victims = rng.sample(others, min(max(1, len(victims) - 1), len(others) - 1))
    seen = [live.freeze(victims[0], phase), *(live.freeze(cell, None) for cell in victims[1:])]
    for cell in victims:
        signalled(cell, signal.SIGKILL)
    return Died(seen[0])
