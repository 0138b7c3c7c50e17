"""The composition root: from a job to a worker, and from its end to a result."""

import os
import socket
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from dptrain import arithmetic, beginning, checkpoint, rundir
from dptrain.assemble import Assembly, assemble
from dptrain.chronicle import Bystander, Chronicle, Observer, Unwatched
from dptrain.data.batches import Batches, Reader
from dptrain.errors import ArithmeticMismatch, DataError, DptrainError, LaunchError
from dptrain.exchange.allreduce import Allreduce
from dptrain.exchange.communicator import Alone, Communicator
from dptrain.exchange.one_machine import OneMachine, room
from dptrain.exchange.protocol import Exchange
from dptrain.exchange.segments import Segments
from dptrain.exchange.solo import Solo
from dptrain.fingerprint import NOT_REPEATABLE, Probe, probe
from dptrain.job.digest import JobDigest, digest_job
from dptrain.job.spec import Job
from dptrain.journal import Journal
from dptrain.layout import Array, digest
from dptrain.membership import Membership
from dptrain.nn.accumulate import Accumulator
from dptrain.nn.layer import Workspace
from dptrain.optim import make_schedule
from dptrain.rule import Rule
from dptrain.state import State
from dptrain.worker import StopRequest, Worker, together

ACTIVATIONS = 256 << 20
"""Bytes of activations that a worker may use for taking several shards at once."""

GRADIENTS = 64 << 20
"""Bytes of gradients, not yet added, that it may use for that: of large tensors it takes one shard at a time."""


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


def run(
    job: Job,
    *,
    model: Any = None,
    run_dir: str | os.PathLike[str] | None = None,
    resume: bool = False,
    observer: Observer | None = None,
    communicator: Communicator | None = None,
) -> Result:
    """Train a complete job with all workers of ``communicator`` (None: this process alone); all call it alike.

    Raises DptrainError: on the worker it concerns its own, on the others PeerFailed. Only rank 0 writes to the run
    directory, which is made below ``job.output.runs`` unless ``run_dir`` names one.
    """
    communicator = communicator or Alone()
    communicator.deadline = job.exchange.deadline
    with arithmetic.limited(job.arithmetic.threads):
        return _Run(job, model, run_dir, resume, observer or Unwatched(), communicator).go()


class _Run:
    def __init__(
        self,
        job: Job,
        model: Any,
        run_dir: str | os.PathLike[str] | None,
        resume: bool,
        observer: Observer,
        communicator: Communicator,
    ) -> None:
        self.job, self.own_model = job, model
        self.wanted_dir = None if run_dir is None else Path(run_dir)
        self.resume, self.observer, self.communicator = resume, observer, communicator
        self.chief = communicator.rank == 0
        self.notes: list[str] = []
        self.stop = StopRequest()

    def go(self) -> Result:
        with self.stop.listening():
            self._set_up()
            state = self._begin()
            watcher = together(self.communicator, "opening the journal", lambda: self._watcher(state))
            worker = self._worker(watcher)
            worker.best = self.best
            started = time.perf_counter()
            try:
                state = worker.run(state)
                seconds = time.perf_counter() - started
                return self._end(worker, watcher, state, seconds)
            finally:
                self.reader.close()
                if isinstance(watcher, Chronicle):
                    watcher.close()

    def _set_up(self) -> None:
        """Everything that doesn't depend on where training stands."""
        job, communicator = self.job, self.communicator
        assert job.train.shards is not None
        self.membership = Membership(communicator.rank, communicator.size, job.train.shards)
        plan = self._prepare()
        a = self.assembly = together(communicator, "setting up", lambda: assemble(job, plan, self.own_model))
        self.plan = plan
        self.batches = together(communicator, "setting up", lambda: _batches(a))
        self.rule = Rule(job.train, self.batches.steps_per_epoch, a.dataset.validation.rows > 0)
        self.update = a.update(self.rule.total_steps)
        self.evaluator = a.evaluator()
        self.start = together(communicator, "setting up", self._start_weights)
        accumulator, self.probe = together(communicator, "probing the arithmetic", self._probe)
        self.accumulator: Accumulator = accumulator
        self.digests = self._digest()
        self._compare_workers()
        self.exchange = together(communicator, "setting up the exchange", self._exchange)
        self.reader = Reader(
            self.batches,
            a.dataset.sample_shape,
            a.sample.dtype,
            a.sample.target_shape,
            a.sample.target_dtype,
            dtype=a.dtype,
            prefetch=False,
        )
        if self.membership.spares:
            self.notes.append(
                f"{communicator.size} workers for {job.train.shards} shards: {self.membership.spares} stand by as "
                "spares; train.shards changes that (and the bits)"
            )
        if not self.exchange.same_bits:
            self.notes.append(
                f"exchange {self.exchange.name!r} does not promise the same bits for any number of workers"
            )

    def _prepare(self) -> dict[str, Any]:
        """The data, parsed and scanned once on every machine."""
        job, communicator = self.job, self.communicator
        first = communicator.first_on_node()

        def action() -> dict[str, Any] | None:
            if not first:
                return None
            from dptrain.data.prepare import prepare

            return prepare(job.data, directory=Path(job.directory), seed=job.seed, cache=None)

        mine = together(communicator, "reading the data", action)
        host = socket.gethostname()
        if communicator.size == 1:
            assert mine is not None
            return mine
        every = communicator.allgather_json([host, mine], "reading the data")
        plans: list[dict[str, Any]] = [plan for _, plan in every if plan is not None]
        for rank, (other, plan) in enumerate(every):
            if plan is not None and plan["digest"] != plans[0]["digest"]:
                raise _for_all(
                    DataError(
                        f"rank {rank} on {other}: data.source = {job.data.source!r}",
                        expected=f"the same data as on {every[0][0]} ({plans[0]['digest'][:19]})",
                        found=f"{plan['digest'][:19]}",
                        cure="copy the same file to every machine",
                    )
                )
        return next((plan for other, plan in every if other == host and plan is not None), plans[0])

    def _start_weights(self) -> Array:
        weights = np.zeros(self.assembly.model.layout.size, self.assembly.dtype)
        self.assembly.model.initialise(weights, self.job.seed)
        if self.job.model.init_from:
            np.copyto(weights, beginning.warm_start(self.job, self.assembly.model.layout))
        return weights

    def _probe(self) -> tuple[Accumulator, Probe]:
        a = self.assembly
        accumulator = a.accumulator(2)
        with np.errstate(all="ignore"):
            found = probe(accumulator, self.evaluator, self.update, self.start, a.sample, a.rows_per_shard)
            lo, hi = self.membership.mine
            accumulator.at_once = at_once(accumulator, hi - lo)
            many = max(accumulator.at_once, self.evaluator.at_once)
            if found.together and a.unproved and many > 2:
                more = probe(accumulator, self.evaluator, self.update, self.start, a.sample, a.rows_per_shard, many)
                found = replace(found, together=more.together)
        if not found.together:
            accumulator.at_once = self.evaluator.at_once = 1
        # What the probe took for more shards than will run at once is given back.
        accumulator.workspace = Workspace()
        self.arithmetic = arithmetic.describe(self.job.arithmetic.kernels, self.job.arithmetic.threads)
        return accumulator, found

    def _compare_workers(self) -> None:
        """Contract 1: a worker that would compute other bits is refused."""
        mine = {
            "host": socket.gethostname(),
            "job": self.digests.job,
            "fingerprint": self.probe.fingerprint,
            "arithmetic": self.arithmetic,
        }
        every = self.communicator.allgather_json(mine, "comparing the workers")
        first = every[0]
        for rank, other in enumerate(every):
            if other["job"] != every[0]["job"]:
                raise _for_all(
                    LaunchError(
                        f"rank {rank} on {other['host']}",
                        expected=f"the job of rank 0 on {every[0]['host']}",
                        found="another: its Python model's source, or the weights it starts from",
                        cure="copy the same files to every machine",
                    )
                )
        if any(other["fingerprint"] == NOT_REPEATABLE for other in every):
            self.probe = replace(self.probe, fingerprint=NOT_REPEATABLE, repeatable=False)
            self.notes.append("the model gives other bits each time it is asked, so the result's are not promised")
            return
        for rank, other in enumerate(every):
            if other["fingerprint"] != first["fingerprint"]:
                raise _for_all(
                    ArithmeticMismatch(
                        f"rank {rank} on {other['host']} ({beginning.kernels(other['arithmetic'])})",
                        expected=f"the bits of rank 0 on {first['host']} ({beginning.kernels(first['arithmetic'])})",
                        found="others for the same step",
                        cure='set arithmetic.kernels = "portable" and install the same numpy on every machine',
                    )
                )

    def _digest(self) -> JobDigest:
        optimizer = self.job.optimizer
        schedule = make_schedule(optimizer.schedule, optimizer.lr, self.rule.total_steps)
        return digest_job(
            self.job,
            data=self.assembly.dataset.digest,
            model=self.assembly.own_digest,
            start=digest(self.start) if self.job.model.init_from else "",
            decay_steps=schedule.decay_steps if schedule.type == "cosine" else 0,
        )

    def _exchange(self) -> Exchange:
        job, size = self.job, self.communicator.size
        kind = job.exchange.type
        if kind == "auto":
            kind = "solo" if size == 1 else "segments"
        outbox = max(1, self.accumulator.schedule(*self.membership.mine).slots)
        common = (self.communicator, self.membership, self.update, self.assembly.dtype, outbox)
        if kind == "solo" and size > 1:
            raise LaunchError(
                'exchange.type = "solo"', expected="one worker", found=f"{size}", cure='use "auto", or start one worker'
            )
        if kind == "allreduce":
            return Allreduce(*common)
        if kind == "solo":
            return Solo(*common)
        if job.exchange.coordinators > size:
            raise LaunchError(
                "exchange.coordinators",
                expected=f"at most the number of workers, {size}",
                found=str(job.exchange.coordinators),
                cure="lower it, or leave it at 0 for every worker",
            )
        coordinators = job.exchange.coordinators or size
        if job.exchange.shared_memory and self.communicator.on_one_machine():
            outboxes = self.communicator.allgather_json(outbox, "sharing memory")
            memory = room(self.communicator, self.update, self.assembly.dtype, outboxes)
            if memory is not None:
                return OneMachine(*common[:4], outboxes, coordinators=coordinators, memory=memory)
            self.notes.append(
                "/dev/shm has no room for the workers' partials and state, so they send messages: slower, the same "
                "bits (in docker: --shm-size=1g)"
            )
        return Segments(*common, coordinators=coordinators)

    def _begin(self) -> State:
        """The run directory and the state to start from, the same on all workers."""
        opened = together(self.communicator, "opening the run directory", self._open)
        self.run_dir = Path(self.communicator.broadcast_json(opened, "opening the run directory"))
        store, names = self.exchange.store, self.update.optimizer.slots
        np.copyto(store.weights(0), self.start)
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
                self.best = snapshot.groups["best"].copy() if snapshot else np.empty_like(self.start)
            for vector in (*store.slots(0), store.weights(0), *([self.best] if self.best is not None else [])):
                self.communicator.broadcast(vector, "handing out the checkpoint")
            state = replace(
                state,
                step=header["step"],
                updates=header["updates"],
                judgement=checkpoint.judgement_of(header),
            )
        del self.start
        return state

    def _open(self) -> str | None:
        if not self.chief:
            return None
        return str(beginning.directory(self.job, self.wanted_dir, resume=self.resume))

    def _restore(self) -> checkpoint.Snapshot | None:
        """What to go on from, on the chief; only then is it certain that the run directory is this job's."""
        if not self.chief:
            return None
        found = None
        if self.resume:
            expected = beginning.Expected(
                self.job, self.digests, self.probe.fingerprint, self.arithmetic, self.assembly.model.layout
            )
            found = beginning.restore(self.run_dir, expected, self.observer.warned)
            if found is None:
                self.notes.append("no checkpoint yet: training starts at step 0")
        beginning.echo(self.run_dir, self.job, self.plan["encoding"])
        return found

    def _watcher(self, state: State) -> Chronicle | Bystander:
        if not self.chief:
            return Bystander()
        layout, job = self.assembly.model.layout, self.job
        chronicle = Chronicle(
            journal=Journal(self.run_dir / rundir.JOURNAL),
            writer=checkpoint.Writer(self.run_dir / rundir.CHECKPOINTS, layout, job.output.generations),
            observer=self.observer,
            rule=self.rule,
            output=job.output,
            lr=self.update.schedule.at,
            slot_names=self.update.optimizer.slots,
            facts={
                "job_sha256": self.digests.job,
                "trajectory_sha256": self.digests.trajectory,
                "judging_sha256": self.digests.judging,
                "same_bits": self.same_bits,
                "fingerprint": self.probe.fingerprint,
                "arithmetic": self.arithmetic,
                "name": job.name,
                "dtype": job.train.dtype,
            },
        )
        if self.manifest is not None:
            chronicle.restore(self.manifest, self.best)
        self.observer.started(
            {
                "run_dir": str(self.run_dir),
                "name": job.name,
                "workers": self.communicator.size,
                "shards": job.train.shards,
                "spares": self.membership.spares,
                "exchange": self.exchange.name,
                "parameters": layout.parameters,
                "total_steps": self.rule.total_steps,
                "steps_per_epoch": self.rule.steps_per_epoch,
                "step": state.step,
                "train_rows": self.assembly.dataset.train.rows,
                "notes": self.notes,
            }
        )
        return chronicle

    def _worker(self, watcher: Chronicle | Bystander) -> Worker:
        return Worker(
            accumulator=self.accumulator,
            evaluator=self.evaluator,
            exchange=self.exchange,
            reader=self.reader,
            rule=self.rule,
            validation=self.assembly.dataset.validation,
            watcher=watcher,
            stop=self.stop,
            skip_non_finite=self.job.train.non_finite == "skip",
            keep_best=self.job.train.result == "best",
        )

    def _end(self, worker: Worker, watcher: Chronicle | Bystander, state: State, seconds: float) -> Result:
        """The last checkpoint, the evaluation of the kept weights, and the result."""
        chronicle = watcher if isinstance(watcher, Chronicle) else None

        def save() -> None:
            if chronicle is not None:
                chronicle.checkpoint(state)

        together(self.communicator, "the last checkpoint", save)
        keeps_best = self.job.train.result == "best" and worker.best is not None
        weights = worker.best if keeps_best and worker.best is not None else state.weights
        metrics = {}
        done = self.rule.done(state)
        for name, part in (("validation", self.assembly.dataset.validation), ("test", self.assembly.dataset.test)):
            if part.rows and done:
                metrics[name] = worker.evaluate(weights, part, state.step)
        per_worker = self.communicator.allgather_json(self._own_figures(worker), "the result")
        content: dict[str, Any] | None = None
        if chronicle is not None:
            content = asdict(
                Result(
                    state="done" if done else "stopped",
                    steps=state.step,
                    epochs=round(state.step / self.rule.steps_per_epoch, 4),
                    loss=chronicle.epoch_loss,
                    metrics=metrics,
                    samples_per_second=round(chronicle.rows / max(seconds, 1e-9), 1),
                    seconds=round(seconds, 4),
                    weights_sha256=digest(weights),
                    job_sha256=self.digests.job,
                    workers=self.communicator.size,
                    shards=self.assembly.shards,
                    exchange=self.exchange.name,
                    arithmetic={**self.arithmetic, "dtype": self.job.train.dtype, "mpi": self.communicator.library},
                    fingerprint=self.probe.fingerprint,
                    same_bits=self.same_bits,
                    recoveries=[],
                    per_worker=per_worker,
                    run_dir=str(self.run_dir),
                    reason=self.rule.reached(state.judgement),
                    result="best" if keeps_best else "last",
                    signal=0 if done else worker.stopped_by,
                    attempt=chronicle.journal.attempt,
                )
            )

        def write() -> None:
            if chronicle is None or content is None:
                return
            layout = self.assembly.model.layout
            checkpoint.export(self.run_dir / rundir.WEIGHTS, weights, layout)
            rundir.write_json(self.run_dir / rundir.RESULT, content)
            chronicle.close()
            self.observer.finished(content)

        together(self.communicator, "writing the result", write)
        return Result(**self.communicator.broadcast_json(content, "the result"))

    @property
    def same_bits(self) -> bool:
        """Whether the weights are those of any other way to train this job, as far as this run can know."""
        before = self.manifest
        trusted = before is None or (before["same_bits"] and before["fingerprint"] == self.probe.fingerprint)
        return self.exchange.same_bits and self.probe.repeatable and trusted

    def _own_figures(self, worker: Worker) -> dict[str, Any]:
        return {
            "rank": self.communicator.rank,
            "host": socket.gethostname(),
            "shards_computed": self.accumulator.shards_computed,
            "rows_read": self.assembly.dataset.train.rows_read,
            "compute_seconds": round(worker.compute_seconds, 4),
            "wait_seconds": round(worker.wait_seconds, 4),
            "peak_memory_bytes": arithmetic.peak_memory(),
        }


def _for_all(error: DptrainError) -> DptrainError:
    """An error that every worker finds out by itself."""
    error.everywhere = True
    return error


def at_once(accumulator: Accumulator, own: int) -> int:
    """How many of its ``own`` shards a worker takes at once, judged by the memory that the pass before it took."""
    activations = max(1, accumulator.workspace.nbytes // accumulator.at_once)
    gradients = max(1, accumulator.gradient_elements * accumulator.model.dtype.itemsize)
    return max(1, min(own, ACTIVATIONS // activations, GRADIENTS // gradients))


def _batches(a: Assembly) -> Batches:
    train = a.job.train
    return Batches(
        a.dataset.train,
        seed=a.job.seed,
        batch_size=train.batch_size,
        shards=a.shards,
        shuffle=a.job.data.shuffle,
        drop_last=train.drop_last,
    )
