"""Run under mpirun -n 8: jobs of other arithmetics of gradients over groups of workers and machines.

``python -m tests.exchange.declared_suite FOLDER``; rank 0 writes what they came to as JSON.
"""

import json
import sys
from pathlib import Path
from typing import Any

from dptrain import arithmetic

arithmetic.choose("native", 1)

from dptrain.errors import LaunchError, PeerFailed  # noqa: E402
from dptrain.exchange.communicator import Alone  # noqa: E402
from dptrain.exchange.mpi import connect  # noqa: E402
from tests.exchange.jobs import DECLARED, JOBS, MACHINES, coordinators  # noqa: E402
from tests.exchange.suite import CONSTANT, in_groups, on_machines, trained, with_exchange  # noqa: E402

ROUNDS = ((7, 1), (5, 3), (4, 2, 2))


def main(folder: Path) -> None:
    """All cases, in the same order on all ranks."""
    world = connect(deadline=120)
    assert world.size == 8, "start it on 8 ranks"
    found: list[dict[str, Any]] = []

    def note(result: dict[str, Any], communicator: Any) -> None:
        if communicator.rank == 0:
            found.append(result)

    for name, shards, gradients in DECLARED:
        it = {"arithmetic": {"gradients": gradients, "top_k": 0.05}}
        label: dict[str, Any] = {"job": name, "shards": shards, "gradients": gradients}
        kinds = ("node",) if gradients == "top_k" else ("node", "segments")
        for sizes in ROUNDS:
            group, comm = in_groups(world, sizes)
            for kind in kinds:
                count = coordinators(comm.size, shards)
                case = {"case": kind, **label, "size": comm.size, "group": group}
                note(trained(case, with_exchange(name, shards, kind, count, **it), comm, folder), comm)
        for number, (sizes, count) in enumerate(MACHINES[2:] if len(kinds) > 1 else ()):
            _, comm = in_groups(world, (sum(sizes), 8 - sum(sizes)), on_machines(sizes, world.rank))
            if world.rank < sum(sizes):
                case = {"case": "machines", **label, "number": number, "size": comm.size}
                note(trained(case, with_exchange(name, shards, "node", count, **it), comm, folder), comm)
        if world.rank == shards % 8:
            note(
                trained({"case": "solo", **label}, with_exchange(name, shards, "solo", **it), Alone(), folder), Alone()
            )
        if world.rank == (shards + 1) % 8:
            case = {"case": "plain", **label}
            note(trained(case, with_exchange(name, shards, "solo"), Alone(), folder), Alone())

    # Begun by three workers, gone on with by five, ended by one alone; every shard has its residual again.
    for size, steps, kind in ((3, 4, "node"), (5, 9, "node"), (1, 15, "auto"), (1, 15, "straight")):
        comm = world.split(0 if world.rank < size else None)
        if comm is not None:
            train = {**JOBS["mlp"]["train"], "steps": steps, "shards": 6}
            it = {"arithmetic": {"gradients": "top_k", "top_k": 0.05}, "optimizer": CONSTANT, "train": train}
            straight = kind == "straight"
            label = {"case": "straight" if straight else "resumed", "job": "mlp"}
            done = with_exchange("mlp", 6, "solo" if straight else kind, **it)
            note({**trained(label, done, comm, folder, resume=steps > 4 and not straight), "size": size}, comm)

    for kind, gradients in (("allreduce", "bfloat16"), ("allreduce", "top_k"), ("segments", "top_k")):
        it = {"arithmetic": {"gradients": gradients}}
        label = {"case": "refused", "kind": kind, "gradients": gradients}
        try:
            trained(label, with_exchange("cnn", 8, kind, **it), world, folder)
        except (LaunchError, PeerFailed) as error:
            # Rank 0 tells of it, as the lowest that it concerns.
            note({**label, "error": str(error)}, world)

    every = world.allgather_json(found, "the end")
    if world.rank == 0:
        (folder / "found.json").write_text(json.dumps([result for some in every for result in some]))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
