"""How the ranks of one launch start together: rank 0 knows what to do, the others wait for its word.

Neither numpy nor pydantic is imported before rank 0's word is known: the job says with which kernels numpy is to be
loaded, and only one of the ranks pays for checking it.
"""

import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from dptrain import arithmetic, supervision
from dptrain.errors import DeadlineError, DptrainError, PeerFailed, WorkerLost, exit_code
from dptrain.job.spec import Job, plain, rebuild
from dptrain.launch import Announced, refuse_size

if TYPE_CHECKING:
    from dptrain.exchange.mpi import Mpi
    from dptrain.result import Result
    from dptrain.watch import Observer

Inherit = Callable[[Any], "Observer"]
"""Makes the observer of a worker that becomes the chief, from what the first chief's said of itself."""


def alone(job: Job, **options: Any) -> "Result":
    """Train in this process, without MPI; ``options`` are training.run's."""
    arithmetic.choose(job.arithmetic.kernels, job.arithmetic.threads)
    from dptrain.training import run

    return run(job, **options)


class Leader:
    """Rank 0 of a launch. Use it as a context: however it is left, the other ranks are told.

    ``train`` trains with all of them; a context left without it, by an error or an exit, ends them with its code.
    """

    def __init__(self, place: Announced) -> None:
        self._communicator = _connect(place)
        self._waiting = True

    def __enter__(self) -> "Leader":
        return self

    def train(
        self,
        job: Job,
        *,
        run_dir: str | os.PathLike[str] | None = None,
        resume: bool = False,
        trace: str | os.PathLike[str] | None = None,
        observer: "Observer | None" = None,
        shown: Any = None,
    ) -> "Result":
        """Train a complete job with all ranks; see training.run. ``shown`` is for whoever becomes the chief."""
        self._waiting = False
        options: dict[str, Any] = {"run_dir": _text(run_dir), "resume": resume, "trace": _text(trace)}
        with departing(self._communicator):
            self._communicator.broadcast_json({"job": plain(job), "options": options, "shown": shown}, "starting")
        return train(self._communicator, job, **options, observer=observer)

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if self._waiting:
            self._waiting = False
            with departing(self._communicator):
                self._communicator.broadcast_json({"code": _code(error)}, "leaving")


def lead(place: Announced) -> Leader:
    """Connect as rank 0. Raises LaunchError where MPI's world is not what the launcher announced."""
    return Leader(place)


def follow(place: Announced, inherit: Inherit | None = None) -> int:
    """Connect as another rank, do what rank 0 says, and return the exit code."""
    communicator = _connect(place)
    with departing(communicator):
        word = communicator.broadcast_json(None, "waiting for rank 0")
    if "job" not in word:
        return int(word["code"])
    successor = None if inherit is None else lambda: inherit(word["shown"])
    train(communicator, rebuild(Job, word["job"]), **word["options"], observer=None, successor=successor)
    return 0


@contextmanager
def departing(communicator: "Mpi") -> Iterator[None]:
    """Around a call outside of training, where no death is survived: after one, all that live leave together."""
    try:
        yield
    except WorkerLost as error:
        communicator.leave(exit_code(error))
        raise


def _text(path: str | os.PathLike[str] | None) -> str | None:
    return None if path is None else os.fspath(path)


def _connect(place: Announced) -> "Mpi":
    from dptrain.exchange.mpi import connect

    communicator = connect()
    refuse_size(place, communicator.began)
    return communicator


def train(communicator: "Mpi", job: Job, **options: Any) -> "Result":
    """Train a complete job with all ranks, each of which calls this; ``options`` are training.run's.

    An error is raised on all of them: on the rank that it concerns its own, which leaves last so that its message
    stands at the end, on the others PeerFailed. Where the others can't be told, all processes are ended.
    """
    arithmetic.choose(job.arithmetic.kernels, job.arithmetic.threads)
    from dptrain.training import run

    try:
        return run(job, communicator=communicator, **options)
    except BaseException as error:
        observer = options.get("observer")
        if observer is not None:
            observer.close()
        everywhere = getattr(error, "everywhere", False)
        sys.stdout.flush()
        sys.stderr.flush()
        if isinstance(error, (DeadlineError, WorkerLost)):
            supervision.lost(" ".join(str(error).split()))
        speaks = communicator.rank == 0
        if communicator.survives:
            error, speaks = _leave(communicator, error, everywhere)
        elif not communicator.agreed and not everywhere:
            # The others know nothing and wait; only ending them all is left.
            traceback.print_exception(error)
            sys.stderr.flush()
            if isinstance(error, DptrainError):
                supervision.failed(exit_code(error), str(error))
            communicator.abort(exit_code(error))
        else:
            # Whoever failed speaks last: all others have nothing more to say when they come here.
            communicator.barrier("leaving")
        if not speaks and (everywhere or isinstance(error, WorkerLost)):
            code = exit_code(error) if communicator.blamed is None else communicator.blamed[1]
            raise PeerFailed(0, 0, "all phases", code) from error
        if isinstance(error, DptrainError):
            error.everywhere = False
        raise error


def _leave(communicator: "Mpi", error: BaseException, everywhere: bool) -> tuple[BaseException, bool]:
    """Leave with all that live; the error to leave with, and whether an error of all is this worker's to say.

    Whoever heard of a failure first leaves at once, which may interrupt the very worker that it is about: that one has
    to say it none the less, and nobody else is to speak of a death.
    """
    here = communicator.members[communicator.rank]
    interrupted = isinstance(error, (PeerFailed, WorkerLost)) and not everywhere
    code = exit_code(error)
    if not interrupted and not everywhere:
        communicator.blamed = here, code
    communicator.leave(code, knows=everywhere)
    if communicator.blamed is None:
        return error, communicator.rank == 0
    blamed, _ = communicator.blamed
    if interrupted and blamed == here and communicator.failure is not None:
        error = communicator.failure
    return error, blamed == here


def _code(error: BaseException | None) -> int:
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    return 0 if error is None else exit_code(error)
