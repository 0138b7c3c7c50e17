"""Run under mpirun -n 4 on machines of several shapes: steps that come to nothing when parts of them have already left.

``python -m tests.exchange.traffic_suite FOLDER``; rank 0 writes what they came to as JSON.
"""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dptrain import arithmetic

arithmetic.choose("native", 1)

import numpy as np  # noqa: E402

from dptrain.errors import DptrainError  # noqa: E402
from dptrain.exchange.communicator import Alone  # noqa: E402
from dptrain.exchange.mpi import connect  # noqa: E402
from dptrain.exchange.segments import Segments  # noqa: E402
from dptrain.exchange.traffic import Traffic  # noqa: E402
from dptrain.nn import accumulate  # noqa: E402
from dptrain.training import run  # noqa: E402
from tests.exchange.jobs import job  # noqa: E402

SHAPES = ((0, 1, 2, 3), (0, 0, 1, 1), (0, 1, 1, 1))
"""The machine of each rank."""

STEP, SHARD = 4, 5
"""Where something happens, if it does; the shard is one of rank 2's."""

CASES = ("nothing", "nan", "crash")


class Late:
    """Holds every worker before its first layer's gradient until others' have left, and then lets a case happen."""

    def __init__(self) -> None:
        self.case, self.step, self.left = "nothing", 0, 0
        self.open: Traffic | None = None
        close, accumulated, opening = accumulate._Adder.close, accumulate.Accumulator.accumulate, Segments.opening

        def closing(adder: Any, name: str) -> None:
            if name == adder._parameters[0].name and self.step:
                self._happen(adder, name)
            close(adder, name)

        def accumulating(it: Any, weights: Any, plan: Any, outbox: Any, step: int, *more: Any) -> Any:
            self.step = step
            try:
                return accumulated(it, weights, plan, outbox, step, *more)
            finally:
                self.step = 0

        def opened(exchange: Segments) -> Callable[[int], None] | None:
            self.open = exchange._traffic
            return opening(exchange)

        accumulate._Adder.close = closing  # type: ignore[method-assign]
        accumulate.Accumulator.accumulate = accumulating  # type: ignore[method-assign, assignment]
        Segments.opening = opened  # type: ignore[method-assign]

    def _happen(self, adder: Any, name: str) -> None:
        if self.open is not None and adder._final is not None:
            # What this layer has no part in.
            lowest = adder._parameters[2].start
            free = [piece for piece in self.open.pieces if piece.start >= lowest]
            until = time.monotonic() + 5
            while free and not any(piece.added for piece in free) and time.monotonic() < until:
                time.sleep(0.001)
            self.left += sum(piece.added for piece in free)
        shards = range(adder._batch.lo, adder._batch.hi)
        if self.step == STEP and SHARD in shards:
            if self.case == "crash":
                raise RuntimeError("no more of this")
            if self.case == "nan":
                gradient = adder._open[name][1]
                gradient[SHARD - shards[0], 7] = np.nan


def main(folder: Path) -> None:
    """All cases, in the same order on all ranks."""
    accumulate._WHOLE = 0
    world = connect(deadline=60)
    assert world.size == 4, "start it on 4 ranks"
    late, found = Late(), []
    for shape in SHAPES:
        comm = world.split(0, shape[world.rank])
        assert comm is not None
        for gradients, clip_norm in (("auto", 0.0), ("bfloat16", 0.5)):
            for case in CASES:
                it = job(
                    "mlp",
                    8,
                    exchange={"type": "node"},
                    arithmetic={"gradients": gradients},
                    optimizer={"clip_norm": clip_norm},
                    train={"non_finite": "skip"},
                )
                late.case, late.left, late.open = case, 0, None
                place = folder / str(len(found))
                try:
                    result: dict[str, Any] = asdict(run(it, communicator=comm, run_dir=place))
                except DptrainError as error:
                    result = {"error": str(error)}
                left = comm.allgather_json(late.left, "what left")
                late.open = None
                solo: dict[str, Any] = {}
                if world.rank == 0 and case != "crash":
                    solo = asdict(run(it, communicator=Alone(), run_dir=f"{place}-solo"))
                label = {"shape": shape, "gradients": gradients, "case": case}
                found.append({**label, **result, "left": left, "solo": solo.get("weights_sha256")})
    if world.rank == 0:
        (folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
