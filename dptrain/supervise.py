"""The supervisor: has mpirun run a job, and after a fault starts it again from its newest checkpoint.

It believes result.json, never the launcher's code. An error of the job is no fault: it ends the job.
"""

import contextlib
import json
import signal
import time
from collections.abc import Callable
from pathlib import Path

from dptrain.errors import CheckpointError, WorkerLost
from dptrain.launcher import RECENT, Launcher, Outcome, Start

MAX_RESTARTS = 3

PAUSE, LONGEST_PAUSE = 1.0, 30.0
"""Seconds before the first restart without progress, doubled with each, and the most."""

_HIGHEST_CODE = 3
"""Workers leave with codes up to this one."""


def supervise(
    start: Callable[[Path | None], Start],
    by_hand: Callable[[Path | None], str],
    tell: Callable[[str], None],
    max_restarts: int = MAX_RESTARTS,
    shared: Path | None = None,
) -> int:
    """Run a job to its end, whatever becomes of its launchers, and return the exit code.

    ``start`` says how to begin (None) or to go on with a run directory, ``by_hand`` with which command a person does
    that, ``tell`` shows a line to a person. The code is 0 where there is a result, that of the error which failed the
    job, or after a request to stop the launcher's (128 + N where signal N ended it). Raises WorkerLost after
    ``max_restarts`` restarts in a row that brought no newer checkpoint, or two launches that did not begin to train.
    For requests to stop, and ``shared``, see :class:`dptrain.launcher.Launcher`.
    """
    return _Supervisor(start, by_hand, tell, max_restarts, shared).run()


class _Supervisor:
    def __init__(
        self,
        start: Callable[[Path | None], Start],
        by_hand: Callable[[Path | None], str],
        tell: Callable[[str], None],
        max_restarts: int,
        shared: Path | None,
    ) -> None:
        self.start, self.by_hand, self.tell = start, by_hand, tell
        self.max_restarts, self.shared = max_restarts, shared
        self.run_dir: Path | None = None
        self.reached = 0
        self.causes: list[str] = []
        self.unopened = 0

    def run(self) -> int:
        with Launcher(self.tell, self.shared) as launcher:
            while True:
                outcome = launcher.launch(self.start(self.run_dir))
                if outcome.succeeded:
                    return 0
                if outcome.failure is not None:
                    return int(outcome.failure["code"])
                if launcher.requests:
                    return 128 - outcome.code if outcome.code < 0 else outcome.code or 1
                launcher.pause(self._fault(outcome))
                if launcher.requests:
                    self.tell(f"not started again; to go on: {self.by_hand(self.run_dir)}")
                    return 1

    def _fault(self, outcome: Outcome) -> float:
        """Name a fault and say after how many seconds to start again. Raises WorkerLost where that is not to be."""
        self.unopened = 0 if outcome.run else self.unopened + 1
        if outcome.run is not None:
            self.run_dir = Path(outcome.run["run_dir"])
            self.reached = max(self.reached, outcome.run["step"])
        newest = 0 if self.run_dir is None else newest_step(self.run_dir)
        if newest > self.reached:
            self.reached = newest
            self.causes.clear()
        cause = cause_of(outcome)
        self.causes.append(cause)
        restart = len(self.causes)
        if self.unopened > 1:
            raise self._lost("workers that open the run directory", "none", "`dptrain doctor` looks at this machine; ")
        if restart > self.max_restarts:
            restarts = "1 restart" if self.max_restarts == 1 else f"{self.max_restarts} restarts"
            raise self._lost(f"a result, or a newer checkpoint within {restarts}", f"none after step {newest}", "")
        pause = min(LONGEST_PAUSE, PAUSE * 2.0 ** (restart - 1))
        place = "from the beginning" if self.run_dir is None else f"from step {newest}"
        self.tell(f"{cause}: starting again {place} in {pause:g} s (restart {restart} of {self.max_restarts})")
        self._write_down({"time": round(time.time(), 3), "cause": cause, "step": newest, "restart": restart})
        return pause

    def _write_down(self, line: dict[str, object]) -> None:
        """Have whoever looks at the run know that it is started again; a full disk must not end the job."""
        from dptrain import rundir

        if self.run_dir is not None:
            with contextlib.suppress(OSError), (self.run_dir / rundir.RESTARTS).open("a") as file:
                file.write(json.dumps(line) + "\n")

    def _lost(self, expected: str, found: str, cure: str) -> WorkerLost:
        causes = "; ".join(f"({number}) {cause}" for number, cause in enumerate(self.causes, 1))
        return WorkerLost(
            "the job" if self.run_dir is None else f"run {self.run_dir}",
            expected=expected,
            found=f"{found}: {causes}",
            cure=f"{cure}remove the cause, then go on with `{self.by_hand(self.run_dir)}`",
        )


def cause_of(outcome: Outcome) -> str:
    """Why a launch ended without a result, as far as that can be known."""
    last = time.time() - RECENT
    hung = [line for line in outcome.ended if line["time"] > last]
    if hung:
        return "; ".join(
            f"rank {line['rank']} ({line['host']}) at step {line['step']} in {line['phase']} {line['why']}; ended"
            for line in hung
        )
    code = outcome.code
    if outcome.stuck:
        return outcome.stuck
    if code < 0:
        return f"mpirun was ended by {_signal(-code)}"
    # PRRTE adds 128 to the number of the signal, Hydra doesn't; no worker leaves with such codes itself.
    number = code - 128 if code > 128 else code
    known = len(outcome.first) == 1 and outcome.first[0] >= 0
    who = f"rank {outcome.first[0]}" if known else "a worker"
    if number > _HIGHEST_CODE and number in set(signal.Signals):
        return f"{who} was ended by {_signal(number)}"
    first = f"; the first to end was {who}" if known else ""
    return f"mpirun ended with code {code} and no result{first}"


def newest_step(run_dir: Path) -> int:
    """The step of a run's newest good checkpoint; 0 where there is none."""
    from dptrain import arithmetic

    # numpy would start threads, and this process forks.
    arithmetic.choose("native", 1)
    from dptrain import checkpoint, rundir

    for generation in checkpoint.generations(run_dir / rundir.CHECKPOINTS):
        with contextlib.suppress(CheckpointError):
            return int(checkpoint.read_manifest(generation)["step"])
    return 0


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
