"""What is written down while a run trains: journal, checkpoints, and word to whoever watches.

Every worker keeps the books; the chief's go to disk. So any other can take over in the middle of them.
"""

import contextlib
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from dptrain.afar import UNSENT
from dptrain.arrivals import Arrival
from dptrain.checkpoint import Snapshot, Writer
from dptrain.errors import StorageError
from dptrain.exchange.verdict import Verdict
from dptrain.job.spec import Output
from dptrain.journal import Journal, attempt_of, read_all
from dptrain.layout import Array
from dptrain.membership import Membership
from dptrain.phases import NAMES, Phase, Phases
from dptrain.rule import Rule
from dptrain.rundir import ARRIVALS
from dptrain.scalars import Scalars
from dptrain.state import State
from dptrain.straggler import Pace, Slowest
from dptrain.watch import Observer, Unwatched

_LINES = 300
_LONGEST_SILENCE = 1.0
_KEPT = UNSENT + 1
"""Of the newest lines: what the chief had not yet written when it died, or what had not reached the disk."""


class Chronicle:
    """A worker's watcher. ``lr`` gives the learning rate of an update, ``facts`` go into every manifest.

    ``phases`` are the worker's own; those of all come with the verdicts. Nothing is written before ``lead``.
    """

    def __init__(
        self,
        *,
        rule: Rule,
        membership: Membership,
        phases: Phases,
        output: Output,
        lr: Callable[[int], float],
        slot_names: tuple[str, ...],
        facts: Mapping[str, Any],
    ) -> None:
        self.journal: Journal | None = None
        self.writer: Writer | None = None
        self.scalars: Scalars | None = None
        self.observer: Observer = Unwatched()
        self.rule, self.output, self.lr = rule, output, lr
        self.slot_names, self.facts = slot_names, facts
        self.phases = phases
        self.pace = _pace(membership)
        self.interval = output.journal_steps or -(-rule.total_steps // _LINES)
        self.rows = 0.0
        self.epoch_loss: float | None = None
        self.epoch_metrics: dict[str, float] = {}
        self.best: Array | None = None
        self.staleness: Counter[int] = Counter()
        """How many updates of the whole run had which, where they are not all of the newest weights."""
        self._newest: tuple[int, Arrival] | None = None
        self._arrivals: Journal | None = None
        # No finding of silent corruption can bring a step up to this into doubt; None where none is looked for.
        self.trusted: int | None = None
        self._epoch = [0.0, 0.0]
        self._started = self._last_line = self._last_checkpoint = time.perf_counter()
        self._checkpointed = -1
        self._lag: list[tuple[Journal, dict[str, Any]]] = []
        self._lines: deque[dict[str, Any]] = deque(maxlen=_KEPT)
        self._workers = self._workers_seen = self._workers_told = 0
        self._compute: tuple[float, ...] = ()
        self._wait: tuple[float, ...] = ()
        self._norm: float | None = None
        self._phases: npt.NDArray[np.float64] = np.zeros((membership.size, len(Phase)))
        self._phases_told = self._phases
        self.complete: Callable[[State], bool] = lambda state: True
        """Asked before a checkpoint: whether all of the state is here."""
        self._clear()

    def lead(self, journal: Journal, writer: Writer, observer: Observer, scalars: Scalars | None = None) -> None:
        """From now on this worker is the chief."""
        self.journal, self.writer, self.observer, self.scalars = journal, writer, observer, scalars
        self._last_checkpoint = time.perf_counter()
        self._write_missing(journal)
        if self._newest is not None:
            # Who led before may have died before it wrote this.
            self._keep(*self._newest)

    def _write_missing(self, journal: Journal) -> None:
        """Who led before may have died before it wrote the newest lines."""
        if not self._lines:
            return
        steps = [line for line in read_all(journal.path) if "step" in line and "event" not in line]
        written = max((line["step"] for line in steps if attempt_of(line) == journal.attempt), default=0)
        for line in self._lines:
            if line["step"] > written:
                self._append(journal, line)

    def renew(self, membership: Membership, kept: Sequence[int]) -> None:
        """Go on with another membership, in which those are left that had the ranks ``kept``."""
        self.pace = _pace(membership)
        places = list(kept)
        self._phases, self._phases_told = self._phases[places], self._phases_told[places]
        self._compute = self._wait = ()

    def recovered(self, recovery: Mapping[str, Any]) -> None:
        """Some workers died, and the others go on."""
        self.observer.recovered(recovery)
        self._write({"event": "recovery", **recovery})

    def stepped(self, state: State, verdict: Verdict) -> None:
        """See worker.Watcher."""
        self._steps += 1
        self.rows += verdict.rows
        self._rows += verdict.rows
        if verdict.finite:
            self._loss += verdict.loss
            self._weight += verdict.weight
            self._epoch[0] += verdict.loss
            self._epoch[1] += verdict.weight
        else:
            self._skipped += 1
        if verdict.arrival is not None:
            self._arrived(state, verdict.arrival)
        self._norm = verdict.norm
        self._workers = verdict.workers
        self._compute = _added(self._compute, verdict.compute)
        self._wait = _added(self._wait, verdict.wait)
        self._phases = verdict.phases
        self.pace.stepped(verdict.compute)
        whole = state.step % self.rule.steps_per_epoch == 0
        if whole or state.step >= self.rule.total_steps:
            loss, weight = self._epoch
            self.epoch_loss = loss / weight if weight else self.epoch_loss
        if whole:
            # Not at an end within an epoch: a run that is made longer goes on with it.
            self._epoch = [0.0, 0.0]
        if self.rule.evaluates(state):
            return
        late = time.perf_counter() - self._last_line > _LONGEST_SILENCE
        if self._steps >= self.interval or late or state.step >= self.rule.total_steps:
            self._line(state, {})
        self._checkpoint_if_due(state)

    def evaluated(self, state: State, figures: dict[str, float], best: Array | None) -> None:
        """See worker.Watcher."""
        self.best = best
        self.epoch_metrics = figures
        self._line(state, {"metrics": figures})
        self._checkpoint_if_due(state)

    def slowest(self) -> Slowest | None:
        """The worker that has clearly held the others up, if there is one."""
        return self.pace.slowest(self._phases)

    def staleness_of_all(self, bound: int | None) -> dict[str, Any] | None:
        """What the result says of it; None where all updates were of the newest weights.

        ``bound`` is the present one: a run that was resumed may have had another before.
        """
        late = self.staleness
        if not late:
            return None
        mean = sum(age * count for age, count in late.items()) / late.total()
        bound = None if bound is not None and max(late) > bound else bound
        return {"bound": bound, "mean": round(mean, 4), "max": max(late), "updates": _listed(late)}

    def warn(self, text: str) -> None:
        """Tell the observer and the journal."""
        self.observer.warned(text)
        self._write({"event": "warning", "text": text})

    def restore(self, manifest: Mapping[str, Any], best: Array | None) -> None:
        """Go on from a snapshot of this chronicle's."""
        self._clear()
        self._lines.clear()
        self._checkpointed = -1
        self.best = best
        self.epoch_loss, *self._epoch = manifest["epoch_loss"]
        self.staleness = Counter({int(age): count for age, count in manifest.get("staleness", {}).items()})

    def checkpoint(self, state: State) -> None:
        """Write a last checkpoint and the rest of the journal, and wait for them.

        Without them a run that is done lacks nothing but the way to go on from there: it is only warned of that. One
        that was stopped is to go on from just there: raises StorageError.
        """
        writer = self.writer
        if writer is None:
            return
        writer.wait()
        if self._checkpointed != state.step or writer.failed:
            self._start_checkpoint(writer, state)
        self.phases.begin(Phase.CHECKPOINT)
        writer.wait()
        self.phases.begin(Phase.OTHER)
        complaint = writer.complaint()
        if complaint and not self.rule.done(state):
            raise complaint
        if complaint:
            self.warn(f"the run ends without a last checkpoint: {complaint}")
        with contextlib.suppress(StorageError):
            self._write_lag()

    def close(self) -> None:
        """Let what is being written be finished; nothing is raised."""
        if self.writer is not None:
            self.writer.wait()
        for journal in (self.journal, self._arrivals):
            if journal is not None:
                with contextlib.suppress(StorageError):
                    journal.close()
        if self.scalars is not None:
            self.scalars.close()

    def _clear(self) -> None:
        self._steps = self._skipped = 0
        self._late: Counter[int] = Counter()
        self._rows = self._loss = self._weight = 0.0
        self._compute = self._wait = ()
        self._norm = None

    def _line(self, state: State, more: Mapping[str, Any]) -> None:
        now = time.perf_counter()
        line: dict[str, Any] = {
            "step": state.step,
            "epoch": round(state.step / self.rule.steps_per_epoch, 4),
            "loss": self._loss / self._weight if self._weight else None,
            "lr": self.lr(max(1, state.updates)),
            "samples_per_second": round(self._rows / max(1e-9, now - self._last_line), 1),
            "seconds": round(now - self._started, 4),
            "compute": [round(s, 6) for s in self._compute],
            "wait": [round(s, 6) for s in self._wait],
            "phases": self._phases_since(),
        }
        if self._norm is not None:
            line["norm"] = self._norm
        if self._skipped:
            line["skipped"] = self._skipped
        if self._late:
            line["staleness"] = _listed(self._late)
        if self._workers:
            line["workers"] = self._workers
            self._tell_of_workers(state.step)
        line.update(more)
        self._last_line = now
        self._clear()
        self._lines.append(line)
        self._write(line)
        self.observer.progressed(line)

    def _tell_of_workers(self, step: int) -> None:
        """Have the journal know that others compute than did, if they do for longer than from one line to the next.

        While some come for others all of them do.
        """
        now, seen, before = self._workers, self._workers_seen, self._workers_told
        self._workers_seen = now
        if now in (seen, before or now):
            self._workers_told = now
            if before not in (0, now):
                self._write({"event": "workers", "step": step, "workers": now, "before": before})

    def _phases_since(self) -> dict[str, list[float]]:
        """The seconds of each worker since the line before, by phase; those that took no time are left out."""
        took = (self._phases - self._phases_told).T.round(6).tolist()
        self._phases_told = self._phases
        return {name: seconds for name, seconds in zip(NAMES, took, strict=True) if any(seconds)}

    def _write(self, line: dict[str, Any]) -> None:
        """Lines that a full disk refuses are kept and tried again with the next."""
        if self.scalars is not None:
            try:
                self.scalars.write(line)
            except StorageError as error:
                self.scalars = None
                self.observer.warned(f"training goes on without TensorBoard's curves: {error}")
        if self.journal is not None:
            self._append(self.journal, line)

    def _append(self, journal: Journal, line: dict[str, Any]) -> None:
        failing = bool(self._lag)
        self._lag.append((journal, line))
        try:
            self._write_lag()
        except StorageError as error:
            if not failing:
                self.observer.warned(f"training goes on without a journal: {error}")

    def _write_lag(self) -> None:
        while self._lag:
            journal, line = self._lag[0]
            journal.write(line)
            self._lag.pop(0)

    def _arrived(self, state: State, arrival: Arrival) -> None:
        """Keep the order of arrival: a step that is committed is in the log before anything else tells of it."""
        self.staleness[arrival.staleness] += 1
        self._late[arrival.staleness] += 1
        self._newest = state.step, arrival
        self._keep(state.step, arrival)

    def _keep(self, step: int, arrival: Arrival) -> None:
        if self.journal is None:
            return
        if self._arrivals is None:
            self._arrivals = Journal(self.journal.path.with_name(ARRIVALS), self.journal.attempt)
        self._append(self._arrivals, arrival.line(step))

    def _checkpoint_if_due(self, state: State) -> None:
        writer = self.writer
        if writer is None:
            return
        complaint = writer.complaint()
        if complaint:
            self.warn(f"training goes on without a new checkpoint: {complaint}")
        now = time.perf_counter()
        seconds, steps = self.output.checkpoint_seconds, self.output.checkpoint_steps
        by_time = seconds and now - self._last_checkpoint >= seconds and not writer.busy
        if (by_time or (steps and state.step % steps == 0)) and self.complete(state):
            self._last_checkpoint = now
            self._start_checkpoint(writer, state)

    def _start_checkpoint(self, writer: Writer, state: State) -> None:
        self.phases.begin(Phase.CHECKPOINT)
        self._checkpointed = state.step
        facts = {**self.facts, "epoch_loss": [self.epoch_loss, *self._epoch]}
        if self.staleness:
            pending = self._newest[1].pending if self._newest and self._newest[0] == state.step else ()
            facts |= {"pending": list(pending), "staleness": _listed(self.staleness)}
        writer.start(Snapshot.of(state, self.best, self.slot_names, facts, writer.memory()), self.trusted)
        self.phases.begin(Phase.OTHER)


def _pace(membership: Membership) -> Pace:
    return Pace([hi - lo for lo, hi in map(membership.owned_by, range(membership.size))])


def _listed(late: Mapping[int, int]) -> dict[str, int]:
    """How many updates had which staleness, as JSON has it."""
    return {str(age): late[age] for age in sorted(late)}


def _added(some: tuple[float, ...], more: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(a + b for a, b in zip(some, more, strict=True)) if some else more
