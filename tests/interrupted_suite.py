"""Run under mpirun -n 3: a job fails, and the worker that is to say why is interrupted before it knows that all know.

``python -m tests.interrupted_suite CASE FOLDER``. Whoever hears of a failure first leaves and revokes the communicator;
here one rank waits for that in the very call that would have told it.
"""

import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dptrain import arithmetic

arithmetic.choose("native", 1)

from mpi4py import MPI  # noqa: E402

from dptrain.cli.main import _code_of  # noqa: E402
from dptrain.exchange.mpi import Mpi, connect, end  # noqa: E402
from dptrain.job.load import check, complete  # noqa: E402
from dptrain.launch import Announced  # noqa: E402
from dptrain.ranks import train  # noqa: E402
from tests.softmax import Counting, Drawing, Softmax, fail, job, nan  # noqa: E402

CASES: dict[str, tuple[str, int, int, Callable[[int], Softmax]]] = {
    "raises": ("partials", 1, 1, lambda rank: Counting(5 + 2 * 3 + 1 if rank == 1 else 0, fail)),
    "raises while probing": ("probing the arithmetic", 2, 1, lambda rank: Counting(3 if rank == 1 else 0, fail)),
    "raises while evaluating": ("evaluation", 1, 1, lambda rank: Counting(6 if rank == 1 else 0, fail, training=False)),
    "nan": ("non-finite gradient", 2, 0, lambda rank: Drawing(0.03, nan)),
}
"""By name: the phase in whose last wait, of so many, which rank is interrupted, and each rank's model."""


def interrupt(wanted: str, last: int, model: Softmax) -> None:
    """Let this rank's last wait in that phase, once its model has failed, last until the others leave."""
    wait, waits = Mpi._wait, itertools.count(1)

    def _wait(self: Mpi, requests: list[Any], phase: str, meanwhile: Any = None) -> None:
        if phase != wanted or (isinstance(model, Counting) and model.left > 0) or next(waits) < last:
            return wait(self, requests, phase, meanwhile)

        def revoked() -> bool:
            MPI.COMM_SELF.Iprobe()  # what was begun moves on
            return bool(self._comm.Is_revoked())

        self.until(revoked, phase)
        self._unfinished += requests
        try:
            self._comm.Barrier()
        except MPI.Exception as error:
            raise self._lost(error, phase) from None

    Mpi._wait = _wait  # type: ignore[method-assign]


def main(case: str, folder: Path) -> None:
    """Train as the command line does, and leave with its code."""
    communicator = connect(deadline=30)
    rank, size = communicator.rank, communicator.size
    phase, last, which, models = CASES[case]
    model = models(rank)
    if rank == which:
        interrupt(phase, last, model)
    content = complete(check(job(), "x"), own_model=True)
    options = {"model": model, "run_dir": folder, "resume": False, "observer": None}
    end(_code_of(lambda: train(communicator, content, **options) and None, Announced(rank, size, "openmpi")))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
