"""What an exchange needs of a transport: bytes moved between workers, never added.

Every worker makes the same collective calls in the same order. Each wait has the deadline (seconds) and raises
DeadlineError naming the phase when it passes.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from dptrain.board import Cell, private
from dptrain.errors import DptrainError
from dptrain.layout import Array


class Message(NamedTuple):
    """A contiguous array to be sent to, or filled by, a peer. ``tag`` tells messages of one pair apart."""

    peer: int
    array: Array
    tag: int


class Posted(Protocol):
    """Transfers on their way."""

    def wait(self) -> None:
        """Return when all of them are done."""

    def done(self) -> bool:
        """Whether all of them are; by any thread, if no other calls the communicator meanwhile."""


class Communicator(Protocol):
    """A group of workers. Where it ``survives`` deaths, a call that a death disturbs raises WorkerLost.

    Then, and when a worker has settled all it had to do, all that live ``meet``; afterwards ``rank``, ``size`` and
    ``members``, the ranks that the present workers had at first, are new.
    """

    rank: int
    size: int
    members: tuple[int, ...]
    survives: bool
    cell: Cell
    """Where every poll of a wait is counted."""
    library: str
    deadline: float
    agreed: bool
    """Whether all workers know that the job has failed, so that each can leave by itself."""
    left: bool
    """Whether all living workers know that they leave."""
    failure: DptrainError | None
    """What failed here and could not be told, as the call that would have was interrupted."""
    blamed: tuple[int, int] | None
    """Whose failure all leave for, as far as this worker knows, one of ``members``, and its code. That one says why."""

    def allgather(
        self, row: npt.NDArray[np.float64], phase: str, meanwhile: Callable[[], object] | None = None
    ) -> npt.NDArray[np.float64]:
        """Every worker's row, (size, len(row)), in order of rank. Valid until the next call.

        ``meanwhile`` is called between looks, and may look at transfers, and post some.
        """

    def allgather_json(self, content: Any, phase: str) -> list[Any]:
        """Every worker's plain data, in order of rank."""

    def broadcast_json(self, content: Any, phase: str) -> Any:
        """Rank 0's plain data."""

    def post(self, sends: Sequence[Message], receives: Sequence[Message], phase: str) -> Posted:
        """Start the transfers; the arrays must stay untouched until they are done."""

    def until(self, done: Callable[[], bool], phase: str) -> None:
        """Ask ``done``, which may look at transfers, again and again until it says so."""

    def abandon(self, posted: Sequence[Posted]) -> None:
        """After WorkerLost: nobody waits for these any more, but while they may still move, their arrays are theirs."""

    def allreduce(self, vector: Array, phase: str) -> None:
        """Replace ``vector`` by the sum over workers in whatever order the library likes."""

    def broadcast(self, vector: Array, phase: str) -> None:
        """Replace ``vector`` by rank 0's."""

    def barrier(self, phase: str) -> None:
        """Return when all workers have come here."""

    def machines(self) -> tuple[tuple[int, ...], ...]:
        """The ranks on each machine, ascending, the machine of rank 0 first; the same answer for all."""

    def abort(self, code: int) -> None:
        """End all workers now; for when they can't be told."""

    def meet(self, word: Callable[[], Any], *, settled: bool = False) -> list[Any] | None:
        """Every living worker's ``word()``, in order of their new ranks; None where all came here settled.

        All living workers come here: who isn't settled interrupts the others at whatever they are at, and they get
        WorkerLost there. ``word`` is asked for anew whenever yet another dies meanwhile. All return the same.
        """

    def leave(self, code: int, *, knows: bool = False) -> None:
        """Tell all living workers that this one leaves with a code that isn't 0: as a word, see :func:`culprit`.

        ``knows``: its error is one of all workers, so that any of them may say it. Afterwards ``blamed`` is the same on
        all that leave.
        """


def culprit(words: Sequence[Mapping[str, Any]], members: Sequence[int]) -> tuple[int, int] | None:
    """Which member is to say why all leave, and the code of all, by such words.

    ``{"leaving": code, "blamed": member or None, "knows": bool}``: it is one whose failure another has heard of; else
    the first who knows of an error of all; None where none does.
    """
    blamed = [(word["blamed"], word["leaving"]) for word in words if word.get("blamed") is not None]
    knowing = [(member, word["leaving"]) for member, word in zip(members, words, strict=True) if word.get("knows")]
    return next(iter([*blamed, *knowing]), None)


class Alone:
    """The communicator of one worker without a launcher: nothing moves."""

    rank = 0
    size = 1
    members: tuple[int, ...] = (0,)
    survives = False
    library = "none"
    deadline = 0.0
    agreed = False
    left = False
    failure: DptrainError | None = None
    blamed: tuple[int, int] | None = None

    def __init__(self) -> None:
        self.cell = private()

    def allgather(
        self, row: npt.NDArray[np.float64], phase: str, meanwhile: Callable[[], object] | None = None
    ) -> npt.NDArray[np.float64]:
        """The row itself."""
        return row[None].copy()

    def allgather_json(self, content: Any, phase: str) -> list[Any]:
        """The content as it would arrive."""
        return [json.loads(json.dumps(content))]

    def broadcast_json(self, content: Any, phase: str) -> Any:
        """The content as it would arrive."""
        return json.loads(json.dumps(content))

    def post(self, sends: Sequence[Message], receives: Sequence[Message], phase: str) -> Posted:
        """Nobody to send to."""
        assert not sends
        assert not receives
        return Done()

    def until(self, done: Callable[[], bool], phase: str) -> None:
        """Nothing moves, so it is done or never will be."""
        assert done()

    def abandon(self, posted: Sequence[Posted]) -> None:
        """Nothing moves."""

    def allreduce(self, vector: Array, phase: str) -> None:
        """The sum over one worker."""

    def broadcast(self, vector: Array, phase: str) -> None:
        """Rank 0's."""

    def barrier(self, phase: str) -> None:
        """Everyone is here."""

    def machines(self) -> tuple[tuple[int, ...], ...]:
        """One worker on one machine."""
        return ((0,),)

    def abort(self, code: int) -> None:
        """Nobody else to end."""

    def meet(self, word: Callable[[], Any], *, settled: bool = False) -> list[Any] | None:
        """Nobody else to meet."""
        return None if settled else [word()]

    def leave(self, code: int, *, knows: bool = False) -> None:
        """Nobody else to tell."""


class Done:
    """Transfers that are over."""

    def wait(self) -> None:
        """Return at once."""

    def done(self) -> bool:
        """They are."""
        return True
