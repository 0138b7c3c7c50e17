"""dptrain with or without what survival takes: fault tolerance and watchdog, checkpoints in the background.

Under mpirun it trains, and rank 0 prints one line of JSON; alone it starts that with the MPI of its own environment.
"""

import json
import os
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from bench import spawn
from bench.contestants.ours import Lines, job, measured
from bench.workload import Workload
from dptrain import rundir
from dptrain.launch import announced
from dptrain.ranks import follow, lead

ALL = 1_000
"""Generations of checkpoints that stay, so that they can be counted."""


@dataclass(frozen=True)
class Survival:
    """Whether deaths within a step and hangs are survived, and seconds between checkpoints (0: none)."""

    tolerant: bool = True
    checkpoint_seconds: float = 0.0

    def text(self) -> str:
        """This as a program's argument."""
        return json.dumps(asdict(self))

    @classmethod
    def parse(cls, text: str) -> "Survival":
        """The reverse of ``text``."""
        return cls(**json.loads(text))


def launch(work: Workload, survival: Survival) -> spawn.Found:
    """Train under this environment's mpirun, with its fault tolerance if it has one. Raises NotRun."""
    return spawn.mpirun(work.workers, "bench.contestants.survivable", work.text(), survival.text())


def train(work: Workload, survival: Survival) -> None:
    """Train as one of the workers; rank 0 prints what it came to, and what of survival there was."""
    place = announced(os.environ)
    if place.rank:
        sys.exit(follow(place))
    it = job(work, work.workers, "auto")
    it = replace(
        it,
        exchange=it.exchange if survival.tolerant else replace(it.exchange, hang_seconds=0.0),
        output=replace(it.output, checkpoint_seconds=survival.checkpoint_seconds, generations=ALL),
    )
    from dptrain.exchange.mpi import FAULT_TOLERANT

    observer = Lines()
    with tempfile.TemporaryDirectory() as folder:
        with lead(place) as leader:
            leader.train(it, run_dir=f"{folder}/run", observer=observer)
        kept = (Path(folder) / "run" / rundir.CHECKPOINTS).glob("step-*")
        steps = sorted(int(path.name.removeprefix("step-")) for path in kept)
    # That of the end is written after the last step.
    during = [step for step in steps if step < work.total_steps]
    found = {"checkpoints": len(during), "tolerant": os.environ.get(FAULT_TOLERANT, "") not in ("", "0", "false")}
    print(json.dumps({**measured(work, observer.lines), **found}), flush=True)


def main(work: Workload, survival: Survival) -> None:
    """Train, or start those that do."""
    if announced(os.environ).alone:
        os.environ["DPTRAIN_FT"] = "on" if survival.tolerant else "off"
        print(json.dumps(launch(work, survival)), flush=True)
    else:
        train(work, survival)


if __name__ == "__main__":
    main(Workload.parse(sys.argv[1]), Survival.parse(sys.argv[2]))
