"""The way from partials to the next state, in phases that every exchange shares.

Tell all how it went here; finish the tree; where the gradient is clipped, tell its norm; update; agree; flip. An
exchange says how bytes get about; what they mean is decided here, the same for all.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from dptrain.arrivals import Arrival
from dptrain.errors import PeerFailed
from dptrain.exchange.communicator import Communicator
from dptrain.exchange.verdict import Ballot, Report, Verdict
from dptrain.layout import Array
from dptrain.membership import Membership
from dptrain.nn.accumulate import Accumulator, Loaded, Partials
from dptrain.phases import Phase, Phases
from dptrain.state import State, Store, Update

Load = Callable[[int, int, int, None], Loaded]


class Exchange(ABC):
    """Every worker calls ``swap`` once a step, in the same order, with its partials and its report.

    ``outbox`` is where the worker's partials (and its binary counter) lie, ``store`` where its state does.
    ``same_bits`` says whether the result is promised to be solo's. ``arrival`` is of the step that ``swap`` is at,
    where its batch is decided by who is ready first.
    """

    name: str
    same_bits = True
    arrival: Arrival | None = None
    outbox: Array
    store: Store

    def __init__(self, communicator: Communicator, membership: Membership, update: Update) -> None:
        self.communicator = communicator
        self.membership = membership
        self.update = update
        self.phases = Phases()
        self.waited = 0.0
        self._good = np.zeros(1)
        self._ballot: Ballot | None = None

    @property
    def ballot(self) -> Ballot:
        """How this exchange's workers vote."""
        if self._ballot is None:
            self._ballot = Ballot(self.membership, self.squares_of_workers(), self.update.clip_norm)
        return self._ballot

    @abstractmethod
    def squares_of_workers(self) -> Sequence[int]:
        """How many block norms each worker reports."""

    @abstractmethod
    def collect(self, partials: Partials) -> None:
        """Get all that this worker's segment is the sum of to where it can be added."""

    @abstractmethod
    def squares(self) -> npt.NDArray[np.float64]:
        """Finish the tree for this worker's segment; its squared block norms. Called where the gradient is clipped."""

    @abstractmethod
    def advance(self, state: State, verdict: Verdict) -> bool:
        """Write the next state into the store's other side, on every worker; whether the own segment was finite.

        The tree is finished here where ``squares`` was not asked for.
        """

    @property
    def suspects(self) -> range:
        """The shards that this worker looks through for the one whose gradient is not finite."""
        return range(*self.membership.mine)

    def admit(self, identity: Mapping[str, str]) -> None:  # noqa: B027 - nothing to do is right for most
        """What workers that join later have to agree with; nobody does where this is not overridden."""

    def begin(self, step: int, total: int, pending: Sequence[int]) -> bool:
        """Go on after ``step`` of ``total`` steps; of batches up to the newest that was begun, ``pending`` are left.

        False where steps are those of their batches, so that some of these are left out and others done twice.
        """
        return list(pending) == list(range(step, step + len(pending)))

    def equip(self, accumulator: Accumulator, load: Load) -> None:  # noqa: B027 - as above
        """With what an exchange computes that computes itself; ``load`` gives shards lo to hi of a batch."""

    def opening(self) -> Callable[[int], None] | None:
        """A step begins, on all workers: who is to be told from which parameter on the outbox's partials are final.

        None where nobody wants to know before ``swap``.
        """
        return None

    def meanwhile(self) -> Callable[[], object] | None:
        """What is to be done again and again while others are waited for in ``swap``."""
        return None

    def judging(self, weights: Array, part: str, state: State) -> None:  # noqa: B027 - as above
        """What the next ``gather`` is about: these weights, on a part of the data."""

    def complete(self, state: State) -> bool:
        """On the chief: get what lies elsewhere of a committed state to where a checkpoint can be made of it.

        False where that is gone.
        """
        return True

    def complete_for_all(self, state: State) -> None:  # noqa: B027 - as above
        """The same, called by all alike. Raises ResidualsLost on all."""

    def others(self) -> list[dict[str, Any]]:
        """The figures of those who computed for this worker elsewhere."""
        return []

    def swap(self, state: State, partials: Partials, report: Report) -> tuple[State, Verdict]:
        """The next state and the verdict on the step.

        What the outbox held is used up: every step writes it anew. The state is unchanged when the verdict is not
        finite, but for ``step``. Raises PeerFailed on all workers
        when any of them reports a failure, and DeadlineError when one keeps the others waiting.
        """
        row = self.ballot.row(report._replace(wait=self.waited), partials.tallies)
        self.waited = 0.0
        verdict = self.ballot.read(self._gathered(row, "partials"))._replace(arrival=self.arrival)
        if verdict.failures:
            rank, code = verdict.failures[0]
            raise PeerFailed(rank, state.step, "forward and backward", code)
        if verdict.finite:
            verdict = self._decided(state, verdict, partials)
        if not verdict.finite:
            return state._replace(step=state.step + 1), verdict
        back = 1 - state.side
        weights, slots = self.store.weights(back), self.store.slots(back)
        residuals = self.store.residuals(back)
        return State(state.step + 1, state.updates + 1, weights, slots, back, state.judgement, residuals), verdict

    def _decided(self, state: State, verdict: Verdict, partials: Partials) -> Verdict:
        """Write the next state, and agree on whether it counts."""
        self.phases.begin(Phase.EXCHANGE)
        self.collect(partials)
        if self.update.clip_norm:
            squares = self.ballot.row_of_squares(self.squares())
            verdict = self.ballot.clipped(verdict, self._gathered(squares, "norms"))
            if not verdict.finite:
                return verdict
        self.phases.begin(Phase.UPDATE)
        self._good[0] = self.advance(state, verdict)
        every = self._gathered(self._good, "the new state")
        return verdict if every.all() else verdict._replace(finite=False)

    def _gathered(self, row: npt.NDArray[np.float64], phase: str) -> npt.NDArray[np.float64]:
        """All workers' rows; nobody goes on before all have come here."""
        self.phases.begin(Phase.WAITING, phase)
        started = time.perf_counter()
        rows = self.communicator.allgather(row, phase, self.meanwhile())
        self.waited += time.perf_counter() - started
        self.phases.begin(Phase.EXCHANGE)
        return rows

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
        self.phases.begin(Phase.WAITING, phase)
        every = self.communicator.allgather(mine, phase)
        self.phases.begin(Phase.EVALUATION)
        failures = [(rank, int(code)) for rank, code in enumerate(every[:, 0].tolist()) if code]
        if failures:
            rank, code = failures[0]
            raise PeerFailed(rank, step, phase, code)
        parts = []
        for rank in range(size):
            lo, hi = self.membership.share(rank, total)
            parts.append(every[rank, 1 : 1 + (hi - lo) * width].reshape(hi - lo, width))
        return np.concatenate(parts)
