"""The way from partials to the next state, in three phases that every exchange shares.

Finish the tree; exchange one float64 verdict; update, agree, flip. An exchange says how bytes get about; what they
mean is decided here, the same for all.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from dptrain.errors import PeerFailed
from dptrain.exchange.communicator import Communicator
from dptrain.exchange.verdict import Ballot, Report, Verdict
from dptrain.layout import Array
from dptrain.membership import Membership
from dptrain.nn.accumulate import Partials
from dptrain.state import State, Store, Update


class Exchange(ABC):
    """Every worker calls ``swap`` once a step, in the same order, with its partials and its report.

    ``outbox`` is where the worker's partials (and its binary counter) lie. ``same_bits`` says whether the result is
    promised to be solo's.
    """

    name: str
    same_bits = True

    def __init__(
        self,
        communicator: Communicator,
        membership: Membership,
        update: Update,
        dtype: npt.DTypeLike,
        outbox: int,
    ) -> None:
        self.communicator = communicator
        self.membership = membership
        self.update = update
        self.dtype = dtype
        self.outbox: Array
        self.store: Store
        self._allocate(max(1, outbox))
        self.waited = 0.0
        self.ballot = Ballot(membership, self.squares_of_workers(), update.clip_norm)

    def _allocate(self, outbox: int) -> None:
        """The memory of the partials, ``outbox`` rows, and of the state."""
        layout = self.update.layout
        self.outbox = np.zeros((outbox, layout.size), self.dtype)
        self.store = Store(layout, len(self.update.optimizer.slots), self.dtype)

    @abstractmethod
    def squares_of_workers(self) -> Sequence[int]:
        """How many block norms each worker reports."""

    @abstractmethod
    def finish(self, partials: Partials) -> npt.NDArray[np.float64]:
        """Phase 1: finish the tree for this worker's segment; returns the segment's squared block norms."""

    @abstractmethod
    def commit(self, state: State, verdict: Verdict) -> None:
        """Phase 3: write the next state into the store's other side, on every worker."""

    def swap(self, state: State, partials: Partials, report: Report) -> tuple[State, Verdict]:
        """The next state and the verdict on the step.

        The state is unchanged when the verdict is not finite, but for ``step``. Raises PeerFailed on all workers
        when any of them reports a failure, and DeadlineError when one keeps the others waiting.
        """
        squares = self.finish(partials)
        started = time.perf_counter()
        row = self.ballot.row(replace(report, wait=self.waited), partials.tallies, squares)
        verdict = self.ballot.read(self.communicator.allgather(row, "verdict"))
        self.waited = time.perf_counter() - started
        if verdict.failures:
            rank, code = verdict.failures[0]
            raise PeerFailed(rank, state.step, "forward and backward", code)
        if not verdict.finite:
            return replace(state, step=state.step + 1), verdict
        self.commit(state, verdict)
        back = 1 - state.side
        return (
            replace(
                state,
                step=state.step + 1,
                updates=state.updates + 1,
                weights=self.store.weights(back),
                slots=self.store.slots(back),
                side=back,
            ),
            verdict,
        )

    def gather(
        self, rows: npt.NDArray[np.float64], total: int, report: Report, step: int, phase: str
    ) -> npt.NDArray[np.float64]:
        """All ``total`` rows of work shared as ``membership.share``, in order; rows is this worker's part.

        Raises PeerFailed on all workers when any reports a failure.
        """
        size = self.membership.size
        longest = max(hi - lo for lo, hi in (self.membership.share(rank, total) for rank in range(size)))
        width = rows.shape[1]
        mine = np.zeros(1 + longest * width)
        mine[0] = report.failure
        mine[1 : 1 + rows.size] = rows.ravel()
        every = self.communicator.allgather(mine, phase)
        failures = [(rank, int(code)) for rank, code in enumerate(every[:, 0].tolist()) if code]
        if failures:
            rank, code = failures[0]
            raise PeerFailed(rank, step, phase, code)
        parts = []
        for rank in range(size):
            lo, hi = self.membership.share(rank, total)
            parts.append(every[rank, 1 : 1 + (hi - lo) * width].reshape(hi - lo, width))
        return np.concatenate(parts)
