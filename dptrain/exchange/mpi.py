"""The one place that imports mpi4py: MPI as a communicator.

MPI is initialised here, on first use, with what a container and an oversubscribed machine need. All calls come from
the main thread. Waiting polls, so that every wait has its deadline and gives the core away to whoever has work.
Importing this module does not import numpy: a rank learns from rank 0 with which kernels numpy is to be loaded.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import sys
import time
from array import array
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

from dptrain import board
from dptrain.cores import crowded
from dptrain.errors import DeadlineError, DptrainError, WorkerLost

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy as np
    import numpy.typing as npt

    from dptrain.exchange.communicator import Message, Posted
    from dptrain.layout import Array

FAULT_TOLERANT = "OMPI_MCA_mpi_ft_enable"
"""What ``mpirun --with-ft ulfm`` tells its workers."""

CMA = "MPIR_CVAR_CH4_CMA_ENABLE"
"""Whether MPICH may copy large messages straight from another process's memory."""

OVER_TCP = {
    "OMPI_MCA_btl_tcp_flags": "1",
    "OMPI_MCA_btl_tcp_max_send_size": "32768",
    "OMPI_MCA_btl_tcp_sndbuf": "65536",
}
"""Open MPI's large messages between machines, both ways at once: pieces that are sent, not put, few of them queued.

As it comes it filled half of a link of 1 Gbit/s, each way; a deep queue holds up the other way's acknowledgements.
"""

_POLLS_BEFORE_YIELD = 2_000
_SLEEPLESS = 0.02
_NAP = 0.0002
"""Seconds of a wait before the first nap, which is longer than a step's usual waits, and of a nap.

In a longer one a link of 1 Gbit/s would send all that is queued for it.
"""


FEW = 16
"""Workers up to which everyone tells everyone: quicker than a collective, and silent where one of them dies."""

_GATHERING = 30_000
"""The tag of these messages."""


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


_connected: Mpi | None = None


def connect(deadline: float = 600.0) -> Mpi:
    """The communicator of all workers that live; MPI is initialised once a process."""
    global _connected
    if _connected is not None:
        _connected.deadline = deadline
        return _connected
    MPI = _load()
    if not MPI.Is_initialized():
        # Open MPI tries UCX for shared windows and complains where there is none.
        for variable, value in {"OMPI_MCA_osc": "^ucx", **OVER_TCP}.items():
            os.environ.setdefault(variable, value)
        if MPI.get_vendor()[0] == "MPICH" and CMA not in os.environ:
            from dptrain.exchange.memory_access import permitted

            os.environ[CMA] = "1" if permitted() else "0"
        MPI.Init_thread(MPI.THREAD_SERIALIZED)
    try:
        _connected = Mpi(MPI.COMM_WORLD.Dup(), deadline)
        _unlink_shared_memory(alone=_connected.size == 1)
    except MPI.Exception as error:
        raise WorkerLost(
            "starting",
            expected="every worker to live",
            found=error.Get_error_string(),
            cure="start it again",
        ) from None
    return _connected


def _unlink_shared_memory(alone: bool) -> None:
    """All workers of the machine have mapped MPICH's shared memory: from now on it needs no name to leave behind.

    Open MPI's is mapped by another when the two first talk, and is removed by its launcher: a process that has none
    would leave it there.
    """
    names = ("/dev/shm/mpich_", "/dev/shm/sm_segment.") if alone else ("/dev/shm/mpich_",)
    with open("/proc/self/maps") as maps:
        paths = {line.split(maxsplit=5)[5].rstrip("\n") for line in maps if any(name in line for name in names)}
    for path in paths:
        with contextlib.suppress(OSError):
            os.unlink(path)


class Mpi:
    """See Communicator. ``split`` makes groups of workers that train apart from each other.

    ``began`` workers were there at first. Deaths are survived by ULFM (User Level Failure Mitigation, MPI Forum's
    fault tolerance working group): whoever notices one revokes the communicator, so that all leave what they are at,
    and all that live meet in a smaller one.
    """

    def __init__(self, comm: Any, deadline: float, apart: int = 0) -> None:
        from mpi4py import MPI

        self._mpi = MPI
        self._everyone = comm.Get_group()
        self._use(comm)
        self.library = MPI.Get_library_version().split("\n")[0].split(",")[0].strip()
        self.survives = os.environ.get(FAULT_TOLERANT) == "1"
        self.began = self.size
        self.deadline = deadline
        self.agreed = False
        self.cell = board.private()
        self._apart = apart
        self._groups: tuple[tuple[int, ...], ...] | None = None
        self._polls = _polls(_local_size())
        self._unfinished: list[Any] = []
        self.left = False
        self.failure: DptrainError | None = None
        self.blamed: tuple[int, int] | None = None

    def _use(self, comm: Any) -> None:
        self._comm = comm
        self.rank = comm.Get_rank()
        self.size = comm.Get_size()
        self.members = tuple(self._mpi.Group.Translate_ranks(comm.Get_group(), None, self._everyone))
        self._rows: dict[int, npt.NDArray[np.float64]] = {}
        self._messages: dict[int, tuple[Any, Any, list[Any]]] = {}

    def split(self, color: int | None, apart: int = 0) -> Mpi | None:
        """The workers that name the same color, in order of rank; None for a worker that names none.

        Those that name different numbers ``apart`` behave as if they were on different machines.
        """
        comm = self._comm.Split(self._mpi.UNDEFINED if color is None else color, self.rank)
        return None if color is None else Mpi(comm, self.deadline, apart)

    def allgather(
        self, row: npt.NDArray[np.float64], phase: str, meanwhile: Callable[[], object] | None = None
    ) -> npt.NDArray[np.float64]:
        """See Communicator."""
        if self.size > FEW:
            rows = self._rows.get(len(row))
            if rows is None:
                import numpy as np

                rows = self._rows[len(row)] = np.empty((self.size, len(row)))
            self._do(phase, self._comm.Iallgather, row, rows, meanwhile=meanwhile)
            return rows
        known = self._messages.get(len(row))
        if known is None:
            known = self._messages[len(row)] = self._messages_of(len(row))
        every: npt.NDArray[np.float64]
        mine, every, requests = known
        mine[:] = row
        every[self.rank] = row
        try:
            self._mpi.Prequest.Startall(requests)
        except self._mpi.Exception as error:
            self._unfinished += requests
            raise self._lost(error, phase) from None
        self._wait(requests, phase, meanwhile)
        return every

    def _messages_of(self, length: int) -> tuple[Any, Any, list[Any]]:
        """The memory and the messages of gathering rows of a length, made once: everyone tells everyone."""
        import numpy as np

        mine, every = np.zeros(length), np.zeros((self.size, length))
        others = [rank for rank in range(self.size) if rank != self.rank]
        requests = [self._comm.Recv_init(every[rank], rank, _GATHERING) for rank in others]
        return mine, every, requests + [self._comm.Send_init(mine, rank, _GATHERING) for rank in others]

    def allgather_json(self, content: Any, phase: str) -> list[Any]:
        """See Communicator."""
        text = bytearray(json.dumps(content).encode())
        mine, lengths = array("q", [len(text)]), array("q", [0]) * self.size
        self._do(phase, self._comm.Iallgather, mine, lengths)
        every = bytearray(sum(lengths))
        starts = [sum(lengths[:i]) for i in range(self.size)]
        self._do(phase, self._comm.Iallgatherv, text, [every, (list(lengths), starts), self._mpi.BYTE])
        return [json.loads(every[at : at + n]) for at, n in zip(starts, lengths, strict=True)]

    def broadcast_json(self, content: Any, phase: str) -> Any:
        """See Communicator."""
        text = bytearray(json.dumps(content).encode()) if self.rank == 0 else bytearray()
        length = array("q", [len(text)])
        self._do(phase, self._comm.Ibcast, length, 0)
        data = text if self.rank == 0 else bytearray(length[0])
        self._do(phase, self._comm.Ibcast, data, 0)
        return json.loads(data)

    def post(self, sends: Sequence[Message], receives: Sequence[Message], phase: str) -> Posted:
        """See Communicator."""
        comm, requests = self._comm, []
        try:
            for message in receives:
                requests.append(comm.Irecv(message.array, message.peer, message.tag))
            for message in sends:
                requests.append(comm.Isend(message.array, message.peer, message.tag))
        except self._mpi.Exception as error:
            self._unfinished += requests
            raise self._lost(error, phase) from None
        return _Requests(self, requests, phase)

    def until(self, done: Callable[[], bool], phase: str) -> None:
        """See Communicator: gives the core away between looks; naps, as the others seem to be long at something."""
        cell, started = self.cell, time.monotonic()
        while not done():
            cell[board.BEAT] += 1
            waited = time.monotonic() - started
            if waited < _SLEEPLESS:
                os.sched_yield()
            elif waited < self.deadline:
                time.sleep(_NAP)
            else:
                raise self._late(phase)

    def abandon(self, posted: Sequence[Posted]) -> None:
        """See Communicator."""
        for some in posted:
            assert isinstance(some, _Requests)
            self._unfinished += some.requests

    def allreduce(self, vector: Array, phase: str) -> None:
        """See Communicator."""
        self._do(phase, self._comm.Iallreduce, self._mpi.IN_PLACE, vector)

    def broadcast(self, vector: Array, phase: str) -> None:
        """See Communicator."""
        self._do(phase, self._comm.Ibcast, vector, 0)

    def machines(self) -> tuple[tuple[int, ...], ...]:
        """See Communicator."""
        if self._groups is None:
            local = self._comm.Split_type(self._mpi.COMM_TYPE_SHARED, self.rank)
            lowest = array("q", [self.rank])
            local.Bcast(lowest, 0)
            local.Free()
            every = self.allgather_json([lowest[0], self._apart], "finding the machines")
            groups: dict[tuple[int, int], list[int]] = {}
            for member, key in zip(self.members, every, strict=True):
                groups.setdefault(tuple(key), []).append(member)
            self._groups = tuple(tuple(group) for group in groups.values())
        rank_of = {member: rank for rank, member in enumerate(self.members)}
        living = (tuple(rank_of[member] for member in group if member in rank_of) for group in self._groups)
        return tuple(sorted(group for group in living if group))

    def barrier(self, phase: str) -> None:
        """Return when all workers have come here."""
        self._do(phase, self._comm.Ibarrier)

    def abort(self, code: int) -> None:
        """See Communicator."""
        self._comm.Abort(code)

    def meet(self, word: Callable[[], Any], *, settled: bool = False) -> list[Any] | None:
        """See Communicator."""
        every: list[Any] | None = None
        good = settled
        while True:
            if not good:
                # Whatever the others are at on the old communicator ends, in an error, and they come here.
                self._comm.Revoke()
            if self._agree(good):
                return every
            self._shrink()
            try:
                every = self.allgather_json(word(), "recovering")
            except WorkerLost:
                good = False
            else:
                good = True

    def leave(self, code: int, *, knows: bool = False) -> None:
        """See Communicator; returns when all living workers know, who leave too."""
        if self.left:
            return
        # It loads numpy, which is for whoever knows the job; here there is none any more.
        from dptrain.exchange.communicator import culprit

        self.left = True
        blamed = None if self.blamed is None else self.blamed[0]
        words = self.meet(lambda: {"leaving": code, "blamed": blamed, "knows": knows})
        self.blamed = culprit(words or [], self.members if words else ())

    def _agree(self, good: bool) -> bool:
        """Whether all living workers say so; the same answer for all of them, whoever dies meanwhile."""
        flag = array("i", [int(good)])
        request = self._comm.Iagree(flag)
        # A death that is news here makes this an error, and leaves the answer as good as any.
        self._poll([request], "agreeing")
        return bool(flag[0])

    def _shrink(self) -> None:
        """Go on without the dead. What was under way is finished first: nothing writes to our memory later."""
        self._poll(self._unfinished, "recovering")
        self._unfinished.clear()
        _note_survival()
        comm = self._comm.Shrink()
        # The old one is never freed, which would be a collective call among the dead too.
        self._use(comm)
        if self._groups is not None:
            self._polls = _polls(max(map(len, self.machines())))

    def _poll(self, requests: Sequence[Any], phase: str) -> None:
        """Return when each request is done or has failed."""

        def over(request: Any) -> bool:
            try:
                return bool(request.Test())
            except self._mpi.Exception:
                return True

        for request in requests:
            self.until(partial(over, request), phase)

    def _do(
        self, phase: str, begin: Callable[..., Any], *arguments: Any, meanwhile: Callable[[], object] | None = None
    ) -> None:
        """Begin a collective and wait for its end."""
        try:
            request = begin(*arguments)
        except self._mpi.Exception as error:
            raise self._lost(error, phase) from None
        self._wait([request], phase, meanwhile)

    def _wait(self, requests: list[Any], phase: str, meanwhile: Callable[[], object] | None = None) -> None:
        """Poll with the core kept, for a while where nothing is to be done ``meanwhile``; then as ``until`` does."""
        testall = self._mpi.Request.Testall

        def over() -> bool:
            if testall(requests):
                return True
            if meanwhile is not None:
                meanwhile()
            return False

        try:
            for _ in range(self._polls if meanwhile is None else 0):
                if over():
                    return
            self.until(over, phase)
        except self._mpi.Exception as error:
            self._unfinished += requests
            raise self._lost(error, phase) from None
        except WorkerLost:
            self._unfinished += requests
            raise

    def _lost(self, error: Any, phase: str) -> Exception:
        """What an error of MPI's means."""
        MPI = self._mpi
        deaths = (MPI.ERR_PROC_FAILED, MPI.ERR_PROC_FAILED_PENDING, MPI.ERR_REVOKED, MPI.ERR_IN_STATUS)
        if not self.survives or error.Get_error_class() not in deaths:
            return error  # type: ignore[no-any-return]
        return WorkerLost(
            f"rank {self.members[self.rank]} in {phase}",
            expected="every worker to live",
            found="one that died",
            cure="start it again with --resume",
        )

    def _late(self, phase: str) -> DeadlineError:
        return DeadlineError(
            f"rank {self.members[self.rank]} in {phase}",
            expected=f"the other workers within {self.deadline:g} s",
            found="no answer",
            cure="see what the others do, or raise exchange.deadline",
        )


survived = False
"""Whether this process has gone on after a death."""


def _note_survival() -> None:
    global survived
    if not survived:
        survived = True
        atexit.register(_end_at_exit)


def end(code: int) -> NoReturn:
    """End a process that has survived a death, when all others that live have come here too.

    Whoever ends before with a code that isn't 0 would have the launcher end the others, who may have something to say.
    MPI_Finalize is left out: it could wait for the dead.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    with contextlib.suppress(Exception):
        if _connected is not None:
            _connected._agree(True)
    os._exit(code)


def _end_at_exit() -> None:
    end(1 if hasattr(sys, "last_value") else 0)


def _polls(local: int) -> int:
    """Whoever has a core of its own may keep it while it waits; where workers share cores, waiting gives it away."""
    return 1 if crowded(local, 1) else _POLLS_BEFORE_YIELD


def _local_size() -> int:
    """The workers on this machine, as the launcher says; 1 where it doesn't."""
    for variable in ("MPI_LOCALNRANKS", "OMPI_COMM_WORLD_LOCAL_SIZE", "SLURM_NTASKS_PER_NODE"):
        if os.environ.get(variable, "").isdigit():
            return int(os.environ[variable])
    return 1


class _Requests:
    def __init__(self, owner: Mpi, requests: list[Any], phase: str) -> None:
        self._owner, self.requests, self._phase = owner, requests, phase

    def wait(self) -> None:
        if self.requests:
            self._owner._wait(self.requests, self._phase)

    def done(self) -> bool:
        mpi = self._owner._mpi
        try:
            return not self.requests or bool(mpi.Request.Testall(self.requests))
        except mpi.Exception as error:
            self._owner._unfinished += self.requests
            raise self._owner._lost(error, self._phase) from None
