"""Runs whose gradients may be late, struck as those of other servers are: staleness is bounded, the log tells it."""

import random
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from dptrain.journal import read_all
from dptrain.rundir import ARRIVALS
from tests.faults import jobs
from tests.faults.fault import Fault, Outcome
from tests.faults.oracle import PROGRAM, Surroundings, judge
from tests.faults.servers import LEASE, STEPS, Run

KIND = "stale"

BOUNDS: tuple[int | None, ...] = (None, 1, 2, 5)
"""Of async, and of ssp."""


def faults(seed: int) -> Iterator[Fault]:
    """Series without end, over one to three servers with and without a standby."""
    number = 0
    while True:
        one = seed * 1_000_003 + number
        bound, servers, standby = BOUNDS[number % 4], number % 3 + 1, number % 2 == 0
        name = f"{'async' if bound is None else f'ssp {bound}'}, {servers} with {'a' if standby else 'no'} standby, "
        action = partial(strike, seed=one, bound=bound, servers=servers, standby=standby)
        yield Fault(KIND, f"{name}seed {one}", action)
        number += 1


def strike(folder: Path, *, seed: int, bound: int | None, servers: int, standby: bool) -> Outcome:
    """Strike a job that trains now and then, look at what its log says of staleness, and replay it."""
    rng = random.Random(seed)
    place = Surroundings(folder)
    (folder / "job.toml").write_text(jobs.choose(rng).of(STEPS).text)
    asked = ["-n", str(rng.choice((2, 3, 4))), "--exchange", "ps", "--servers", str(servers)]
    asked += ["--standby"] if standby else []
    asked += ["--set", f"exchange.mode={'async' if bound is None else 'ssp'}"]
    asked += [] if bound is None else ["--set", f"exchange.staleness={bound}"]
    asked += ["--set", f"exchange.staleness_lr={rng.choice(('constant', 'inverse'))}"]
    asked += ["--set", f"exchange.lease_seconds={LEASE}", "--set", f"exchange.host_sum={rng.choice(('true', 'false'))}"]
    run = Run(place, place.start([*PROGRAM, "run", "job.toml", "--run-dir", "run", "--progress", "none", *asked]), rng)
    first, *more = run.struck()
    ended = place.ended(run.command, 240)
    run.dismiss()
    outcome = judge(place, ended, folder / "run", None, phase=first)
    if outcome.good:
        outcome = replayed(place, bound, outcome)
    return Outcome(outcome.verdict, first, None, outcome.note, tuple((what, None) for what in more))


def replayed(place: Surroundings, bound: int | None, outcome: Outcome) -> Outcome:
    """What becomes of a good outcome where the log shows too late an update, or leads to other weights."""
    late = [line["staleness"] for line in read_all(place.folder / "run" / ARRIVALS)]
    if not late or (bound is not None and max(late) > bound):
        return Outcome("wrong staleness", outcome.phase, None, f"{max(late, default=None)} where {bound} is allowed")
    again = place.run([*PROGRAM, "replay", "run"], 240)
    if again.code is None:
        return Outcome("hung", outcome.phase, None, f"the replay outlasted its deadline\n{again.said}")
    if again.code:
        return Outcome("wrong hash", outcome.phase, None, f"the replay: {again.said}")
    left = place.leftovers()
    return Outcome("leftover", outcome.phase, None, "; ".join(left)) if left else outcome
