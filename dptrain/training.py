"""The composition root: from a job to a worker, and from its end to a result."""

import os
import resource
import shutil
import socket
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from dptrain import arithmetic, checkpoint, rundir
from dptrain.assemble import Assembly, assemble
from dptrain.chronicle import Bystander, Chronicle, Observer, Unwatched
from dptrain.data.batches import Batches, Reader
from dptrain.data.prepare import prepare
from dptrain.errors import ArithmeticMismatch, CheckpointError, DataError, LaunchError, ModelError
from dptrain.exchange.allreduce import Allreduce
from dptrain.exchange.communicator import Alone, Communicator
from dptrain.exchange.protocol import Exchange
from dptrain.exchange.segments import Segments
from dptrain.exchange.solo import Solo
from dptrain.fingerprint import Probe, probe
from dptrain.job.digest import JobDigest, digest_job
from dptrain.job.load import to_toml
from dptrain.job.spec import Job
from dptrain.journal import Journal
from dptrain.layout import Array, digest
from dptrain.membership import Membership
from dptrain.nn.accumulate import Accumulator
from dptrain.rule import Rule
from dptrain.state import State, Update
from dptrain.worker import StopRequest, Worker, together

ACTIVATIONS = 256 << 20
"""Bytes of activations that a worker may use for taking several shards at once."""


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
        self.job, self.own_model, self.wanted_dir = job, model, run_dir
        self.resume, self.observer, self.communicator = resume, observer, communicator
        self.chief = communicator.rank == 0
        self.notes: list[str] = []
        self.stop = StopRequest()

    def go(self) -> Result:
        with self.stop.listening():
            self._set_up()
            state = self._begin()
            watcher = self._watcher(state)
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
        self._compare_workers()
        self.digests = self._digest()
        self.exchange = together(communicator, "setting up the exchange", self._exchange)
        self.reader = Reader(
            self.batches,
            a.dataset.sample_shape,
            a.sample.dtype,
            a.sample.target_shape,
            a.sample.target_dtype,
            dtype=a.dtype,
            prefetch=a.dataset.train.mapped,
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
                error = DataError(
                    f"rank {rank} on {other}: data.source = {job.data.source!r}",
                    expected=f"the same data as on {every[0][0]} ({plans[0]['digest'][:19]})",
                    found=f"{plan['digest'][:19]}",
                    cure="copy the same file to every machine",
                )
                error.everywhere = True
                raise error
        return next((plan for other, plan in every if other == host and plan is not None), plans[0])

    def _start_weights(self) -> Array:
        weights = np.zeros(self.assembly.model.layout.size, self.assembly.dtype)
        self.assembly.model.initialise(weights, self.job.seed)
        if self.job.model.init_from:
            given = _warm_start(self.job, self.assembly)
            np.copyto(weights, given)
        return weights

    def _probe(self) -> tuple[Accumulator, Probe]:
        a = self.assembly
        accumulator = a.accumulator(2)
        with np.errstate(all="ignore"):
            found = probe(accumulator, self.evaluator, self.update, self.start, a.sample, a.rows_per_shard)
        lo, hi = self.membership.mine
        accumulator.at_once = at_once(accumulator, hi - lo) if found.together else 1
        self.arithmetic = arithmetic.describe(self.job.arithmetic.kernels, self.job.arithmetic.threads)
        return accumulator, found

    def _compare_workers(self) -> None:
        """Contract 1: a worker that computes other bits is refused."""
        mine = {"host": socket.gethostname(), "fingerprint": self.probe.fingerprint, "arithmetic": self.arithmetic}
        every = self.communicator.allgather_json(mine, "comparing the arithmetic")
        for rank, other in enumerate(every):
            if other["fingerprint"] != every[0]["fingerprint"]:
                error = ArithmeticMismatch(
                    f"rank {rank} on {other['host']} ({_kernels(other['arithmetic'])})",
                    expected=f"the bits of rank 0 on {every[0]['host']} ({_kernels(every[0]['arithmetic'])})",
                    found="others for the same step",
                    cure='set arithmetic.kernels = "portable" and install the same numpy on every machine',
                )
                error.everywhere = True
                raise error

    def _digest(self) -> JobDigest:
        schedule = self.job.optimizer.schedule
        constant = schedule.type != "cosine"
        return digest_job(
            self.job,
            data=self.assembly.dataset.digest,
            model=self.assembly.own_digest,
            start=digest(self.start) if self.job.model.init_from else "",
            decay_steps=0 if constant else schedule.decay_steps or self.rule.total_steps,
        )

    def _exchange(self) -> Exchange:
        job, size = self.job, self.communicator.size
        kind = job.exchange.type
        if kind == "auto":
            kind = "solo" if size == 1 else "segments"
        outbox = self.accumulator.schedule(*self.membership.mine).slots
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
        return Segments(*common, coordinators=job.exchange.coordinators or size)

    def _begin(self) -> State:
        """The run directory and the state to start from, the same on all workers."""
        opened = together(self.communicator, "opening the run directory", self._open if self.chief else lambda: None)
        self.run_dir = Path(self.communicator.broadcast_json(str(opened), "opening the run directory"))
        store, names = self.exchange.store, self.update.optimizer.slots
        np.copyto(store.weights(0), self.start)
        self.best: Array | None = None
        snapshot = None
        if self.resume:
            snapshot = together(
                self.communicator, "reading the checkpoint", self._restore if self.chief else lambda: None
            )
        header = snapshot.manifest if snapshot else None
        header = self.communicator.broadcast_json(header, "reading the checkpoint")
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

    def _open(self) -> Path:
        job = self.job
        runs = Path(job.directory) / job.output.runs
        if self.wanted_dir is not None:
            path = rundir.claim(Path(self.wanted_dir), resume=self.resume)
        elif self.resume:
            path = rundir.newest(runs, job.name)
        else:
            path = rundir.fresh(runs, job.name)
        rundir.write_text(path / rundir.JOB, to_toml(_absolute(job)))
        rundir.write_json(path / rundir.ENCODING, self.plan["encoding"])
        if job.model.python:
            source = Path(job.directory) / job.model.python.rpartition(":")[0]
            shutil.copyfile(source, path / rundir.MODEL_SOURCE)
        checkpoint.clean(path / rundir.CHECKPOINTS)
        return path

    def _restore(self) -> checkpoint.Snapshot | None:
        layout = self.assembly.model.layout

        def accept(generation: Path) -> checkpoint.Snapshot:
            manifest = checkpoint.read_manifest(generation)
            if manifest["trajectory_sha256"] != self.digests.trajectory:
                raise checkpoint.refuse(
                    generation,
                    "a checkpoint of this job (only its stopping rule may differ)",
                    "another job's",
                    "resume with the job.toml of that run, or start anew in another --run-dir",
                )
            if manifest["fingerprint"] != self.probe.fingerprint and not self.job.arithmetic.accept_other:
                raise checkpoint.refuse(
                    generation,
                    f"the arithmetic it was made with ({_kernels(manifest['arithmetic'])})",
                    f"another here ({_kernels(self.arithmetic)})",
                    "resume on such a machine; or --set arithmetic.accept_other=true, which gives up the same bits",
                )
            return checkpoint.read(generation, layout)

        found = checkpoint.newest(self.run_dir / rundir.CHECKPOINTS, accept, self.observer.warned)
        if found is None:
            self.notes.append("no checkpoint yet: training starts at step 0")
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
                "fingerprint": self.probe.fingerprint,
                "arithmetic": self.arithmetic,
                "name": job.name,
                "dtype": job.train.dtype,
            },
        )
        chronicle.best = self.best
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
        for name, part in (("validation", self.assembly.dataset.validation), ("test", self.assembly.dataset.test)):
            if part.rows and not worker.stopped_by:
                metrics[name] = worker.evaluate(weights, part, state.step)
        per_worker = self.communicator.allgather_json(self._own_figures(worker), "the result")
        done = self.rule.done(state)
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
                    same_bits=self.exchange.same_bits and self.probe.repeatable,
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

    def _own_figures(self, worker: Worker) -> dict[str, Any]:
        return {
            "rank": self.communicator.rank,
            "host": socket.gethostname(),
            "shards_computed": self.accumulator.shards_computed,
            "rows_read": self.assembly.dataset.train.rows_read,
            "compute_seconds": round(worker.compute_seconds, 4),
            "wait_seconds": round(worker.wait_seconds, 4),
            "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        }


def at_once(accumulator: Accumulator, own: int) -> int:
    """How many of its ``own`` shards a worker takes at once, judged by the memory that the pass before it took."""
    a_shard = max(1, accumulator.workspace.nbytes // accumulator.at_once)
    return max(1, min(own, ACTIVATIONS // a_shard))


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


def _warm_start(job: Job, a: Assembly) -> Array:
    """The weights that ``model.init_from`` names: a run directory, or one checkpoint of a run."""
    path = Path(job.directory) / job.model.init_from
    folder = path / rundir.CHECKPOINTS
    generations = checkpoint.generations(folder) if folder.is_dir() else [path]
    if not generations:
        raise CheckpointError(
            f"model.init_from = {job.model.init_from!r}",
            expected="a run directory with checkpoints, or one checkpoint",
            found="none there",
            cure="name the directory that holds job.toml and checkpoints/",
        )
    snapshot = checkpoint.read(generations[0])
    if snapshot.manifest["layout"] != a.model.layout.describe():
        raise ModelError(
            f"model.init_from = {job.model.init_from!r}",
            expected="the tensors of this job's model: " + _tensors(a.model.layout.describe()),
            found=_tensors(snapshot.manifest["layout"]),
            cure="use the same layers as the run it comes from",
        )
    return snapshot.groups.get("best", snapshot.groups["weights"])


def _tensors(described: list[list[Any]]) -> str:
    return ", ".join(f"{name} {tuple(shape)}" for name, shape, _ in described)


def _kernels(described: Mapping[str, Any]) -> str:
    return f"{described['kernels']} kernels, numpy {described['numpy']}, {described['blas']}"


def _absolute(job: Job) -> Job:
    """The job with paths that hold wherever its echo is read from."""
    base = Path(job.directory).resolve()

    def moved(path: str) -> str:
        return str(base / path) if path and (base / path).exists() else path

    parts: dict[str, Any] = {
        name: moved(value) if isinstance(value, str) else value
        for name, value in (("validation", job.data.validation), ("test", job.data.test))
    }
    python, colon, function = job.model.python.rpartition(":")
    model = replace(
        job.model, python=f"{moved(python)}{colon}{function}" if python else "", init_from=moved(job.model.init_from)
    )
    return replace(job, data=replace(job.data, source=moved(job.data.source), **parts), model=model)
