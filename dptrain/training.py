"""The composition root: from a job to a worker, and from its end to a result."""

import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dptrain import afar, arithmetic, presence, supervision
from dptrain.chronicle import Chronicle
from dptrain.corruption import Auditor, set_aside
from dptrain.errors import CorruptionError, ResidualsLost, WorkerLost
from dptrain.exchange.communicator import Alone, Communicator
from dptrain.job.located import located
from dptrain.job.spec import Job
from dptrain.layout import digest
from dptrain.origin import Origin
from dptrain.parts import HOST, Parts
from dptrain.phases import Phase, Phases
from dptrain.recovery import Recovery
from dptrain.result import Result
from dptrain.scalars import Scalars
from dptrain.state import State
from dptrain.trace import Trace
from dptrain.watch import Observer, Unwatched
from dptrain.worker import StopRequest, Worker, together

# What only the chief needs (run directory, checkpoints) is imported where it is used: eight ranks start on two cores.


def run(
    job: Job,
    *,
    model: Any = None,
    run_dir: str | os.PathLike[str] | None = None,
    resume: bool = False,
    trace: str | os.PathLike[str] | None = None,
    observer: Observer | None = None,
    successor: Callable[[], Observer] | None = None,
    communicator: Communicator | None = None,
) -> Result:
    """Train a complete job with all workers of ``communicator`` (None: this process alone); all call it alike.

    Raises DptrainError: on the worker it concerns its own, on the others PeerFailed. Only rank 0 writes to the run
    directory, which is made below ``job.output.runs`` unless ``run_dir`` names one, and the trace; where deaths are
    survived, the lowest of the living takes over. It then makes its observer by ``successor``, if there is one.
    """
    among: Communicator = Alone() if communicator is None else communicator
    among.deadline, among.agreed = job.exchange.deadline, False
    with arithmetic.limited(job.arithmetic.threads):
        run = _Run(job, model, run_dir, resume, trace, observer or Unwatched(), among)
        run.successor = successor
        return run.go()


class _Run:
    def __init__(
        self,
        job: Job,
        model: Any,
        run_dir: str | os.PathLike[str] | None,
        resume: bool,
        trace: str | os.PathLike[str] | None,
        observer: Observer,
        communicator: Communicator,
    ) -> None:
        self.job, self.own_model = job, model
        self.wanted_dir = None if run_dir is None else afar.place(run_dir)
        self.wanted_trace = None if trace is None else Path(trace)
        self.trace: Trace | None = None
        self.phases = Phases()
        self.resume, self.observer, self.communicator = resume, observer, communicator
        self.successor: Callable[[], Observer] | None = None
        self.attempt = 0
        self.stop = StopRequest()

    @property
    def chief(self) -> bool:
        return self.communicator.rank == 0

    def go(self) -> Result:
        with self.stop.listening(), ExitStack() as left:
            if self.wanted_dir is not None and self.resume:
                left.enter_context(presence.alive(self.wanted_dir))
            if self.wanted_trace is not None:
                self.trace = Trace(self.wanted_trace, self.communicator)
                self.phases = self.trace.phases
            afar.renew(0, 0)
            parts = self.parts = Parts(located(self.job), self.own_model, self.communicator)
            self.origin = Origin(
                self.job,
                parts,
                self.communicator,
                run_dir=self.wanted_dir,
                resume=self.resume,
                warned=lambda text: self.observer.warned(text),
            )
            state = self.origin.begin()
            left.enter_context(presence.alive(self.origin.run_dir))
            self.chronicle = self._chronicle()
            together(self.communicator, "opening the journal", self._lead if self.chief else lambda: None)
            self.attempt = self.communicator.broadcast_json(self.attempt, "opening the journal")
            self.worker = self._worker(state)
            self.worker.best = self.origin.best
            auditor = self.worker.auditor = self._auditor()
            self.recovery = Recovery(self.worker, parts.meeting, self.chronicle, parts.hosts, self._lead, auditor)
            self.phases.start()
            self.phases.cell = self.communicator.cell = parts.meeting.watch()
            self.started = time.perf_counter()
            try:
                return self._survive()
            finally:
                parts.meeting.unwatch()
                parts.reader.close()
                self.chronicle.close()

    def _survive(self) -> Result:
        """Train to the end, whoever dies on the way."""
        while True:
            try:
                if self.trace is not None:
                    self.trace.start()
                if self.recovery.behind:
                    self._redo()
                state = self.worker.run()
                result, content = self._end(state)
            except ResidualsLost:
                self.recovery.behind = True
                continue
            except WorkerLost as lost:
                if not self.communicator.survives or isinstance(lost, CorruptionError):
                    raise
                goes_on = self.recovery.meet()
            else:
                goes_on = self.communicator.survives and self.recovery.meet(settled=True)
            if not goes_on:
                break

        def finish() -> None:
            if self.chief:
                self.chronicle.close()
                self.observer.finished(content)

        if self.communicator.survives:
            # The others may have left already.
            finish()
        else:
            together(self.communicator, "the result", finish)
        return result

    def _redo(self) -> None:
        """Do the steps again from the newest state of which all is there; all workers call it alike."""
        reached = self.worker.state.step
        state = self.worker.state = self._go_back(reached)
        self.recovery.behind = False
        self.chronicle.warn(f"residuals are gone with a worker: steps {state.step} to {reached} are done again")

    def _go_back(self, trusted: int) -> State:
        """Go back to a step or before, on all workers."""
        state = self.origin.go_back(trusted, self._distrust)
        self.worker.best = self.origin.best
        self.chronicle.restore(self.origin.manifest or {"epoch_loss": [None, 0.0, 0.0]}, self.origin.best)
        return state

    def _distrust(self, trusted: int) -> None:
        """Set the checkpoints that are newer than a step aside, on the chief."""
        writer = self.chronicle.writer
        if writer is not None:
            writer.wait()
            set_aside(writer.folder, trusted)

    def _auditor(self) -> Auditor:
        parts = self.parts
        return Auditor(
            self.worker,
            parts.meeting,
            self.chronicle,
            parts.hosts,
            self.job.exchange,
            seed=self.job.seed,
            repeatable=parts.probe.repeatable,
            go_back=self._go_back,
            distrust=self._distrust,
        )

    def _chronicle(self) -> Chronicle:
        parts = self.parts
        chronicle = Chronicle(
            rule=parts.rule,
            membership=parts.membership,
            phases=self.phases,
            output=self.job.output,
            lr=parts.update.schedule.at,
            slot_names=parts.update.optimizer.slots,
            facts={
                "job_sha256": parts.digests.job,
                "trajectory_sha256": parts.digests.trajectory,
                "judging_sha256": parts.digests.judging,
                "same_bits": self.same_bits,
                "fingerprint": parts.probe.fingerprint,
                "arithmetic": parts.arithmetic,
                "name": self.job.name,
                "dtype": self.job.train.dtype,
            },
        )
        chronicle.complete = lambda state: parts.exchange.complete(state)
        if self.origin.manifest is not None:
            chronicle.restore(self.origin.manifest, self.origin.best)
        return chronicle

    def _lead(self) -> None:
        """This worker is the chief from now on: from the start, or because those before it died."""
        from dptrain import checkpoint, rundir
        from dptrain.journal import Journal

        succeeds = self.attempt > 0
        if succeeds:
            checkpoint.clean(self.origin.run_dir)
            checkpoint.clean(self.origin.run_dir / rundir.CHECKPOINTS)
            if self.successor is not None:
                self.observer = self.successor()
        journal = Journal(self.origin.run_dir / rundir.JOURNAL, self.attempt or None)
        self.attempt = journal.attempt
        layout = self.parts.assembly.model.layout
        writer = checkpoint.Writer(self.origin.run_dir / rundir.CHECKPOINTS, layout, self.job.output.generations)
        step = self.worker.state.step if succeeds else self.origin.manifest["step"] if self.origin.manifest else 0
        self.chronicle.lead(journal, writer, self.observer, self._scalars(step))
        supervision.opened(self.origin.run_dir, self.attempt, step)
        self.observer.started(
            {
                "run_dir": str(self.origin.run_dir),
                "trace": "" if self.wanted_trace is None else str(self.wanted_trace),
                "name": self.job.name,
                "workers": self.communicator.size,
                "shards": self.job.train.shards,
                "spares": self.parts.membership.spares,
                "exchange": self.parts.exchange.name,
                "parameters": layout.parameters,
                "total_steps": self.parts.rule.total_steps,
                "steps_per_epoch": self.parts.rule.steps_per_epoch,
                "step": step,
                "train_rows": self.parts.assembly.dataset.train.rows,
                "notes": self.parts.notes,
                "succeeds": succeeds,
            }
        )

    def _scalars(self, step: int) -> Scalars | None:
        if self.job.output.tensorboard == "never":
            return None
        return Scalars(self.origin.run_dir, attempt=self.attempt, step=step)

    def _worker(self, state: State) -> Worker:
        return Worker(
            state=state,
            accumulator=self.parts.accumulator,
            evaluator=self.parts.evaluator,
            exchange=self.parts.exchange,
            reader=self.parts.reader,
            rule=self.parts.rule,
            validation=self.parts.assembly.dataset.validation,
            watcher=self.chronicle,
            stop=self.stop,
            phases=self.phases,
            skip_non_finite=self.job.train.non_finite == "skip",
            keep_best=self.job.train.result == "best",
        )

    def _end(self, state: State) -> tuple[Result, dict[str, Any]]:
        """The last checkpoint, the evaluation of the kept weights, and the result, also as what result.json holds.

        It can be done again from its beginning, with fewer workers.
        """
        chronicle, worker = self.chronicle, self.worker
        seconds = time.perf_counter() - self.started
        self.parts.exchange.complete_for_all(state)
        together(self.communicator, "the last checkpoint", lambda: chronicle.checkpoint(state))
        keeps_best = self.job.train.result == "best" and worker.best is not None
        weights = worker.best if keeps_best and worker.best is not None else state.weights
        metrics = {}
        done = self.parts.rule.done(state)
        for name, part in (
            ("validation", self.parts.assembly.dataset.validation),
            ("test", self.parts.assembly.dataset.test),
        ):
            if part.rows and done:
                metrics[name] = worker.evaluate(weights, part, name)
        self.phases.begin(Phase.OTHER)
        per_worker = self.communicator.allgather_json(self._own_figures(worker), "the result")
        per_worker += self.parts.exchange.others()
        content: dict[str, Any] | None = None
        if self.chief:
            slow = chronicle.slowest()
            content = asdict(
                Result(
                    state="done" if done else "stopped",
                    steps=state.step,
                    epochs=round(state.step / self.parts.rule.steps_per_epoch, 4),
                    loss=chronicle.epoch_loss,
                    metrics=metrics,
                    samples_per_second=round(chronicle.rows / max(seconds, 1e-9), 1),
                    seconds=round(seconds, 4),
                    weights_sha256=digest(weights),
                    job_sha256=self.parts.digests.job,
                    workers=sum(len(one.get("processes", [one])) for one in self.parts.exchange.others())
                    or len(self.parts.hosts),
                    shards=self.parts.assembly.shards,
                    exchange=self.parts.exchange.name,
                    arithmetic={
                        **self.parts.arithmetic,
                        "dtype": self.job.train.dtype,
                        **self._gradients(),
                        "mpi": self.communicator.library,
                    },
                    fingerprint=self.parts.probe.fingerprint,
                    same_bits=self.same_bits,
                    recoveries=self.recovery.log,
                    per_worker=per_worker,
                    run_dir=str(self.origin.run_dir),
                    reason=self.parts.rule.reached(state.judgement),
                    result="best" if keeps_best else "last",
                    signal=0 if done else worker.stopped_by,
                    attempt=self.attempt,
                    slowest=None
                    if slow is None
                    else {
                        **slow._asdict(),
                        "rank": per_worker[slow.rank]["rank"],
                        "host": per_worker[slow.rank]["host"],
                    },
                    staleness=chronicle.staleness_of_all(self.job.exchange.bound),
                )
            )

        def write() -> None:
            if content is None:
                return
            from dptrain import checkpoint, rundir

            layout = self.parts.assembly.model.layout
            checkpoint.export(self.origin.run_dir / rundir.WEIGHTS, weights, layout)
            rundir.write_json(self.origin.run_dir / rundir.RESULT, content)

        if self.trace is not None:
            complaint = self.trace.write(HOST, {"job": self.job.name, "run_dir": str(self.origin.run_dir)})
            if complaint is not None:
                self.observer.warned(str(complaint))
        together(self.communicator, "writing the result", write)
        content = self.communicator.broadcast_json(content, "the result")
        return Result(**content), content

    def _gradients(self) -> dict[str, Any]:
        found = self.parts.update.gradients
        return found.describe() if found.leaves else {"gradients": self.job.train.dtype}

    @property
    def same_bits(self) -> bool:
        """Whether the weights are those of any other way to train this job, as far as this run can know."""
        before = self.origin.manifest
        trusted = before is None or (before["same_bits"] and before["fingerprint"] == self.parts.probe.fingerprint)
        return self.parts.exchange.same_bits and self.parts.probe.repeatable and trusted

    def _own_figures(self, worker: Worker) -> dict[str, Any]:
        return {
            "rank": self.communicator.members[self.communicator.rank],
            "host": HOST,
            "machine": self.parts.meeting.machines.number(self.communicator.rank),
            "shards_computed": self.parts.accumulator.shards_computed,
            "rows_read": self.parts.assembly.dataset.train.rows_read,
            "compute_seconds": round(worker.compute_seconds, 4),
            "wait_seconds": round(worker.wait_seconds, 4),
            "phases": {name: round(seconds, 4) for name, seconds in self.phases.named().items()},
            "peak_memory_bytes": arithmetic.peak_memory(),
        }
