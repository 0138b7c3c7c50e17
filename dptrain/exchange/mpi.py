"""The one place that imports mpi4py: MPI as a communicator.

MPI is initialised here, on first use, with what a container and an oversubscribed machine need. All calls come from
the main thread. Waiting polls, so that every wait has its deadline and gives the core away to whoever has work.
Importing this module does not import numpy: a rank learns from rank 0 with which kernels numpy is to be loaded.
"""

from __future__ import annotations

import json
import os
import time
from array import array
from typing import TYPE_CHECKING, Any

from dptrain.cores import crowded
from dptrain.errors import DeadlineError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    import numpy.typing as npt

    from dptrain.exchange.communicator import Message, Posted
    from dptrain.layout import Array

CMA = "MPIR_CVAR_CH4_CMA_ENABLE"
"""Whether MPICH may copy large messages straight from another process's memory."""

_POLLS_BEFORE_YIELD = 2_000
_SLEEPLESS = 0.02
_NAP = 0.001
"""Seconds of a wait before the first nap, which is longer than a step's usual waits, and of a nap."""


def vendor() -> str:
    """The MPI that mpi4py loads here, such as ``MPICH 5.0.2``, without initialising it."""
    MPI = _load()
    name, version = MPI.get_vendor()
    return f"{name} {'.'.join(map(str, version))}"


def _load() -> Any:
    """mpi4py's MPI, not initialised; it reads its settings once, when it is first imported."""
    import mpi4py

    mpi4py.rc.initialize = False
    mpi4py.rc.finalize = True
    from mpi4py import MPI

    return MPI


def connect(deadline: float = 600.0) -> Mpi:
    """Initialise MPI, once a process, and return the communicator of all its workers."""
    MPI = _load()
    if not MPI.Is_initialized():
        # Open MPI tries UCX for shared windows and complains where there is none.
        os.environ.setdefault("OMPI_MCA_osc", "^ucx")
        if MPI.get_vendor()[0] == "MPICH" and CMA not in os.environ:
            from dptrain.exchange.memory_access import permitted

            os.environ[CMA] = "1" if permitted() else "0"
        MPI.Init_thread(MPI.THREAD_SERIALIZED)
    return Mpi(MPI.COMM_WORLD.Dup(), deadline)


class Mpi:
    """See Communicator. ``split`` makes groups of workers that train apart from each other."""

    def __init__(self, comm: Any, deadline: float, apart: int = 0) -> None:
        from mpi4py import MPI

        self._mpi = MPI
        self._comm = comm
        self.rank = comm.Get_rank()
        self.size = comm.Get_size()
        self.library = MPI.Get_library_version().split("\n")[0].split(",")[0].strip()
        self.deadline = deadline
        self.agreed = False
        # Whoever has a core of its own may keep it while it waits; where workers share cores, waiting gives it away.
        self._polls = 1 if crowded(_local_size(), 1) else _POLLS_BEFORE_YIELD
        self._apart = apart
        self._machines: tuple[tuple[int, ...], ...] | None = None
        self._rows: dict[int, npt.NDArray[np.float64]] = {}

    def split(self, color: int | None, apart: int = 0) -> Mpi | None:
        """The workers that name the same color, in order of rank; None for a worker that names none.

        Those that name different numbers ``apart`` behave as if they were on different machines.
        """
        comm = self._comm.Split(self._mpi.UNDEFINED if color is None else color, self.rank)
        return None if color is None else Mpi(comm, self.deadline, apart)

    def allgather(self, row: npt.NDArray[np.float64], phase: str) -> npt.NDArray[np.float64]:
        """See Communicator."""
        every = self._rows.get(len(row))
        if every is None:
            import numpy as np

            every = self._rows[len(row)] = np.empty((self.size, len(row)))
        self._wait([self._comm.Iallgather(row, every)], phase)
        return every

    def allgather_json(self, content: Any, phase: str) -> list[Any]:
        """See Communicator."""
        text = bytearray(json.dumps(content).encode())
        mine, lengths = array("q", [len(text)]), array("q", [0]) * self.size
        self._wait([self._comm.Iallgather(mine, lengths)], phase)
        every = bytearray(sum(lengths))
        starts = [sum(lengths[:i]) for i in range(self.size)]
        self._wait([self._comm.Iallgatherv(text, [every, (list(lengths), starts), self._mpi.BYTE])], phase)
        return [json.loads(every[at : at + n]) for at, n in zip(starts, lengths, strict=True)]

    def broadcast_json(self, content: Any, phase: str) -> Any:
        """See Communicator."""
        text = bytearray(json.dumps(content).encode()) if self.rank == 0 else bytearray()
        length = array("q", [len(text)])
        self._wait([self._comm.Ibcast(length, 0)], phase)
        data = text if self.rank == 0 else bytearray(length[0])
        self._wait([self._comm.Ibcast(data, 0)], phase)
        return json.loads(data)

    def post(self, sends: Sequence[Message], receives: Sequence[Message], phase: str) -> Posted:
        """See Communicator."""
        comm = self._comm
        requests = [comm.Irecv(message.array, message.peer, message.tag) for message in receives]
        requests += [comm.Isend(message.array, message.peer, message.tag) for message in sends]
        return _Requests(self, requests, phase)

    def allreduce(self, vector: Array, phase: str) -> None:
        """See Communicator."""
        self._wait([self._comm.Iallreduce(self._mpi.IN_PLACE, vector)], phase)

    def broadcast(self, vector: Array, phase: str) -> None:
        """See Communicator."""
        self._wait([self._comm.Ibcast(vector, 0)], phase)

    def machines(self) -> tuple[tuple[int, ...], ...]:
        """See Communicator."""
        if self._machines is None:
            local = self._comm.Split_type(self._mpi.COMM_TYPE_SHARED, self.rank)
            lowest = array("q", [self.rank])
            local.Bcast(lowest, 0)
            local.Free()
            every = self.allgather_json([lowest[0], self._apart], "finding the machines")
            groups: dict[tuple[int, int], list[int]] = {}
            for rank, key in enumerate(every):
                groups.setdefault(tuple(key), []).append(rank)
            self._machines = tuple(tuple(group) for group in groups.values())
        return self._machines

    def barrier(self, phase: str) -> None:
        """Return when all workers have come here."""
        self._wait([self._comm.Ibarrier()], phase)

    def abort(self, code: int) -> None:
        """See Communicator."""
        self._comm.Abort(code)

    def _wait(self, requests: list[Any], phase: str) -> None:
        """Poll; then give the core away between polls; then, as the others seem to be long at something, sleep."""
        testall = self._mpi.Request.Testall
        for _ in range(self._polls):
            if testall(requests):
                return
        started = time.monotonic()
        while not testall(requests):
            waited = time.monotonic() - started
            if waited < _SLEEPLESS:
                os.sched_yield()
            elif waited < self.deadline:
                time.sleep(_NAP)
            else:
                raise DeadlineError(
                    f"rank {self.rank} in {phase}",
                    expected=f"the other workers within {self.deadline:g} s",
                    found="no answer",
                    cure="see what the others do, or raise exchange.deadline",
                )


def _local_size() -> int:
    """The workers on this machine, as the launcher says; 1 where it doesn't."""
    for variable in ("MPI_LOCALNRANKS", "OMPI_COMM_WORLD_LOCAL_SIZE", "SLURM_NTASKS_PER_NODE"):
        if os.environ.get(variable, "").isdigit():
            return int(os.environ[variable])
    return 1


class _Requests:
    def __init__(self, owner: Mpi, requests: list[Any], phase: str) -> None:
        self._owner, self._requests, self._phase = owner, requests, phase

    def wait(self) -> None:
        if self._requests:
            self._owner._wait(self._requests, self._phase)
