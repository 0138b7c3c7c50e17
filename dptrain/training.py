"""The composition root: from a job to a worker, and from its end to a result."""

import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dptrain import arithmetic
from dptrain.exchange.communicator import Alone, Communicator
from dptrain.job.spec import Job
from dptrain.layout import Array, digest
from dptrain.parts import HOST, Parts
from dptrain.phases import Phase, Phases
from dptrain.state import State
from dptrain.trace import Trace
from dptrain.watch import Bystander, Observer, Unwatched
from dptrain.worker import StopRequest, Worker, together

if TYPE_CHECKING:
    from dptrain.checkpoint import Snapshot
    from dptrain.chronicle import Chronicle

# What only the chief needs (run directory, checkpoints, journal) is imported where it is used: eight ranks start on
# two cores.


@dataclass(frozen=True)
class Result:
    """What result.json holds. ``state`` is "done", or "stopped" where a signal ended the run before its rule."""

    state: str
    steps: int
    epochs: float
    loss: float | None
    metrics: dict[str, dict[str, float]]
    samples_per_second: float
    seconds: float
    weights_sha256: str
    job_sha256: str
    workers: int
    shards: int
    exchange: str
    arithmetic: dict[str, Any]
    fingerprint: str
    same_bits: bool
    recoveries: list[dict[str, Any]]
    per_worker: list[dict[str, Any]]
    run_dir: str
    reason: str = ""
    result: str = "last"
    signal: int = 0
    attempt: int = 1
    slowest: dict[str, Any] | None = None


def run(
    job: Job,
    *,
    model: Any = None,
    run_dir: str | os.PathLike[str] | None = None,
    resume: bool = False,
    trace: str | os.PathLike[str] | None = None,
    observer: Observer | None = None,
    communicator: Communicator | None = None,
) -> Result:
    """Train a complete job with all workers of ``communicator`` (None: this process alone); all call it alike.

    Raises DptrainError: on the worker it concerns its own, on the others PeerFailed. Only rank 0 writes to the run
    directory, which is made below ``job.output.runs`` unless ``run_dir`` names one, and the trace.
    """
    communicator = communicator or Alone()
    communicator.deadline = job.exchange.deadline
    with arithmetic.limited(job.arithmetic.threads):
        return _Run(job, model, run_dir, resume, trace, observer or Unwatched(), communicator).go()


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
        self.wanted_dir = None if run_dir is None else Path(run_dir)
        self.wanted_trace = None if trace is None else Path(trace)
        self.trace: Trace | None = None
        self.phases = Phases()
        self.resume, self.observer, self.communicator = resume, observer, communicator
        self.chief = communicator.rank == 0
        self.chronicle: Chronicle | None = None
        self.stop = StopRequest()

    def go(self) -> Result:
        with self.stop.listening():
            if self.wanted_trace is not None:
                self.trace = Trace(self.wanted_trace, self.communicator)
                self.phases = self.trace.phases
            self.parts = Parts(self.job, self.own_model, self.communicator)
            state = self._begin()
            watcher = together(self.communicator, "opening the journal", lambda: self._watcher(state))
            worker = self._worker(watcher)
            worker.best = self.best
            if self.trace is not None:
                self.trace.start()
            started = time.perf_counter()
            try:
                state = worker.run(state)
                seconds = time.perf_counter() - started
                return self._end(worker, watcher, state, seconds)
            finally:
                self.parts.reader.close()
                if self.chronicle is not None:
                    self.chronicle.close()

    def _begin(self) -> State:
        """The run directory and the state to start from, the same on all workers."""
        opened = together(self.communicator, "opening the run directory", self._open)
        self.run_dir = Path(self.communicator.broadcast_json(opened, "opening the run directory"))
        store, names = self.parts.exchange.store, self.parts.update.optimizer.slots
        np.copyto(store.weights(0), self.parts.start)
        self.best: Array | None = None
        snapshot = together(self.communicator, "reading the checkpoint", self._restore)
        header = snapshot.manifest if snapshot else None
        header = self.manifest = self.communicator.broadcast_json(header, "reading the checkpoint")
        state = State(0, 0, store.weights(0), store.slots(0), 0)
        if header is not None:
            if snapshot:
                for vector, name in zip((store.weights(0), *store.slots(0)), ("weights", *names), strict=True):
                    np.copyto(vector, snapshot.groups[name])
            if "best" in header["groups"]:
                self.best = snapshot.groups["best"].copy() if snapshot else np.empty_like(self.parts.start)
            for vector in (*store.slots(0), store.weights(0), *([self.best] if self.best is not None else [])):
                self.communicator.broadcast(vector, "handing out the checkpoint")
            from dptrain.checkpoint import judgement_of

            state = state._replace(
                step=header["step"],
                updates=header["updates"],
                judgement=judgement_of(header),
            )
        del self.parts.start
        return state

    def _open(self) -> str | None:
        if not self.chief:
            return None
        from dptrain import beginning

        return str(beginning.directory(self.job, self.wanted_dir, resume=self.resume))

    def _restore(self) -> "Snapshot | None":
        """What to go on from, on the chief; only then is it certain that the run directory is this job's."""
        if not self.chief:
            return None
        from dptrain import beginning

        found = None
        if self.resume:
            expected = beginning.Expected(
                self.job,
                self.parts.digests,
                self.parts.probe.fingerprint,
                self.parts.arithmetic,
                self.parts.assembly.model.layout,
            )
            found = beginning.restore(self.run_dir, expected, self.observer.warned)
            if found is None:
                self.parts.notes.append("no checkpoint yet: training starts at step 0")
        beginning.echo(self.run_dir, self.job, self.parts.plan["encoding"])
        return found

    def _watcher(self, state: State) -> "Chronicle | Bystander":
        if not self.chief:
            return Bystander()
        from dptrain import checkpoint, rundir
        from dptrain.chronicle import Chronicle
        from dptrain.journal import Journal

        layout, job = self.parts.assembly.model.layout, self.job
        chronicle = self.chronicle = Chronicle(
            journal=Journal(self.run_dir / rundir.JOURNAL),
            writer=checkpoint.Writer(self.run_dir / rundir.CHECKPOINTS, layout, job.output.generations),
            observer=self.observer,
            rule=self.parts.rule,
            membership=self.parts.membership,
            phases=self.phases,
            output=job.output,
            lr=self.parts.update.schedule.at,
            slot_names=self.parts.update.optimizer.slots,
            facts={
                "job_sha256": self.parts.digests.job,
                "trajectory_sha256": self.parts.digests.trajectory,
                "judging_sha256": self.parts.digests.judging,
                "same_bits": self.same_bits,
                "fingerprint": self.parts.probe.fingerprint,
                "arithmetic": self.parts.arithmetic,
                "name": job.name,
                "dtype": job.train.dtype,
            },
        )
        if self.manifest is not None:
            chronicle.restore(self.manifest, self.best)
        self.observer.started(
            {
                "run_dir": str(self.run_dir),
                "trace": "" if self.wanted_trace is None else str(self.wanted_trace),
                "name": job.name,
                "workers": self.communicator.size,
                "shards": job.train.shards,
                "spares": self.parts.membership.spares,
                "exchange": self.parts.exchange.name,
                "parameters": layout.parameters,
                "total_steps": self.parts.rule.total_steps,
                "steps_per_epoch": self.parts.rule.steps_per_epoch,
                "step": state.step,
                "train_rows": self.parts.assembly.dataset.train.rows,
                "notes": self.parts.notes,
            }
        )
        return chronicle

    def _worker(self, watcher: "Chronicle | Bystander") -> Worker:
        return Worker(
            accumulator=self.parts.accumulator,
            evaluator=self.parts.evaluator,
            exchange=self.parts.exchange,
            reader=self.parts.reader,
            rule=self.parts.rule,
            validation=self.parts.assembly.dataset.validation,
            watcher=watcher,
            stop=self.stop,
            phases=self.phases,
            skip_non_finite=self.job.train.non_finite == "skip",
            keep_best=self.job.train.result == "best",
        )

    def _end(self, worker: Worker, watcher: "Chronicle | Bystander", state: State, seconds: float) -> Result:
        """The last checkpoint, the evaluation of the kept weights, and the result."""
        chronicle = self.chronicle

        def save() -> None:
            if chronicle is not None:
                chronicle.checkpoint(state)

        together(self.communicator, "the last checkpoint", save)
        keeps_best = self.job.train.result == "best" and worker.best is not None
        weights = worker.best if keeps_best and worker.best is not None else state.weights
        metrics = {}
        done = self.parts.rule.done(state)
        for name, part in (
            ("validation", self.parts.assembly.dataset.validation),
            ("test", self.parts.assembly.dataset.test),
        ):
            if part.rows and done:
                metrics[name] = worker.evaluate(weights, part, state.step)
        self.phases.begin(Phase.OTHER)
        per_worker = self.communicator.allgather_json(self._own_figures(worker), "the result")
        content: dict[str, Any] | None = None
        if chronicle is not None:
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
                    workers=self.communicator.size,
                    shards=self.parts.assembly.shards,
                    exchange=self.parts.exchange.name,
                    arithmetic={
                        **self.parts.arithmetic,
                        "dtype": self.job.train.dtype,
                        "mpi": self.communicator.library,
                    },
                    fingerprint=self.parts.probe.fingerprint,
                    same_bits=self.same_bits,
                    recoveries=[],
                    per_worker=per_worker,
                    run_dir=str(self.run_dir),
                    reason=self.parts.rule.reached(state.judgement),
                    result="best" if keeps_best else "last",
                    signal=0 if done else worker.stopped_by,
                    attempt=chronicle.journal.attempt,
                    slowest=None if slow is None else {**slow._asdict(), "host": per_worker[slow.rank]["host"]},
                )
            )

        def write() -> None:
            if chronicle is None or content is None:
                return
            from dptrain import checkpoint, rundir

            layout = self.parts.assembly.model.layout
            checkpoint.export(self.run_dir / rundir.WEIGHTS, weights, layout)
            rundir.write_json(self.run_dir / rundir.RESULT, content)

        together(self.communicator, "writing the result", write)
        if self.trace is not None:
            complaint = self.trace.write(HOST, {"job": self.job.name, "run_dir": str(self.run_dir)})
            if complaint is not None:
                self.observer.warned(str(complaint))

        def close() -> None:
            if chronicle is not None and content is not None:
                chronicle.close()
                self.observer.finished(content)

        together(self.communicator, "the result", close)
        return Result(**self.communicator.broadcast_json(content, "the result"))

    @property
    def same_bits(self) -> bool:
        """Whether the weights are those of any other way to train this job, as far as this run can know."""
        before = self.manifest
        trusted = before is None or (before["same_bits"] and before["fingerprint"] == self.parts.probe.fingerprint)
        return self.parts.exchange.same_bits and self.parts.probe.repeatable and trusted

    def _own_figures(self, worker: Worker) -> dict[str, Any]:
        return {
            "rank": self.communicator.rank,
            "host": HOST,
            "machine": self.parts.machines.number(self.communicator.rank),
            "shards_computed": self.parts.accumulator.shards_computed,
            "rows_read": self.parts.assembly.dataset.train.rows_read,
            "compute_seconds": round(worker.compute_seconds, 4),
            "wait_seconds": round(worker.wait_seconds, 4),
            "phases": {name: round(seconds, 4) for name, seconds in self.phases.named().items()},
            "peak_memory_bytes": arithmetic.peak_memory(),
        }
