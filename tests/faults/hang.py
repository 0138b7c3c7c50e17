"""Workers that stop: for good, which is to be noticed and survived, or for less than the deadline, which is not."""

import random
import re
import signal
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from dptrain.board import RANK
from dptrain.phases import Phase
from tests.faults import jobs
from tests.faults.fault import Fault, Outcome
from tests.faults.live import begun, pace, signalled
from tests.faults.oracle import Surroundings, judge, undisturbed

KIND = "hang"

DEADLINE = 5.0
"""Seconds, the shortest that the product has."""

PHASES = (Phase.FORWARD, Phase.WAITING, Phase.UPDATE, Phase.DATA, Phase.EVALUATION, Phase.CHECKPOINT)


def faults(seed: int) -> Iterator[Fault]:
    """Two that stop for good for each that pauses."""
    number = 0
    while True:
        one = seed * 1_000_003 + number
        phase = PHASES[number % len(PHASES)]
        pauses = number % 3 == 2
        yield Fault(
            KIND,
            f"SIGSTOP {'for a while' if pauses else 'for good'} in {phase.name.lower()}, seed {one}",
            partial(stop, seed=one, phase=phase, pauses=pauses),
        )
        number += 1


def stop(folder: Path, *, seed: int, phase: Phase, pauses: bool) -> Outcome:
    """Stop a worker of a job that trains, and see what becomes of it."""
    rng = random.Random(seed)
    job = jobs.choose(rng)
    workers = rng.choice((2, 3, 4))
    truth = undisturbed(job.text)
    place = Surroundings(folder)
    command, live = begun(place, job.text, workers)
    struck, said, rank = "before training", "", -1
    if live is not None:
        pace(live, rng.randrange(2, job.steps // 2))
        cells = live.living
        if cells:
            cell = min(cells, key=lambda cell: cell[RANK]) if phase is Phase.CHECKPOINT else rng.choice(cells)
            rank = cell[RANK]
            struck = live.freeze(cell, phase) or "over"
            if pauses and struck != "over":
                time.sleep(rng.uniform(0.1, 0.5 * DEADLINE))
                signalled(cell, signal.SIGCONT)
            elif struck != "over":
                said = rf"rank {rank} at step \d+ in \w+ was stopped for [\d.]+ s: ended"
    ended = place.ended(command, 240)
    if pauses and re.search("was stopped|no sign of life|died", ended.err):
        place.kill()
        return Outcome("wrong error", struck, note=f"a pause was taken for a hang\n{ended.said}")
    return judge(place, ended, folder / "run", truth, phase=struck, said=said)
