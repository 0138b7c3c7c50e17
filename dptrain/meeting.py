"""Where the workers of a run meet: the exchange of those that live, the memory they share, and who watches them."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence

import numpy.typing as npt

from dptrain import board
from dptrain.board import ENDED, PHASE, STEP, WATCHDOG, Cell
from dptrain.errors import DptrainError, LaunchError
from dptrain.exchange import shared_memory
from dptrain.exchange.communicator import Communicator
from dptrain.exchange.protocol import Exchange
from dptrain.exchange.replayed import Log, Replayed
from dptrain.exchange.segments import Machines, Memory, Segments
from dptrain.exchange.solo import Solo
from dptrain.job import spec
from dptrain.layout import Array
from dptrain.membership import Coordinating, Membership
from dptrain.nn.accumulate import Accumulator
from dptrain.state import Update
from dptrain.worker import together

_SETTING_UP = "setting up the exchange"


class Meeting:
    """Made by all workers of ``communicator`` together; ``exchange`` is theirs.

    Raises LaunchError, on the worker it concerns or on all, where the job's exchange can't be.
    """

    def __init__(
        self,
        wanted: spec.Exchange,
        communicator: Communicator,
        membership: Membership,
        update: Update,
        accumulator: Accumulator,
    ) -> None:
        self.wanted, self.communicator, self.update = wanted, communicator, update
        self.membership = membership
        self.machines = Machines(communicator.machines(), communicator.rank)
        self.kind = wanted.type
        if self.kind == "auto":
            self.kind = "solo" if communicator.size == 1 else "node"
        together(communicator, _SETTING_UP, self._refuse)
        dtype = accumulator.model.dtype
        rows = _rows_of_outbox(accumulator, membership)
        self.exchange: Exchange
        if self.kind in ("node", "segments"):
            self._place(dtype, rows)
            self.exchange = self._segments()
        else:
            self.exchange = together(communicator, _SETTING_UP, lambda: self._plain(dtype, rows))
        self._watchdog: subprocess.Popen[bytes] | None = None
        self._cells: dict[int, Cell] = {}
        self._all: Sequence[Cell] = ()
        self._handle = -1

    def _refuse(self) -> None:
        size = self.communicator.size
        if self.kind == "solo" and size > 1:
            raise LaunchError(
                'exchange.type = "solo"', expected="one worker", found=f"{size}", cure='use "auto", or start one worker'
            )
        gradients = self.update.gradients
        if self.kind == "allreduce" and gradients.leaves:
            raise LaunchError(
                'exchange.type = "allreduce"',
                expected="gradients that MPI may add in any order",
                found=f'arithmetic.gradients = "{gradients.name}"',
                cure='use "node" or "segments", or leave arithmetic.gradients out',
            )
        if gradients.feeds_back and self.kind != "ps" and len(self._groups().groups) > 1:
            # With a machine, or a worker that shares no memory, the residuals of its shards would be gone.
            raise LaunchError(
                f'arithmetic.gradients = "{gradients.name}"',
                expected='workers that share the memory of one machine, and exchange.type = "node"',
                found=f'exchange.type = "{self.kind}", whose workers have memories of their own',
                cure='use --exchange ps, set arithmetic.gradients = "bfloat16", or start all workers on one machine',
            )
        if gradients.feeds_back and self.kind == "ps" and not self.wanted.in_step:
            raise LaunchError(
                f'arithmetic.gradients = "{gradients.name}"',
                expected='exchange.mode = "sync": each residual belongs to the step after the one that left it',
                found=f'exchange.mode = "{self.wanted.mode}"',
                cure='leave exchange.mode at "sync", or set arithmetic.gradients = "bfloat16"',
            )
        if gradients.feeds_back and self.kind == "ps" and self.wanted.backup_workers:
            raise LaunchError(
                f"exchange.backup_workers = {self.wanted.backup_workers}",
                expected="shards that any worker can compute",
                found=f'arithmetic.gradients = "{gradients.name}", whose residuals lie with one',
                cure="leave exchange.backup_workers at 0",
            )
        if not self.wanted.in_step and self.kind != "ps":
            raise LaunchError(
                f'exchange.mode = "{self.wanted.mode}"',
                expected="a parameter server",
                found=f'exchange.type = "{self.kind}"',
                cure='start it with --exchange ps, or leave exchange.mode at "sync"',
            )
        if self.wanted.coordinators > size:
            raise LaunchError(
                "exchange.coordinators",
                expected=f"at most the number of workers, {size}",
                found=str(self.wanted.coordinators),
                cure="lower it, or leave it at 0 for every worker",
            )

    def _plain(self, dtype: npt.DTypeLike, rows: int) -> Exchange:
        if self.kind == "ps":
            from dptrain.exchange.parameter_server.exchange import ParameterServer
            from dptrain.exchange.parameter_server.servers import Chief
            from dptrain.exchange.parameter_server.stale import StaleParameterServer

            wanted = self.wanted
            if isinstance(self.communicator, Log):
                return Replayed(self.communicator, self.membership, self.update, dtype)
            assert isinstance(self.communicator, Chief)
            kind = ParameterServer if wanted.in_step else StaleParameterServer
            server = kind(
                self.communicator,
                self.membership,
                self.update,
                dtype,
                lease_seconds=wanted.lease_seconds,
                deadline=wanted.deadline,
                backup_workers=wanted.backup_workers,
                servers=wanted.servers,
            )
            if isinstance(server, StaleParameterServer):
                server.bound, server.way = wanted.bound, wanted.staleness_lr
            return server
        if self.kind == "solo":
            return Solo(self.communicator, self.membership, self.update, dtype, rows)
        from dptrain.exchange.allreduce import Allreduce

        return Allreduce(self.communicator, self.membership, self.update, dtype, rows)

    def _place(self, dtype: npt.DTypeLike, rows: int) -> None:
        """Reserve what the exchange needs, once: it holds for whoever is left of these workers."""
        communicator, machines = self.communicator, self._groups()
        every = communicator.allgather_json(rows, _SETTING_UP)
        outboxes = [every[rank] for rank in machines.here]
        kept = self.membership.shards if self.update.gradients.feeds_back else 0
        memory = Memory(self.update.layout, len(self.update.optimizer.slots), dtype, outboxes, kept)
        shared = _shared(communicator, machines, memory.nbytes)
        self._store, boxes, marks = together(communicator, _SETTING_UP, lambda: memory.place(shared))
        here = [communicator.members[rank] for rank in machines.here]
        self._outboxes, self._marks = (dict(zip(here, some, strict=True)) for some in (boxes, marks))

    def _groups(self) -> Machines:
        """Who shares memory in this exchange."""
        if self.kind == "segments":
            return Machines(tuple((rank,) for rank in range(self.communicator.size)), self.communicator.rank)
        return self.machines

    def _segments(self) -> Segments:
        communicator, machines = self.communicator, self._groups()
        here = [communicator.members[rank] for rank in machines.here]
        return Segments(
            communicator,
            self.membership,
            self.update,
            name=self.kind,
            coordinators=min(self.wanted.coordinators or communicator.size, communicator.size),
            machines=machines,
            store=self._store,
            outboxes=[self._outboxes[member] for member in here],
            marks=[self._marks[member] for member in here],
            early=len(self.machines.groups) > 1,
        )

    @property
    def survivable(self) -> bool:
        """Whether every worker that is left has all of the state."""
        return self.kind != "allreduce"

    def renew(self) -> Exchange:
        """The exchange of those that are left, on the state that they share; all of them call it."""
        communicator = self.communicator
        self.membership = Membership(communicator.rank, communicator.size, self.membership.shards)
        self.machines = Machines(communicator.machines(), communicator.rank)
        if self.kind == "ps":
            from dptrain.exchange.parameter_server.exchange import ParameterServer

            assert isinstance(self.exchange, ParameterServer)
            self.membership = Coordinating(communicator.rank, communicator.size, self.membership.shards)
            self.exchange.lead(self.membership)
            return self.exchange
        self.exchange = self._segments()
        return self.exchange

    def watch(self) -> Cell:
        """This worker's cell on its machine's board, and from now on a watchdog that ends those that hang.

        Where the workers of a machine can't share a board, nobody watches those that can't.
        """
        communicator, here = self.communicator, self.machines.here
        if communicator.size == 1 or self.kind == "ps":
            return board.private()
        size, handle, path = board.nbytes(len(here)), -1, ""
        leads = communicator.rank == here[0]
        if leads:
            handle = os.memfd_create(board.NAME, os.MFD_CLOEXEC)
            os.posix_fallocate(handle, 0, size)
            path = f"/proc/{os.getpid()}/fd/{handle}"
        paths = communicator.allgather_json(path, "watching")
        if not leads:
            try:
                handle = os.open(paths[here[0]], os.O_RDWR | os.O_CLOEXEC)
            except OSError:
                handle = -1
        cell = board.private()
        if handle >= 0:
            self._all = board.mapped(handle, len(here))
            self._cells = {communicator.members[rank]: self._all[1 + i] for i, rank in enumerate(here)}
            cell = self._cells[communicator.members[communicator.rank]]
            board.sign(cell, communicator.members[communicator.rank])
        communicator.allgather_json(None, "watching")
        if leads and self.wanted.hang_seconds:
            self._start_watchdog(handle, len(here))
        self._handle = handle
        return cell

    def _start_watchdog(self, handle: int, workers: int) -> None:
        whole = int(len(self.machines.groups) == 1)
        numbers = [handle, workers, self.wanted.hang_seconds, self.wanted.deadline, whole]
        self._watchdog = subprocess.Popen(
            [sys.executable, "-P", "-m", "dptrain.watchdog", *map(str, numbers)],
            pass_fds=[handle],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            # It outlives the worker that started it.
            start_new_session=True,
        )

    def unwatch(self) -> None:
        """Nobody watches any more; the first of a machine sees to it."""
        if not self._all:
            return
        os.close(self._handle)
        if self.communicator.rank != self.machines.here[0]:
            return
        if self._watchdog is not None:
            self._watchdog.kill()
            self._watchdog.wait()
        elif self._all[0][WATCHDOG]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._all[0][WATCHDOG], signal.SIGKILL)

    def seen(self) -> Mapping[str, Sequence[int]]:
        """Of each dead worker of this machine, by its first rank: the step and phase it died at, whether it hung."""
        living = set(self.communicator.members)
        return {
            str(member): [cell[STEP], cell[PHASE], cell[ENDED]]
            for member, cell in self._cells.items()
            if member not in living
        }


def _rows_of_outbox(accumulator: Accumulator, membership: Membership) -> int:
    """Enough for whatever shards this worker may own, of as many workers as may be left."""
    everyone = range(1, membership.size + 1)
    members = [Membership(rank, size, membership.shards) for size in everyone for rank in range(size)]
    return max(1, *(accumulator.schedule(lo, hi).slots for lo, hi in {member.mine for member in members}))


def _shared(communicator: Communicator, machines: Machines, nbytes: int) -> Array | None:
    """Memory of this machine's workers; None for a worker that is alone there."""
    if all(len(group) == 1 for group in machines.groups):
        return None
    phase, leader = "sharing memory", machines.here[0]
    several, leads = len(machines.here) > 1, communicator.rank == leader
    for way in shared_memory.WAYS:
        made = together(communicator, phase, lambda way=way: way(nbytes) if several and leads else None)  # type: ignore[misc]
        try:
            paths = communicator.allgather_json(made.path if made else "", phase)
            memory = shared_memory.attach(paths[leader], nbytes) if several else None
            reached = communicator.allgather_json(not several or memory is not None, phase)
        finally:
            if made:
                made.release()
        if all(reached):
            return memory
    raise for_all(shared_memory.unreachable(reached.index(False)))


def for_all(error: DptrainError) -> DptrainError:
    """An error that every worker finds out by itself."""
    error.everywhere = True
    return error
