"""What all of the service's methods share: whose jobs a caller may see, and a job as it is told of."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc

from dptrain import rundir
from dptrain.errors import UnreachableError
from dptrain.service import books, convert, keeper
from dptrain.service.books import Journals, Watched
from dptrain.service.conductor import Conductor
from dptrain.service.model import Job, State
from dptrain.service.runner import Runner
from dptrain.service.store import Store
from dptrain.v1 import job_pb2
from dptrain.wire.guard import caller
from dptrain.wire.tokens import Role

_LONGEST_WAIT = 5.0
"""Seconds after which a stream sees whether anybody still listens."""


@dataclass(frozen=True)
class Desk:
    """The parts of the service that answer calls."""

    store: Store
    runner: Runner
    conductor: Conductor
    journals: Journals
    watched: Watched

    def find(self, reference: str, context: grpc.ServicerContext) -> Job:
        """The job that a caller means. Another owner's is not there. Raises NotFoundError, UsageError."""
        return self.store.find(reference, scope(context))

    def change(self, reference: str, context: grpc.ServicerContext, decide: Callable[[Job], Job]) -> job_pb2.Job:
        """Change the job that a caller means, by a function from what it is to what it shall be; then tell it."""
        return self.tell(self.store.change(self.find(reference, context).id, decide))

    def tell(self, job: Job, *, whole: bool = False) -> job_pb2.Job:
        """A job as the wire has it; ``whole`` with its progress and result."""
        message = convert.job(job, self.conductor.why(job))
        if whole:
            if job.launch:
                message.progress.CopyFrom(self.progress(job))
            if job.state is State.SUCCEEDED:
                result = convert.result(self.runner, job.id)
                if result is not None:
                    message.result.CopyFrom(result)
        return message

    def progress(self, job: Job) -> job_pb2.JobProgress:
        """How far a job is."""
        found = self.journals.progress(self.journal(job.id))
        text = job.spec.run_toml or self.store.get(job.id).spec.run_toml
        message = convert.progress(found, convert.total_steps(text, found), job.state is State.RUNNING)
        message.recoveries += len(books.restarts(self.runner.run_dir(job.id)))
        return message

    def journal(self, job_id: str) -> Path:
        """The journal of a job's run."""
        return self.runner.run_dir(job_id) / rundir.JOURNAL

    def log(self, job_id: str) -> Path:
        """What a job has printed."""
        return self.runner.folder(job_id) / keeper.LOG

    def turns(
        self, job: Job, context: grpc.ServicerContext, *others: str, seconds: float = _LONGEST_WAIT
    ) -> Iterator[Job]:
        """The job now, and again whenever it has changed or one of the others was rung, as long as someone listens.

        Raises UnreachableError when the server stops: whoever listened is to connect again.
        """
        bell = self.store.bell
        known = -1
        while context.is_active():
            seen = [(name, bell.count(name)) for name in (job.id, *others)]
            if seen[0][1] != known:
                known, job = seen[0][1], self.store.get(job.id)
            yield job
            bell.wait_any(seen, seconds)
            if bell.closed:
                raise UnreachableError(
                    "server",
                    expected="to go on",
                    found="it stops",
                    cure="connect again with the last cursor; jobs go on meanwhile",
                )


def owner_of(context: grpc.ServicerContext) -> str:
    """Whose jobs a caller's are: the token's name up to a slash, so that one person can have several."""
    return caller(context).name.partition("/")[0]


def scope(context: grpc.ServicerContext) -> str | None:
    """The owner whose jobs a caller may see; None: everybody's."""
    return None if caller(context).role is Role.admin else owner_of(context)
