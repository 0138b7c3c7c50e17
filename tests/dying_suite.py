"""Run under Open MPI with --with-ft ulfm: workers that end themselves at chosen borders between phases.

``python -m tests.dying_suite FOLDER SEED``. Runs follow one another with those that are left; the lowest of them
writes what they came to as JSON. Machines are simulated: who is on which is told to MPI's wrapper.
"""

import json
import os
import random
import signal
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dptrain import arithmetic

arithmetic.choose("native", 1)

from dptrain.exchange.communicator import Alone  # noqa: E402
from dptrain.exchange.mpi import Mpi, connect  # noqa: E402
from dptrain.phases import Phase, Phases  # noqa: E402
from dptrain.training import run  # noqa: E402
from tests.exchange.jobs import JOBS, job  # noqa: E402

MACHINES = ((6,), (3, 3), (2, 1, 3), (1, 1, 1, 1, 1, 1), (4, 2))
SHARDS = (8, 6, 5, 12)
BORDERS = 700
"""About as many borders as a worker passes in one of these runs."""


class Mortal:
    """Ends this process at a border between phases of a run that has begun to train."""

    def __init__(self) -> None:
        self.left = -1
        begin = Phases.begin

        def counted(phases: Phases, phase: Phase, detail: str = "") -> None:
            begin(phases, phase, detail)
            if phases.step and self.left >= 0:
                self.left -= 1
                if self.left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        Phases.begin = counted  # type: ignore[method-assign]


def one(world: Mpi, mortal: Mortal, rng: random.Random, number: int, folder: Path) -> dict[str, Any]:
    """A run in which some die; all workers draw alike."""
    name = rng.choice(list(JOBS))
    shards = rng.choice(SHARDS)
    kind = rng.choice(("node", "node", "segments"))
    first, second = rng.sample(range(world.size), 2)
    border = rng.randrange(BORDERS // 2)
    victims = {first: border}
    if world.size > 2 and rng.random() < 0.4:
        # Some steps later: a second death while the same step is computed would be poison.
        victims[second] = border + rng.randrange(150, BORDERS // 2)
    mortal.left = victims.get(world.rank, -1)
    gradients = rng.choice(("auto", "bfloat16", "top_k"))
    if gradients == "top_k" and (kind != "node" or len(world.machines()) > 1):
        gradients = "float16"
    arithmetic = {"gradients": gradients, "top_k": 0.05}
    it = job(name, shards, exchange={"type": kind, "coordinators": rng.choice((0, 0, 1))}, arithmetic=arithmetic)
    found = asdict(run(it, communicator=world, run_dir=folder / str(number)))
    mortal.left = -1
    return {"job": name, "shards": shards, "kind": kind, "victims": victims, "declared": arithmetic, **found}


def main(folder: Path, seed: int) -> None:
    """Runs until two workers are left, then what each of their jobs comes to alone."""
    rng = random.Random(seed)
    machines = rng.choice(MACHINES)
    everyone = connect(deadline=60)
    places = [machine for machine, size in enumerate(machines) for _ in range(size)]
    world = everyone.split(0, places[everyone.rank])
    assert world is not None
    mortal = Mortal()
    found = []
    for number in range(8):
        if world.size < 2:
            break
        found.append(one(world, mortal, rng, number, folder))
    if world.rank == 0:
        for number, result in enumerate(found):
            it = job(result["job"], result["shards"], arithmetic=result["declared"])
            alone = run(it, communicator=Alone(), run_dir=folder / f"solo{number}")
            result["solo"] = alone.weights_sha256
        (folder / "found.json").write_text(json.dumps({"machines": machines, "found": found}))
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
