"""Run under mpirun -n 8: all jobs over all groups of workers; rank 0 writes what they came to as JSON.

``python -m tests.exchange.suite FOLDER``
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dptrain import arithmetic

arithmetic.choose("native", 1)

from dptrain.exchange.communicator import Alone  # noqa: E402
from dptrain.exchange.mpi import Mpi, connect  # noqa: E402
from dptrain.job.spec import Job  # noqa: E402
from dptrain.training import run  # noqa: E402
from tests.exchange.jobs import JOBS, MACHINES, ROUNDS, SHARDS, coordinators, job  # noqa: E402


def in_groups(world: Mpi, sizes: tuple[int, ...], apart: int = 0) -> tuple[int, Mpi]:
    """This rank's group and its communicator."""
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    group = max(i for i, start in enumerate(starts) if start <= world.rank)
    communicator = world.split(group, apart)
    assert communicator is not None
    return group, communicator


def on_machines(sizes: tuple[int, ...], rank: int) -> int:
    """The machine of a rank, when machines of these sizes are dealt ranks in turn, until each has its number."""
    left = list(sizes)
    dealt: list[int] = []
    while any(left):
        for machine, some in enumerate(left):
            if some:
                dealt.append(machine)
                left[machine] -= 1
    return dealt[rank] if rank < len(dealt) else 0


def trained(label: dict[str, Any], it: Job, communicator: Any, folder: Path, **options: Any) -> dict[str, Any]:
    """Train and return the result with its label."""
    folder = folder / "-".join(str(value) for value in label.values())
    result = run(it, communicator=communicator, run_dir=folder, **options)
    return {**label, **asdict(result)}


def with_exchange(name: str, shards: int, kind: str, count: int = 0, **changes: Any) -> Job:
    """A job of jobs.py with its exchange."""
    return job(name, shards, exchange={"type": kind, "coordinators": count}, **changes)


def main(folder: Path) -> None:
    """All cases, in the same order on all ranks."""
    world = connect(deadline=120)
    assert world.size == 8, "start it on 8 ranks"
    found: list[dict[str, Any]] = []

    def note(result: dict[str, Any], communicator: Any) -> None:
        if communicator.rank == 0:
            found.append(result)

    for sizes in ROUNDS:
        group, comm = in_groups(world, sizes)
        for name in JOBS:
            for shards in SHARDS:
                for kind in ("node", "segments"):
                    count = coordinators(comm.size, shards) if group < 2 else 0
                    label = {"case": kind, "job": name, "shards": shards, "size": comm.size}
                    it = with_exchange(name, shards, kind, count)
                    note(trained({**label, "group": group}, it, comm, folder), comm)

    for number, (sizes, count) in enumerate(MACHINES):
        _, comm = in_groups(world, (sum(sizes), 8 - sum(sizes)), on_machines(sizes, world.rank))
        for name in JOBS:
            for shards in SHARDS:
                if world.rank < sum(sizes):
                    label = {"case": "machines", "number": number, "job": name, "shards": shards, "size": comm.size}
                    note(trained(label, with_exchange(name, shards, "node", count), comm, folder), comm)

    for name in JOBS:
        for shards in SHARDS:
            if world.rank == shards % 8:
                label = {"case": "solo", "job": name, "shards": shards}
                note(trained(label, with_exchange(name, shards, "solo"), Alone(), folder), Alone())

    for sizes in ((5, 3), (7, 1)):
        _, comm = in_groups(world, sizes)
        label = {"case": "allreduce", "job": "mlp", "shards": 8, "size": comm.size}
        note(trained(label, with_exchange("mlp", 8, "allreduce"), comm, folder), comm)

    # Begun by three workers, gone on with by five over another number of coordinators, ended by one alone.
    for size, steps, kind, count in ((3, 4, "segments", 1), (5, 9, "node", 5), (1, 15, "auto", 0)):
        comm = world.split(0 if world.rank < size else None)
        if comm is not None:
            changes = {"steps": steps, "evaluate_steps": 1, "shards": 8, "stop": {"patience": 99}}
            it = with_exchange("mlp", 8, kind, count, train={**JOBS["mlp"]["train"], **changes}, optimizer=CONSTANT)
            label = {"case": "resumed", "job": "mlp"}
            note({**trained(label, it, comm, folder, resume=steps > 4), "size": size}, comm)
    if world.rank == 0:
        changes = {"steps": 15, "evaluate_steps": 1, "shards": 8, "stop": {"patience": 99}}
        it = with_exchange("mlp", 8, "solo", 0, train={**JOBS["mlp"]["train"], **changes}, optimizer=CONSTANT)
        note(trained({"case": "straight", "job": "mlp"}, it, Alone(), folder), Alone())

    every = world.allgather_json(found, "the end")
    if world.rank == 0:
        (folder / "found.json").write_text(json.dumps([result for some in every for result in some]))


CONSTANT = {**JOBS["mlp"]["optimizer"], "schedule": {"type": "step", "step_size": 5}}

if __name__ == "__main__":
    main(Path(sys.argv[1]))
