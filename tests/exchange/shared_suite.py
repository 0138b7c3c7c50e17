"""Run under mpirun -n 4: ways of sharing memory that fail, and what memory a machine holds.

``python -m tests.exchange.shared_suite FOLDER SHARED``; rank 0 writes what it found as JSON. Memory with a name is in
SHARED.
"""

import json
import sys
from pathlib import Path
from typing import Any

from dptrain import arithmetic

arithmetic.choose("native", 1)

from dptrain import parts  # noqa: E402
from dptrain.errors import DptrainError  # noqa: E402
from dptrain.exchange import shared_memory  # noqa: E402
from dptrain.exchange.mpi import Mpi, connect  # noqa: E402
from dptrain.exchange.segments import Memory  # noqa: E402
from dptrain.exchange.shared_memory import Reserved, in_dev_shm, nameless  # noqa: E402
from dptrain.training import run  # noqa: E402
from tests.exchange.jobs import job  # noqa: E402

PARAMETERS = 8_000_000


def out_of_reach(nbytes: int) -> Reserved:
    """Memory that nobody else can open, as in containers that have each their own."""
    made = nameless(nbytes)
    made.path = "/proc/self/fd/none"
    return made


def attempt(world: Mpi, folder: Path, *ways: Any) -> dict[str, Any]:
    """What becomes of a run that can share memory in these ways only."""
    shared_memory.WAYS = ways
    shared_memory.FOLDER = Path(sys.argv[2])
    before = set(shared_memory.FOLDER.glob("dptrain-*"))
    try:
        result = run(job("mlp", 8), communicator=world, run_dir=folder)
        said: dict[str, Any] = {"weights": result.weights_sha256, "exchange": result.exchange}
    except DptrainError as error:
        said = {"error": str(error)}
    world.barrier("the end of an attempt")
    every = world.allgather_json(said, "the end of an attempt")
    left = sorted(str(path) for path in set(shared_memory.FOLDER.glob("dptrain-*")) - before)
    return {"said": every, "left": left}


def pages(kind: str) -> int:
    """Bytes of pages that this process has mapped; as Pss each is divided by the number of processes that did."""
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith(f"{kind}:"):
            return int(line.split()[1]) * 1024
    raise AssertionError(kind)


def held(world: Mpi) -> dict[str, Any]:
    """Shared pages before and after making the exchange of a large model, and what it says it needs."""
    shared_memory.WAYS = (nameless,)
    inputs = PARAMETERS // 500
    changes: dict[str, Any] = {
        "data": {"synthetic": {"rows": 64, "shape": [inputs], "classes": 2}},
        "model": {"layers": [{"type": "linear", "units": 500}, {"type": "linear", "units": 2}]},
        "optimizer": {"type": "sgd", "lr": 0.1, "momentum": 0.9, "clip_norm": 0.0},
        "train": {"batch_size": 8, "epochs": 1},
    }
    before = pages("Pss_Shmem")
    made = parts.Parts(job("cnn", 4, **changes), None, world)
    world.barrier("made")
    store = made.exchange.store
    for place in (store.weights(0), store.weights(1), *store.slots(0), *store.slots(1), made.exchange.outbox):
        place.sum()  # a page counts where it is mapped
    world.barrier("touched")
    after = pages("Pss_Shmem")
    layout, rows = made.update.layout, [len(made.exchange.outbox)] * world.size
    need = Memory(layout, len(made.update.optimizer.slots), "float32", rows).nbytes
    every = world.allgather_json(after - before, "the end")
    return {"pss": sum(every), "need": need, "state": 4 * layout.size * 4, "outboxes": sum(rows) * layout.size * 4}


def main(folder: Path) -> None:
    """All attempts, on all ranks alike."""
    world = connect(deadline=120)
    found = {
        "nameless": attempt(world, folder / "nameless", nameless),
        "file": attempt(world, folder / "file", out_of_reach, in_dev_shm),
        "nothing": attempt(world, folder / "nothing", out_of_reach),
        "held": held(world),
    }
    if world.rank == 0:
        (folder / "shared.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
