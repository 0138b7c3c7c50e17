"""One death after the other in a run that goes on each time: until one worker is left, and now and then none."""

import random
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from dptrain.board import PHASE, RANK, STEP
from dptrain.phases import NAMES, Phase
from tests.faults import jobs
from tests.faults.fault import Fault, Outcome
from tests.faults.live import Job, begun, pace, until, usual_step
from tests.faults.oracle import Surroundings, judge, undisturbed
from tests.faults.process import PHASES, strike

KIND = "series"

STEPS = 640
"""Of the job, whose end must not come before the last death."""

WORKERS = (6, 7, 8)

PATIENCE = 20
"""Seconds in which those that are left must come to another step."""


def faults(seed: int, phases: Sequence[Phase] = PHASES) -> Iterator[Fault]:
    """Series without end; in each, phases come in an order of its own."""
    number = 0
    while True:
        one = seed * 1_000_003 + number
        yield Fault(KIND, f"SIGKILL again and again, seed {one}", partial(kill, seed=one, phases=phases))
        number += 1


def kill(folder: Path, *, seed: int, phases: Sequence[Phase] = PHASES) -> Outcome:
    """Kill workers of a job one after the other, see it go on each time, and what becomes of it."""
    rng = random.Random(seed)
    job = jobs.choose(rng).of(STEPS)
    workers = rng.choice(WORKERS)
    phases = rng.sample(phases, len(phases))
    to_the_last = rng.random() < 0.1
    truth = undisturbed(job.text)
    place = Surroundings(folder)
    command, live = begun(place, job.text, workers)
    struck: list[tuple[str, float | None]] = []
    stuck = ""
    while live is not None and len(live.living) > (0 if to_the_last else 1):
        pace(live, rng.randrange(2, 8))
        usual = usual_step(live)
        died = strike(live, rng, phases[len(struck) % len(phases)], "one" if len(live.living) > 1 else "all")
        if not died.phase:
            break
        went_on = _goes_on(live)
        struck.append((died.phase, max(0.0, time.perf_counter() - died.at - usual) if went_on else None))
        if not went_on:
            stuck = _whereabouts(live)
            break
    ended = place.ended(command, 180)
    (phase, seconds), *more = struck or [("before training", None)]
    outcome = judge(place, ended, folder / "run", truth, phase=phase, recovery_seconds=seconds)
    note = outcome.note
    if stuck:
        note = f"{note}; left in {stuck} {PATIENCE} s after the last death".lstrip("; ")
    return Outcome(outcome.verdict, phase, seconds, note, tuple(more))


def _goes_on(live: Job) -> bool:
    """Whether those that are left come to another step."""
    before = max(cell[STEP] for cell in live.cells)
    return until(lambda: live.step > before or not live.living, PATIENCE) and bool(live.living)


def _whereabouts(live: Job) -> str:
    """What those that are left are at, for whoever looks for the cause."""
    return ", ".join(f"{NAMES[cell[PHASE]]} of step {cell[STEP]} (rank {cell[RANK]})" for cell in live.living)
