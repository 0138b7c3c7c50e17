"""Every error a person can meet, and its sentence.

One family. Each error says where, what was expected, what was found, and the cure, in that order and in one
line. They are caught only at the edge (``cli`` and ``train``), where ``exit_code`` becomes the process's.
"""


class DptrainError(Exception):
    """Bad input or a broken surrounding, told in one sentence; never a bug of dptrain itself.

    ``where`` names the thing and the place (file, key, rank, step), ``expected`` and ``found`` what should have
    been there and what was, ``cure`` what the reader can do about it.
    """

    exit_code = 2
    everywhere = False
    """Whether every worker raises it, so that one of them tells it for all."""

    def __init__(self, where: str, *, expected: str, found: str, cure: str) -> None:
        self.where = where
        self.expected = expected
        self.found = found
        self.cure = cure
        super().__init__(f"{where}: expected {expected}, found {found}; {cure}")


class UsageError(DptrainError):
    """The command line asks for something that can't be."""


class JobError(DptrainError):
    """The job file, an override or the environment holds a wrong key or value."""


class DataError(DptrainError):
    """The data can't be used as the job says."""


class ModelError(DptrainError):
    """The layers, or a model of the user's own, don't fit together or the data."""


class LaunchError(DptrainError):
    """The processes were started in a way that can't work."""


class ArithmeticMismatch(DptrainError):
    """A worker, or a checkpoint, computes other bits than the job's."""


class NonFiniteError(DptrainError):
    """A loss or gradient is not finite and the job says to stop."""


class CheckpointError(DptrainError):
    """No usable checkpoint, or one that belongs to another job."""


class StorageError(DptrainError):
    """The run directory can't be written or read."""


class WorkerCrashed(DptrainError):
    """An exception that nobody foresaw, in a worker: a bug, in a model of the user's own or in dptrain."""

    exit_code = 1


class OutOfMemory(DptrainError):
    """There was no room for an array."""


class DeadlineError(DptrainError):
    """A wait for other workers lasted longer than its deadline."""

    exit_code = 3


class WorkerLost(DptrainError):
    """A worker process died. Where that can be survived it is caught within the run, and nobody meets it."""

    exit_code = 3


class ResidualsLost(WorkerLost):
    """Residuals that belong to the state are gone with a worker: the run goes back to where all were together."""

    exit_code = 75
    """What tells the other servers of it; no process ends with that."""


class CorruptionError(WorkerLost):
    """A worker holds or computes other bits than the others, where nothing is survived within a step."""


class DisagreementError(DptrainError):
    """Workers disagree on bits, for the second time, and nobody can tell which of them is right."""

    exit_code = 1


class ReplayError(DptrainError):
    """A run that is done again by its log leads to other bits."""

    exit_code = 1


class PoisonError(DptrainError):
    """A shard whose owners die, one after the other, at the same step."""

    exit_code = 1


class PeerFailed(DptrainError):
    """Another worker failed; it says why itself, so this one leaves quietly with the same code."""

    def __init__(self, rank: int, step: int, phase: str, code: int) -> None:
        super().__init__(
            f"rank {rank} at step {step} in {phase}",
            expected="every worker to finish the step",
            found="a failure there",
            cure="see that rank's own message",
        )
        self.rank = rank
        self.exit_code = code


class RefusedError(DptrainError):
    """Who connects, or listens, may not: no token, a wrong one, one for less, or an address that isn't safe enough."""


class UnreachableError(DptrainError):
    """A server did not answer, or not in time."""

    exit_code = 3


class BusyError(DptrainError):
    """A server has as much to do, or was sent as much, as it allows."""

    exit_code = 3


class NotFoundError(DptrainError):
    """A job, file or data set that is not there, or is another owner's."""


class RefusedTransition(DptrainError):
    """What is asked for is not possible in the state that the thing is in."""


class QuotaError(DptrainError):
    """There is no room left for what is asked for."""


class ChangedError(DptrainError):
    """Something has become another since it was looked at."""


class UploadError(DataError):
    """A data set that can't be taken in."""


def exit_code(error: BaseException) -> int:
    """The process's exit code for an error: 2 for bad input, 1 for a bug, or what the error says."""
    if isinstance(error, MemoryError):
        return OutOfMemory.exit_code
    return error.exit_code if isinstance(error, DptrainError) else 1
