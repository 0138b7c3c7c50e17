"""What each worker of a machine is at, in memory that outlives it: written by the loop itself, read by who watches.

A cell of eight integers for each worker, and one for all before them. Nothing here imports more than it must: the
watchdog, a process of its own, reads it.
"""

import contextlib
import mmap
import os
from collections.abc import Sequence

from dptrain.processes import process

WATCHDOG = 0
"""Of the first cell: the process that watches."""

PID, BORN, RANK, BEAT, STEP, PHASE, ENDED, BEGUN = range(8)
"""Of a worker's cell: its process and when that started, its rank at the launch, a count of signs of life, the step
(0 before training) and the phase it is at, whether the watchdog has ended it, and how many steps it has begun."""

_CELL = 8
_ITEM = 8

CELL_BYTES = _CELL * _ITEM
"""The size of a cell, which is that of a line of the cache."""

Cell = memoryview
"""Eight integers of 64 bits."""


NAME = "dptrain-board"
"""What the memory is called where its holders' open files are listed."""


def nbytes(workers: int) -> int:
    """The size of a board."""
    return (workers + 1) * _CELL * _ITEM


def private() -> Cell:
    """A cell that nobody else reads."""
    return memoryview(bytearray(_CELL * _ITEM)).cast("q")


def cells(memory: memoryview) -> Sequence[Cell]:
    """All cells of a board, that of all workers first."""
    numbers = memory.cast("B").cast("q")
    return [numbers[at : at + _CELL] for at in range(0, len(numbers), _CELL)]


def mapped(handle: int, workers: int) -> Sequence[Cell]:
    """The cells of a board that a file holds."""
    return cells(memoryview(mmap.mmap(handle, nbytes(workers))))


def sign(cell: Cell, rank: int) -> None:
    """Make a cell this process's."""
    found = process(os.getpid())
    assert found is not None
    cell[PID], cell[BORN], cell[RANK] = os.getpid(), found.born, rank


def held_by(pid: int) -> Sequence[Cell] | None:
    """The workers' cells of the board that a process has open, for who looks on from outside; None without one."""
    try:
        paths = [f"/proc/{pid}/fd/{handle}" for handle in os.listdir(f"/proc/{pid}/fd")]
    except OSError:
        return None
    for path in paths:
        # The process may end, and any file be closed, in the middle of this.
        with contextlib.suppress(OSError):
            if os.readlink(path).startswith(f"/memfd:{NAME}"):
                handle = os.open(path, os.O_RDWR)
                try:
                    # One that is just being made has no size yet.
                    if size := os.fstat(handle).st_size:
                        return mapped(handle, size // nbytes(0) - 1)[1:]
                finally:
                    os.close(handle)
    return None


def lives(cell: Cell) -> bool:
    """Whether a cell's process is still there and has not ended."""
    found = process(cell[PID])
    return found is not None and found.born == cell[BORN] and found.state not in "ZX"
