"""What the chief writes down while it trains: journal, checkpoints, and word to whoever watches."""

import contextlib
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from dptrain.checkpoint import Snapshot, Writer
from dptrain.errors import StorageError
from dptrain.exchange.verdict import Verdict
from dptrain.job.spec import Output
from dptrain.journal import Journal
from dptrain.layout import Array
from dptrain.membership import Membership
from dptrain.phases import NAMES, Phase, Phases
from dptrain.rule import Rule
from dptrain.state import State
from dptrain.straggler import Pace, Slowest
from dptrain.watch import Observer

_LINES = 300
_LONGEST_SILENCE = 1.0


class Chronicle:
    """The chief's watcher. ``lr`` gives the learning rate of an update, ``facts`` go into every manifest.

    ``phases`` are the chief's own; those of all workers come with the verdicts.
    """

    def __init__(
        self,
        *,
        journal: Journal,
        writer: Writer,
        observer: Observer,
        rule: Rule,
        membership: Membership,
        phases: Phases,
        output: Output,
        lr: Callable[[int], float],
        slot_names: tuple[str, ...],
        facts: Mapping[str, Any],
    ) -> None:
        self.journal, self.writer, self.observer = journal, writer, observer
        self.rule, self.output, self.lr = rule, output, lr
        self.slot_names, self.facts = slot_names, facts
        self.phases = phases
        shards = [hi - lo for lo, hi in map(membership.owned_by, range(membership.size))]
        self.pace = Pace(shards)
        self.interval = output.journal_steps or -(-rule.total_steps // _LINES)
        self.rows = 0.0
        self.epoch_loss: float | None = None
        self.epoch_metrics: dict[str, float] = {}
        self.best: Array | None = None
        self._epoch = [0.0, 0.0]
        self._started = self._last_line = self._last_checkpoint = time.perf_counter()
        self._checkpointed = -1
        self._lag: list[dict[str, Any]] = []
        self._compute: tuple[float, ...] = ()
        self._wait: tuple[float, ...] = ()
        self._norm: float | None = None
        self._phases: npt.NDArray[np.float64] = np.zeros((membership.size, len(Phase)))
        self._phases_told = self._phases
        self._clear()

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
        self._norm = verdict.norm
        self._compute = _added(self._compute, verdict.compute)
        self._wait = _added(self._wait, verdict.wait)
        self._phases = verdict.phases
        self.pace.stepped(verdict.compute)
        if state.step % self.rule.steps_per_epoch == 0 or state.step >= self.rule.total_steps:
            loss, weight = self._epoch
            self.epoch_loss = loss / weight if weight else self.epoch_loss
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

    def warn(self, text: str) -> None:
        """Tell the observer and the journal."""
        self.observer.warned(text)
        self._write({"event": "warning", "text": text})

    def restore(self, manifest: Mapping[str, Any], best: Array | None) -> None:
        """Go on from a snapshot of this chronicle's."""
        self.best = best
        self.epoch_loss, *self._epoch = manifest["epoch_loss"]

    def checkpoint(self, state: State) -> None:
        """Write a last checkpoint and the rest of the journal, and wait for them. Raises StorageError."""
        self.writer.wait()
        if self._checkpointed != state.step or self.writer.failed:
            self._start_checkpoint(state)
        self.phases.begin(Phase.CHECKPOINT)
        self.writer.wait()
        self.phases.begin(Phase.OTHER)
        complaint = self.writer.complaint()
        if complaint:
            raise complaint
        self._write_lag()

    def close(self) -> None:
        """Let what is being written be finished; nothing is raised."""
        self.writer.wait()
        with contextlib.suppress(StorageError):
            self.journal.close()

    def _clear(self) -> None:
        self._steps = self._skipped = 0
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
        line.update(more)
        self._last_line = now
        self._clear()
        self._write(line)
        self.observer.progressed(line)

    def _phases_since(self) -> dict[str, list[float]]:
        """The seconds of each worker since the line before, by phase; those that took no time are left out."""
        took = (self._phases - self._phases_told).T.round(6).tolist()
        self._phases_told = self._phases
        return {name: seconds for name, seconds in zip(NAMES, took, strict=True) if any(seconds)}

    def _write(self, line: dict[str, Any]) -> None:
        """Lines that a full disk refuses are kept and tried again with the next."""
        failing = bool(self._lag)
        self._lag.append(line)
        try:
            self._write_lag()
        except StorageError as error:
            if not failing:
                self.observer.warned(f"training goes on without a journal: {error}")

    def _write_lag(self) -> None:
        while self._lag:
            self.journal.write(self._lag[0])
            self._lag.pop(0)

    def _checkpoint_if_due(self, state: State) -> None:
        complaint = self.writer.complaint()
        if complaint:
            self.warn(f"training goes on without a new checkpoint: {complaint}")
        now = time.perf_counter()
        seconds, steps = self.output.checkpoint_seconds, self.output.checkpoint_steps
        by_time = seconds and now - self._last_checkpoint >= seconds and not self.writer.busy
        if by_time or (steps and state.step % steps == 0):
            self._last_checkpoint = now
            self._start_checkpoint(state)

    def _start_checkpoint(self, state: State) -> None:
        self.phases.begin(Phase.CHECKPOINT)
        self._checkpointed = state.step
        self.writer.start(self._snapshot(state))
        self.phases.begin(Phase.OTHER)

    def _snapshot(self, state: State) -> Snapshot:
        facts = {**self.facts, "epoch_loss": [self.epoch_loss, *self._epoch]}
        return Snapshot.of(state, self.best, self.slot_names, facts)


def _added(some: tuple[float, ...], more: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(a + b for a, b in zip(some, more, strict=True)) if some else more
