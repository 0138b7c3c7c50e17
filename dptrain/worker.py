"""The loop that every worker runs: batch, partials, swap, judge, observe.

There is no test for a rank here and no transport: who does what is the exchange's and the observer's business.
"""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Protocol, TypeVar

import numpy as np

from dptrain import limits
from dptrain.arithmetic import peak_memory
from dptrain.errors import DptrainError, NonFiniteError, PeerFailed, WorkerCrashed, WorkerLost, exit_code
from dptrain.exchange.communicator import Communicator
from dptrain.exchange.protocol import Exchange
from dptrain.exchange.verdict import Report, Verdict
from dptrain.layout import Array
from dptrain.nn.accumulate import Accumulator, Loaded, Partials, Residuals, schedule
from dptrain.nn.evaluate import Evaluator, Rows
from dptrain.phases import Phase, Phases
from dptrain.rule import Rule
from dptrain.state import State

T = TypeVar("T")

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class Reader(Protocol):
    """Gives the rows of shards, reading ahead what is wanted next."""

    def load(self, step: int, lo: int, hi: int, then: tuple[int, int, int] | None) -> Loaded:
        """The rows of shards lo to hi of a step."""


class Watcher(Protocol):
    """Is told of every committed step; writes journals and checkpoints where that is its task."""

    def stepped(self, state: State, verdict: Verdict) -> None:
        """A step was committed (or passed over, where the verdict is not finite)."""

    def evaluated(self, state: State, figures: dict[str, float], best: Array | None) -> None:
        """The validation part was evaluated after this state; ``best`` is the best state's vector, if kept."""


class Auditor(Protocol):
    """Looks for silent corruption. All workers call it alike, at every step, and it meets all where it looks."""

    def settle(self) -> None:
        """Go back to a state that is trusted, where others found, before a death, that this is to be done."""

    def rechecks(self, state: State) -> bool:
        """Whether this step is one of those that ``recheck`` looks at."""

    def recheck(self, state: State, partials: Partials | None) -> bool:
        """Have a part of these partials, None for a worker that failed, computed again by another worker.

        False where all have gone back to another state: this step is not to be gone on with.
        """

    def compare(self, state: State, *, last: bool = False) -> bool:
        """Compare a state before it is committed, and the ``last`` in any case; False as for ``recheck``."""


class StopRequest:
    """Remembers the first signal that asks to end; the loop looks at it between steps."""

    def __init__(self) -> None:
        self.signal = 0

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Within it, SIGINT, SIGTERM and SIGUSR1 finish the step instead of the process."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._note) for number in STOP_SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = self.signal or number


class Worker:
    """One worker's part of a run. All workers of an exchange call ``run``, from the same state.

    ``phases`` is handed to all that works here.
    """

    def __init__(
        self,
        *,
        state: State,
        accumulator: Accumulator,
        evaluator: Evaluator,
        exchange: Exchange,
        reader: Reader,
        rule: Rule,
        validation: Rows,
        watcher: Watcher,
        stop: StopRequest,
        phases: Phases,
        skip_non_finite: bool,
        keep_best: bool,
    ) -> None:
        self.state = state
        self.accumulator = accumulator
        self.evaluator = evaluator
        self.exchange = exchange
        self.reader = reader
        self.rule = rule
        self.validation = validation
        self.watcher = watcher
        self.stop = stop
        self.phases = accumulator.phases = evaluator.phases = exchange.phases = phases
        self.skip_non_finite = skip_non_finite
        self.keep_best = keep_best
        self.best: Array | None = None
        self.compute_seconds = 0.0
        self.wait_seconds = 0.0
        self.stopped_by = 0
        self.verdict: Verdict | None = None
        self.figures: dict[str, float] = {}
        self.auditor: Auditor | None = None
        self._pending: BaseException | None = None
        self._plan = accumulator.schedule(*exchange.membership.mine)

    def run(self) -> State:
        """Train until the rule, or a signal that any worker got, ends it; returns the last committed state.

        Every committed state is ``state`` at once, so that after WorkerLost it can be gone on from.
        """
        auditor = self.auditor
        with np.errstate(all="ignore"):
            if auditor is not None:
                auditor.settle()
            while True:
                if self.rule.evaluates(self.state):
                    self.judge()
                elif self.rule.done(self.state) or self.stopped_by:
                    if auditor is None or auditor.compare(self.state, last=True):
                        break
                else:
                    self.step()
        together(self.exchange.communicator, "the end of training", self._raise_pending)
        return self.state

    def step(self) -> None:
        """One iteration. A failure here is told to all workers before it is raised."""
        state = self.state
        started = time.perf_counter()
        self.phases.at(state.step + 1)
        failure: BaseException | None = None
        # What has left can't be gone back on.
        final = None if self.auditor is not None and self.auditor.rechecks(state) else self.exchange.opening()
        try:
            self._raise_pending()
            partials = self._partials(state, final)
        except BaseException as error:  # a model's sys.exit() must not leave the others waiting
            failure, partials = error, self._nothing()
        self.phases.begin(Phase.OTHER)
        compute = self.phases.since - started
        if self.auditor is not None and not self.auditor.recheck(state, None if failure else partials):
            return
        self.phases.begin(Phase.EXCHANGE)
        code = exit_code(failure) if failure else 0
        report = Report(compute=compute, phases=self.phases.seconds, failure=code, signal=self.stop.signal)
        with told(failure, self.exchange.communicator, state.step, "forward and backward"):
            after, verdict = self.exchange.swap(state, partials, report)
        self.phases.begin(Phase.OTHER)
        self.compute_seconds += compute
        self.wait_seconds += time.perf_counter() - started - compute
        if not verdict.finite and not self.skip_non_finite:
            raise self._blame(state, state.step if verdict.arrival is None else verdict.arrival.batch)
        if self.auditor is not None and not self.auditor.compare(after):
            return
        self.commit(after, verdict)

    def commit(self, state: State, verdict: Verdict) -> None:
        """All agree that ``state`` comes next."""
        self.state, self.verdict = state, verdict
        self.stopped_by = verdict.signal
        self.try_to_watch(lambda: self.watcher.stepped(state, verdict))

    def judge(self) -> None:
        """Evaluate the validation part and remember what that decides."""
        self.judged(self.evaluate(self.state.weights, self.validation, "validation"))

    def judged(self, figures: dict[str, float]) -> None:
        """What an evaluation of ``state`` decides."""
        state = self.state
        judgement, improved = self.rule.judge(state.judgement, state.step, figures[self.rule.train.stop.metric])
        self.state = state = state._replace(judgement=judgement)
        self.figures = figures
        if improved and self.keep_best:
            if self.best is None:
                self.best = state.weights.copy()
            else:
                np.copyto(self.best, state.weights)
        self.try_to_watch(lambda: self.watcher.evaluated(state, figures, self.best))

    def renew(self, exchange: Exchange) -> None:
        """Go on with another exchange of the same state: other workers, other shards."""
        self.exchange = exchange
        exchange.phases = self.phases
        self._plan = self.accumulator.schedule(*exchange.membership.mine)

    def evaluate(self, weights: Array, part: Rows, name: str) -> dict[str, float]:
        """Loss and metrics over a part, the blocks shared among the workers, the same bits for any number."""
        membership, step = self.exchange.membership, self.state.step
        self.exchange.judging(weights, name, self.state)
        total = self.evaluator.blocks(part)
        lo, hi = membership.share(membership.rank, total)
        failure: BaseException | None = None
        rows = np.zeros((hi - lo, self.evaluator.width))
        self.phases.begin(Phase.EVALUATION)
        try:
            with np.errstate(all="ignore"):
                rows = self.evaluator.sums(weights, part, lo, hi)
        except BaseException as error:
            failure = error
        report = Report(failure=exit_code(failure) if failure else 0)
        with told(failure, self.exchange.communicator, step, "evaluation"):
            every = self.exchange.gather(rows, total, report, step, "evaluation")
        figures = self.evaluator.report(every)
        self.phases.begin(Phase.OTHER)
        return figures

    def try_to_watch(self, action: Callable[[], None]) -> None:
        """Let the watcher act; what it raises is told to all workers with the next step."""
        try:
            action()
        except BaseException as error:
            self._pending = self._pending or error

    def _raise_pending(self) -> None:
        if self._pending is not None:
            raise self._pending

    def _partials(self, state: State, final: Callable[[int], None] | None) -> Partials:
        lo, hi = self.exchange.membership.mine
        k = self.accumulator.at_once
        last = self.rule.total_steps - 1

        def load(start: int, stop: int) -> Loaded:
            if stop < hi:
                then: tuple[int, int, int] | None = (state.step, stop, min(hi, stop + k))
            else:
                then = (state.step + 1, lo, min(hi, lo + k)) if state.step < last else None
            return self.reader.load(state.step, start, stop, then)

        kept = None
        if state.residuals:
            kept = Residuals(state.residuals, self.exchange.store.residuals(1 - state.side))
        accumulate, outbox = self.accumulator.accumulate, self.exchange.outbox
        return accumulate(state.weights, self._plan, outbox, state.step, load, kept, final)

    def _nothing(self) -> Partials:
        m = len(self._plan.nodes)
        return Partials(self._plan.nodes, self.exchange.outbox[:m], np.zeros((m, 3)))

    def _blame(self, state: State, batch: int) -> NonFiniteError:
        """Find the first shard, and the tensor in it, whose gradient or loss is not finite, among all workers."""
        shards = self.accumulator.shards
        mine = [self._first_not_finite(state, batch, shard) for shard in self.exchange.suspects]
        found = [place for place in mine if place is not None]
        places = self.exchange.communicator.allgather_json(found[:1], "non-finite gradient")
        everywhere = sorted((shard, rank, what) for rank, some in enumerate(places) for shard, what in some)
        shard, rank, what = everywhere[0] if everywhere else (shards, 0, "their sum, though every shard's is finite")
        place = f"shard {shard}" if everywhere else "all shards"
        cure = 'lower optimizer.lr, set optimizer.clip_norm, look at the data, or set train.non_finite = "skip"'
        if self.accumulator.gradients.name == "float16":
            cure = f'set arithmetic.gradients = "bfloat16", which has the range of float32; or {cure}'
        error = NonFiniteError(
            f"rank {rank} at step {state.step}, {place}, {what}",
            expected="a finite gradient",
            found="NaN or infinity",
            cure=cure,
        )
        error.everywhere = True
        return error

    def _first_not_finite(self, state: State, batch: int, shard: int) -> tuple[int, str] | None:
        plan = schedule(shard, shard + 1, self.accumulator.shards, 1)
        load: Callable[[int, int], Loaded] = lambda lo, hi: self.reader.load(batch, lo, hi, None)  # noqa: E731
        kept = Residuals(state.residuals, None) if state.residuals else None
        partials = self.accumulator.accumulate(state.weights, plan, self.exchange.outbox, batch, load, kept)
        for name, tensor in self.accumulator.model.layout.views(partials.vectors[0]).items():
            if not np.isfinite(tensor).all():
                return shard, f"gradient of {name}"
        return None if np.isfinite(partials.tallies).all() else (shard, "loss")


@contextmanager
def told(failure: BaseException | None, communicator: Communicator, step: int, phase: str) -> Iterator[None]:
    """Around a collective call that tells the others of one's own failure: afterwards the failure is raised.

    Only the lowest rank that failed raises its own; all others leave quietly with PeerFailed. Where the call is
    interrupted, those who have heard of it may be leaving for it: the communicator keeps it until that is known.
    """
    communicator.failure = None
    try:
        yield
    except WorkerLost:
        if failure is not None:
            communicator.failure = named(failure, communicator.rank, step, phase)
            communicator.failure.__cause__ = failure
        raise
    except PeerFailed as peer:
        communicator.agreed = True
        if peer.rank < communicator.size:  # a parameter server's link names the member that left instead
            communicator.blamed = communicator.members[peer.rank], peer.exit_code
        if peer.rank != communicator.rank or failure is None:
            raise
    if failure is not None:
        raise named(failure, communicator.rank, step, phase) from failure


def together(communicator: Communicator, phase: str, action: Callable[[], T]) -> T:
    """Do something on every worker that may fail on some: either all go on, or all leave.

    The lowest rank that fails raises its own error, the others PeerFailed.
    """
    failure: BaseException | None = None
    value: T | None = None
    try:
        value = action()
    except BaseException as error:
        failure = error
    with told(failure, communicator, 0, phase):
        for rank, code in enumerate(communicator.allgather_json(exit_code(failure) if failure else 0, phase)):
            if code:
                raise PeerFailed(rank, 0, phase, code)
    return value  # type: ignore[return-value]


def named(failure: BaseException, rank: int, step: int, phase: str) -> DptrainError:
    """A failure as the one line that says who, where, at which step, in which phase, and why."""
    return told_at(failure, f"rank {rank} at step {step} in {phase}")


def told_at(failure: BaseException, where: str) -> DptrainError:
    """A failure as one line; ``where`` says who, at which step, in which phase."""
    if isinstance(failure, DptrainError):
        return failure
    if isinstance(failure, MemoryError):
        return limits.shortage(where, failure, peak_memory())
    why = f"{type(failure).__name__}: {failure}" if str(failure) else type(failure).__name__
    return WorkerCrashed(where, expected="no exception", found=why, cure="its traceback tells where")
