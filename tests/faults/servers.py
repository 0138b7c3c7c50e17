"""Servers and workers without MPI that are killed, stopped for a while or for good, and joined by others."""

import contextlib
import os
import random
import signal
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from tests.faults import jobs
from tests.faults.fault import Fault, Outcome
from tests.faults.live import step_of, until
from tests.faults.oracle import PROGRAM, Command, Surroundings, judge, undisturbed

KIND = "servers"

STEPS = 600
"""Of the job, whose end must not come before the last strike."""

LEASE = 2.0
"""Seconds without a sign of life after which a worker has lost its shards, and a server its place."""

STRIKES = (
    "kill a worker",
    "kill a worker",
    "stop a worker",
    "pause a worker",
    "join",
    "kill a server",
    "pause a server",
)


def faults(seed: int) -> Iterator[Fault]:
    """Series without end, over one to three servers with and without a standby."""
    number = 0
    while True:
        one = seed * 1_000_003 + number
        servers, standby = number % 3 + 1, number % 2 == 0
        name = f"{servers} with {'a' if standby else 'no'} standby, seed {one}"
        yield Fault(KIND, name, partial(strike, seed=one, servers=servers, standby=standby))
        number += 1


def strike(folder: Path, *, seed: int, servers: int, standby: bool) -> Outcome:
    """Strike a job that trains now and then, and see what becomes of it."""
    rng = random.Random(seed)
    text = jobs.choose(rng).of(STEPS).text
    if rng.random() < 0.3:
        # Its residuals lie with the workers.
        text += '\n[arithmetic]\ngradients = "top_k"\ntop_k = 0.05\n'
    truth = undisturbed(text)
    place = Surroundings(folder)
    (folder / "job.toml").write_text(text)
    asked = ["-n", str(rng.choice((2, 3, 4))), "--exchange", "ps", "--servers", str(servers)]
    asked += ["--standby"] if standby else []
    asked += ["--set", f"exchange.lease_seconds={LEASE}", "--set", f"exchange.host_sum={rng.choice(('true', 'false'))}"]
    run = Run(place, place.start([*PROGRAM, "run", "job.toml", "--run-dir", "run", "--progress", "none", *asked]), rng)
    first, *more = run.struck()
    ended = place.ended(run.command, 240)
    run.dismiss()
    outcome = judge(place, ended, folder / "run", truth, phase=first)
    return Outcome(outcome.verdict, first, None, outcome.note, tuple((what, None) for what in more))


class Run:
    """A run and its processes, as seen from outside."""

    def __init__(self, place: Surroundings, command: Command, rng: random.Random) -> None:
        self.place, self.command, self.rng = place, command, rng
        self._joined: list[Command] = []

    def struck(self) -> list[str]:
        """Strike now and then; what was done."""
        rng = self.rng
        steps = sorted(rng.sample(range(5, STEPS - 100), rng.randrange(1, 6)))
        done = [what for step in steps if self.reaches(step) and (what := self.strike(rng.choice(STRIKES)))]
        return done or ["before training"]

    def reaches(self, step: int) -> bool:
        """Whether it comes to a step before it ends."""
        until(lambda: step_of(self.place.folder / "run") >= step or not self.command.running, 120, nap=0.02)
        return self.command.running

    def strike(self, what: str) -> str:
        """Do that, and say what was done; "" where there was nobody to do it to."""
        if what == "join":
            return self._join()
        action, _, whom = what.split()
        pids = self._processes("param-server" if whom == "server" else "worker")
        if action == "stop":
            # One at least goes on: a job whose workers are all stopped waits for others.
            pids = [pid for pid in pids if _state(pid) != "T"][1:]
        if not pids:
            return ""
        pid = self.rng.choice(pids)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL if action == "kill" else signal.SIGSTOP)
            if action == "pause":
                time.sleep(self.rng.uniform(0.05, 0.5 * LEASE))
                os.kill(pid, signal.SIGCONT)
        return what

    def _join(self) -> str:
        """One more worker, which dials those servers that there are."""
        addresses = []
        for pid in self._processes("param-server"):
            words = _words(pid)
            addresses.append(words[words.index("--listen") + 1])
        if not addresses:
            return ""
        self._joined.append(self.place.start([*PROGRAM, "worker", "--server", ",".join(sorted(addresses))]))
        return "join"

    def dismiss(self) -> None:
        """End those who joined too late: they dial on, as a server may be started after its workers."""
        for worker in self._joined:
            if worker.running:
                # Some are stopped, and would not end otherwise.
                worker.process.kill()
                worker.process.wait()

    def _processes(self, command: str) -> list[int]:
        return [pid for pid in sorted(self.place.processes()) if command in _words(pid)]


def _words(pid: int) -> list[str]:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    return []


def _state(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    return "X"
