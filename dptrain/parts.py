"""What a run consists of before it is known where training stands: data, model, arithmetic, exchange.

All workers make it alike, one after the other telling each other how it went, so that a failure of one ends all.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from dptrain import arithmetic
from dptrain.assemble import Assembly, assemble
from dptrain.cores import crowded
from dptrain.data.batches import Batches, Reader
from dptrain.errors import ArithmeticMismatch, DataError, LaunchError
from dptrain.exchange import shared_memory
from dptrain.exchange.communicator import Communicator
from dptrain.exchange.protocol import Exchange
from dptrain.exchange.replayed import Asked, Log
from dptrain.fingerprint import NOT_REPEATABLE, Probe, probe
from dptrain.job.digest import JobDigest, digest_job
from dptrain.job.spec import Job
from dptrain.layout import Array, digest
from dptrain.meeting import Meeting, for_all
from dptrain.membership import Coordinating, Membership
from dptrain.nn.accumulate import Accumulator
from dptrain.nn.layer import Workspace
from dptrain.optim import make_schedule
from dptrain.rule import Rule
from dptrain.worker import together

ACTIVATIONS = 256 << 20
"""Bytes of activations that a worker may use for taking several shards at once."""

GRADIENTS = 64 << 20
"""Bytes of gradients, not yet added, that it may use for that: of large tensors it takes one shard at a time."""

HOST = shared_memory.HOST


class Parts:
    """The parts of one worker's run, made by all workers of ``communicator`` together.

    Raises DptrainError: on the worker it concerns its own, on the others PeerFailed. ``start`` are the weights before
    the first step, ``notes`` what a person should know before training begins.
    """

    def __init__(self, job: Job, own_model: Any, communicator: Communicator) -> None:
        self.job, self.own_model, self.communicator = job, own_model, communicator
        self.notes: list[str] = []
        assert job.train.shards is not None
        kind = Membership
        if job.exchange.type == "ps":
            kind = Asked if isinstance(communicator, Log) else Coordinating
        self.membership = kind(communicator.rank, communicator.size, job.train.shards)
        machines = communicator.machines()
        every = communicator.allgather_json(HOST, "setting up")
        self.hosts: dict[int, str] = dict(zip(communicator.members, every, strict=True))
        self._first = communicator.rank in {group[0] for group in machines}
        plan = self._prepare()
        a = self.assembly = together(communicator, "setting up", lambda: assemble(job, plan, self.own_model))
        self.plan = plan
        self.batches = together(communicator, "setting up", lambda: batches_of(a))
        self.rule = Rule(job.train, self.batches.steps_per_epoch, a.dataset.validation.rows > 0)
        self.update = a.update(self.rule.total_steps)
        self.evaluator = a.evaluator()
        self.start = together(communicator, "setting up", lambda: start_of(a))
        accumulator, self.probe = together(communicator, "probing the arithmetic", self._probe)
        self.accumulator: Accumulator = accumulator
        self.digests = self._digest()
        self._compare_workers()
        self.meeting = Meeting(job.exchange, communicator, self.membership, self.update, self.accumulator)
        self.reader = reader_of(a, self.batches)
        self.exchange.equip(self.accumulator, self.reader.load)
        self.exchange.admit(self.identity)
        crowd = crowded(len(self.meeting.machines.here), job.arithmetic.threads)
        if crowd:
            self.notes.append(crowd)
        if self.membership.spares:
            self.notes.append(
                f"{communicator.size} workers for {job.train.shards} shards: {self.membership.spares} stand by as "
                "spares; train.shards changes that (and the bits)"
            )
        if not self.exchange.same_bits and job.exchange.type == "ps":
            self.notes.append(
                f"with exchange.mode = {job.exchange.mode!r} the order of arrival decides the bits; "
                "`dptrain replay` repeats them"
            )
        elif not self.exchange.same_bits:
            self.notes.append(
                f"exchange {self.exchange.name!r} does not promise the same bits for any number of workers"
            )

    @property
    def exchange(self) -> Exchange:
        """That of the workers that live."""
        return self.meeting.exchange

    @property
    def identity(self) -> dict[str, str]:
        """What all workers of a run have to agree on."""
        return {
            "job": self.digests.job,
            "data": self.assembly.dataset.digest,
            "fingerprint": self.probe.fingerprint,
            "arithmetic": arithmetic.named(self.arithmetic),
        }

    def _prepare(self) -> dict[str, Any]:
        """The data, parsed and scanned once on every machine."""
        job, communicator = self.job, self.communicator

        def action() -> dict[str, Any] | None:
            if not self._first:
                return None
            from dptrain.data.prepare import prepare

            return prepare(job.data, directory=Path(job.directory), seed=job.seed, cache=None)

        mine = together(communicator, "reading the data", action)
        host = HOST
        if communicator.size == 1:
            assert mine is not None
            return mine
        every = communicator.allgather_json([host, mine], "reading the data")
        plans: list[dict[str, Any]] = [plan for _, plan in every if plan is not None]
        for rank, (other, plan) in enumerate(every):
            if plan is not None and plan["digest"] != plans[0]["digest"]:
                raise for_all(
                    DataError(
                        f"rank {rank} on {other}: data.source = {job.data.source!r}",
                        expected=f"the same data as on {every[0][0]} ({plans[0]['digest'][:19]})",
                        found=f"{plan['digest'][:19]}",
                        cure="copy the same file to every machine",
                    )
                )
        return next((plan for other, plan in every if other == host and plan is not None), plans[0])

    def _probe(self) -> tuple[Accumulator, Probe]:
        a = self.assembly
        accumulator = a.accumulator(2)
        with np.errstate(all="ignore"):
            found = probe(accumulator, self.evaluator, self.update, self.start, a.sample, a.rows_per_shard)
            lo, hi = (0, a.shards) if isinstance(self.communicator, Log) else self.membership.mine
            accumulator.at_once = at_once(accumulator, hi - lo)
            many = max(accumulator.at_once, self.evaluator.at_once)
            if found.together and a.unproved and many > 2:
                more = probe(accumulator, self.evaluator, self.update, self.start, a.sample, a.rows_per_shard, many)
                found = replace(found, together=more.together)
        if not found.together:
            accumulator.at_once = self.evaluator.at_once = 1
        # What the probe took for more shards than will run at once is given back.
        accumulator.workspace = Workspace()
        wanted = self.job.arithmetic
        self.arithmetic = arithmetic.describe(wanted.kernels, wanted.threads, wanted.products)
        return accumulator, found

    def _compare_workers(self) -> None:
        """Contract 1: a worker that would compute other bits is refused."""
        mine = {
            "host": HOST,
            "job": self.digests.job,
            "fingerprint": self.probe.fingerprint,
            "arithmetic": self.arithmetic,
        }
        every = self.communicator.allgather_json(mine, "comparing the workers")
        first = every[0]
        for rank, other in enumerate(every):
            if other["job"] != every[0]["job"]:
                raise for_all(
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
                raise for_all(
                    ArithmeticMismatch(
                        f"rank {rank} on {other['host']} ({arithmetic.named(other['arithmetic'])})",
                        expected=f"the bits of rank 0 on {first['host']} ({arithmetic.named(first['arithmetic'])})",
                        found="others for the same step",
                        cure='set arithmetic.kernels = "portable" and install the same numpy and mkl everywhere',
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


def at_once(accumulator: Accumulator, own: int) -> int:
    """How many of its ``own`` shards a worker takes at once, judged by the memory that the pass before it took."""
    activations = max(1, accumulator.workspace.nbytes // accumulator.at_once)
    gradients = max(1, accumulator.gradient_elements * accumulator.model.dtype.itemsize)
    return max(1, min(own, ACTIVATIONS // activations, GRADIENTS // gradients))


def start_of(a: Assembly) -> Array:
    """The weights before the first step."""
    weights = np.zeros(a.model.layout.size, a.dtype)
    a.model.initialise(weights, a.job.seed)
    if a.job.model.init_from:
        from dptrain import beginning

        np.copyto(weights, beginning.warm_start(a.job, a.model.layout))
    return weights


def batches_of(a: Assembly) -> Batches:
    """The job's batches. Raises DataError where there are too few rows."""
    train = a.job.train
    return Batches(
        a.dataset.train,
        seed=a.job.seed,
        batch_size=train.batch_size,
        shards=a.shards,
        shuffle=a.job.data.shuffle,
        drop_last=train.drop_last,
    )


def reader_of(a: Assembly, batches: Batches) -> Reader:
    """What reads them."""
    return Reader(
        batches,
        a.dataset.sample_shape,
        a.sample.dtype,
        a.sample.target_shape,
        a.sample.target_dtype,
        dtype=a.dtype,
        prefetch=a.dataset.train.waits,
    )
