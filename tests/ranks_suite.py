"""Run under mpirun -n 3: runs that end badly, or are stopped, among several workers; each rank writes what it saw.

``python -m tests.ranks_suite FOLDER``. A failure that all workers agree on leaves their communicator whole, so one
launch goes through all of them.
"""

import json
import signal
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dptrain import arithmetic

arithmetic.choose("native", 1)

from dptrain.errors import DptrainError  # noqa: E402
from dptrain.exchange.communicator import Alone, Communicator  # noqa: E402
from dptrain.exchange.mpi import connect  # noqa: E402
from dptrain.job.load import check, complete  # noqa: E402
from dptrain.training import run  # noqa: E402
from dptrain.watch import Unwatched  # noqa: E402
from tests.softmax import (  # noqa: E402
    LAYERS,
    Batched,
    Counting,
    Drawing,
    Merging,
    Noisy,
    Single,
    Softmax,
    fail,
    job,
    kill,
    nan,
    quit,
)

SKIP = {"non_finite": "skip"}


class Failing(Unwatched):
    """A chief that can't show what it does."""

    def progressed(self, line: Mapping[str, Any]) -> None:
        raise BrokenPipeError("gone")


class Blocking(Unwatched):
    """Puts a file where the checkpoints would go."""

    def started(self, info: Mapping[str, Any]) -> None:
        (Path(info["run_dir"]) / "checkpoints").write_text("in the way")


def train(folder: Path, communicator: Communicator, model: Any = None, **options: Any) -> dict[str, Any]:
    """What one worker sees of a run: its result, or its error."""
    observer, resume = options.pop("observer", None), options.pop("resume", False)
    content = complete(check(job(*([] if model else [LAYERS]), **options), "x"), own_model=model is not None)
    try:
        result = run(content, model=model, run_dir=folder, resume=resume, observer=observer, communicator=communicator)
        return asdict(result)
    except DptrainError as error:
        agreed = communicator.agreed or error.everywhere
        return {"error": type(error).__name__, "code": error.exit_code, "text": str(error), "agreed": agreed}


def main(folder: Path) -> None:
    """All cases, in the same order on all ranks; ``on`` gives one rank another model."""
    world = connect(deadline=60)
    rank = world.rank
    found: dict[str, Any] = {}

    def case(name: str, model: Any = None, *, among: int = 3, place: str = "", **options: Any) -> None:
        communicator = world.split(0 if rank < among else None)
        if communicator is not None:
            found[name] = train(folder / (place or name), communicator, model, **options)

    def alone(name: str, model: Any = None, **options: Any) -> None:
        if rank == 0:
            found[name] = train(folder / name, Alone(), model, **options)

    def on(which: int, special: Counting) -> Counting:
        if rank != which:
            special.left = 0
        return special

    alone("softmax alone", Softmax())
    alone("counting alone", Counting(0, fail))
    for name, model in (("softmax", Softmax()), ("batched", Batched()), ("merging", Merging()), ("noisy", Noisy())):
        case(name, model)
    alone("single alone", Single())
    case("raises", on(1, Counting(5 + 2 * 3 + 1, fail)))
    case("leaves", on(2, Counting(5 + 2 * 3 + 1, quit)))
    case("raises while evaluating", on(0, Counting(6, fail, training=False)))
    case("raises while probing", on(1, Counting(3, fail)))
    case("observer", Softmax(), observer=Failing())
    case("full disk", Softmax(), observer=Blocking())
    case("nan", Drawing(0.03, nan))
    case("nan skipped", Drawing(0.03, nan), train=SKIP)
    alone("nan skipped alone", Drawing(0.03, nan), train=SKIP)
    case("huge rate", optimizer={"lr": 1e38})
    alone("straight", train={"result": "best"})
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        for which in (0, 2):
            name = f"{number.name} to {which}"
            case(name, on(which, Counting(5 + 4, kill(number))))
            case(f"{name}, resumed", Counting(0, fail), among=2, place=name, resume=True)
    case("SIGTERM to all", Counting(5 + 4, kill(signal.SIGTERM)))
    case("SIGTERM to all, resumed", Counting(0, fail), place="SIGTERM to all", resume=True)
    case("other source", Softmax() if rank == 1 else Batched())
    case("other job", Counting(0, fail), place="SIGTERM to all", resume=True, seed=8)
    case("no data", data={"source": "nowhere.csv"})
    case("solo of three", exchange={"type": "solo"})
    case("too many coordinators", exchange={"coordinators": 4})

    every = world.allgather_json(found, "the end")
    if rank == 0:
        (folder / "found.json").write_text(json.dumps(every))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
