"""JobService: submit jobs, watch them, end them."""

import time
from collections.abc import Iterator
from dataclasses import replace

import grpc

from dptrain.errors import CheckpointError, QuotaError, UsageError
from dptrain.service import convert, intake, runner, verbs
from dptrain.service.books import cursor_of
from dptrain.service.desk import Desk, owner_of, scope
from dptrain.service.filter import Query
from dptrain.service.intake import Intake
from dptrain.service.model import ENDED, Job, State
from dptrain.service.store import Event
from dptrain.v1 import job_pb2, job_service_pb2, job_service_pb2_grpc

GRACE = 30.0
MOST_GRACE = 3600.0
MOST_REQUEST_ID = 128
MOST_UNENDED = 10_000
"""Jobs that one owner may have waiting, running or paused."""

_PROGRESS = 1.0
"""Seconds between two messages of progress."""


class JobService(job_service_pb2_grpc.JobServiceServicer):
    """See job_service.proto."""

    def __init__(self, desk: Desk, intake: Intake) -> None:
        self.desk, self.store, self.intake = desk, desk.store, intake

    def CreateJob(
        self, request: job_service_pb2.CreateJobRequest, context: grpc.ServicerContext
    ) -> job_service_pb2.CreateJobResponse:
        """Accept a job, durably."""
        owner, now = owner_of(context), time.time()
        if len(request.request_id) > MOST_REQUEST_ID or not (request.request_id or "-").isprintable():
            raise UsageError(
                "request_id",
                expected=f"at most {MOST_REQUEST_ID} printable characters",
                found=repr(request.request_id[:40]),
                cure="a UUID does",
            )
        spec = self.intake.spec(request.spec, owner)
        job = Job(id="", owner=owner, spec=spec, message="accepted", created=now, updated=now, since=now)
        if request.validate_only:
            return job_service_pb2.CreateJobResponse(job=convert.job(job, (job.reason, "not submitted: a dry run")))
        if self.store.unended(owner) >= MOST_UNENDED:
            raise QuotaError(
                f"jobs of {owner}",
                expected=f"at most {MOST_UNENDED} that have not ended",
                found="as many",
                cure="wait, or cancel some",
            )
        job = replace(job, id=intake.new_id())
        created, existing = self.store.create(job, request.request_id, intake.digest(request.spec))
        return job_service_pb2.CreateJobResponse(job=self.desk.tell(created), existing=existing)

    def GetJob(
        self, request: job_service_pb2.JobServiceGetJobRequest, context: grpc.ServicerContext
    ) -> job_service_pb2.JobServiceGetJobResponse:
        """One job, whole."""
        job = self.desk.find(request.job_id, context)
        return job_service_pb2.JobServiceGetJobResponse(job=self.desk.tell(job, whole=True))

    def ListJobs(
        self, request: job_service_pb2.ListJobsRequest, context: grpc.ServicerContext
    ) -> job_service_pb2.ListJobsResponse:
        """A page of jobs."""
        query = Query.of(scope(context), request.page_size, request.page_token, request.filter, request.order_by)
        jobs, token = self.store.page(query)
        messages = [self.desk.tell(job) for job in jobs]
        if request.with_progress:
            for job, message in zip(jobs, messages, strict=True):
                if job.launch and job.state not in ENDED:
                    message.progress.CopyFrom(self.desk.progress(job))
        return job_service_pb2.ListJobsResponse(jobs=messages, next_page_token=token)

    def UpdateJob(
        self, request: job_service_pb2.UpdateJobRequest, context: grpc.ServicerContext
    ) -> job_service_pb2.UpdateJobResponse:
        """Change priority, labels or name."""
        changes: dict[str, object] = {}
        for path in request.update_mask.paths:
            if path == "priority":
                changes[path] = intake.checked_priority(request.spec.priority)
            elif path == "labels":
                changes[path] = intake.checked_labels(request.spec.labels)
            elif path == "name":
                changes[path] = intake.checked_name(request.spec.name)
            else:
                raise _mask(repr(path[:40]))
        if not changes:
            raise _mask("nothing")

        def decide(job: Job) -> Job:
            return replace(job, spec=replace(job.spec, **changes))  # type: ignore[arg-type]

        return job_service_pb2.UpdateJobResponse(job=self.desk.change(request.job_id, context, decide))

    def CancelJob(
        self, request: job_service_pb2.CancelJobRequest, context: grpc.ServicerContext
    ) -> job_service_pb2.CancelJobResponse:
        """End a job."""
        grace = convert.seconds(request.grace) if request.HasField("grace") else GRACE
        if not 0 <= grace <= MOST_GRACE:
            raise UsageError("grace", expected=f"0 to {MOST_GRACE:g} s", found=f"{grace:g}", cure="correct it")
        job = self.desk.change(request.job_id, context, lambda job: verbs.cancel(job, time.time(), grace))
        return job_service_pb2.CancelJobResponse(job=job)

    def PauseJob(
        self, request: job_service_pb2.PauseJobRequest, context: grpc.ServicerContext
    ) -> job_service_pb2.PauseJobResponse:
        """Stop a job with a checkpoint."""
        job = self.desk.change(request.job_id, context, lambda job: verbs.pause(job, time.time()))
        return job_service_pb2.PauseJobResponse(job=job)

    def ResumeJob(
        self, request: job_service_pb2.ResumeJobRequest, context: grpc.ServicerContext
    ) -> job_service_pb2.ResumeJobResponse:
        """Queue a paused job again."""
        job = self.desk.change(request.job_id, context, lambda job: verbs.resume(job, time.time()))
        return job_service_pb2.ResumeJobResponse(job=job)

    def RetryJob(
        self, request: job_service_pb2.RetryJobRequest, context: grpc.ServicerContext
    ) -> job_service_pb2.RetryJobResponse:
        """Queue a job again that failed or was cancelled."""

        def decide(job: Job) -> Job:
            after = verbs.retry(job, time.time())
            if request.HasField("from_step"):
                # While it is in no state to run, and nobody else can change it.
                self._go_back(job.id, request.from_step)
            return after

        return job_service_pb2.RetryJobResponse(job=self.desk.change(request.job_id, context, decide))

    def DeleteJob(
        self, request: job_service_pb2.DeleteJobRequest, context: grpc.ServicerContext
    ) -> job_service_pb2.DeleteJobResponse:
        """Remove a job that has ended."""
        found = self.desk.find(request.job_id, context)
        self.store.remove(found.id, verbs.removable)
        self.desk.journals.forget(self.desk.journal(found.id))
        return job_service_pb2.DeleteJobResponse()

    def WatchJob(
        self, request: job_service_pb2.WatchJobRequest, context: grpc.ServicerContext
    ) -> Iterator[job_service_pb2.WatchJobResponse]:
        """What happens to a job, from a cursor on."""
        found = self.desk.find(request.job_id, context)
        number, told = cursor_of(request.cursor), 0
        seconds = _PROGRESS if request.with_progress else 5.0
        for job in self.desk.turns(found, context, seconds=seconds):
            events = self.store.events(job.id, number)
            for event in events:
                number = event.number
                yield _told(event, last=job.state in ENDED and event is events[-1])
            if job.state in ENDED:
                if not events:
                    yield _told(Event(number, job.updated, job.state, job.reason, job.message), last=True)
                return
            if request.with_progress and job.state is State.RUNNING:
                progress = self.desk.progress(job)
                if progress.step != told:
                    told = progress.step
                    message = _told(Event(number, time.time(), job.state, job.reason, job.message))
                    message.progress.CopyFrom(progress)
                    yield message

    def _go_back(self, job_id: str, step: int) -> None:
        """Set the checkpoints aside that are newer than a step. Raises CheckpointError where there is none of it."""
        from dptrain import checkpoint

        found = runner.checkpoints(self.desk.runner.run_dir(job_id))
        if step and step not in {number for number, _ in found}:
            steps = ", ".join(str(number) for number, _ in found) or "none"
            raise CheckpointError(
                f"job {job_id}",
                expected=f"a checkpoint of step {step}",
                found=f"those of {steps}",
                cure="name one of them, or 0 for the beginning",
            )
        for number, folder in found:
            if number > step:
                checkpoint.set_aside(folder)


def _told(event: Event, last: bool = False) -> job_service_pb2.WatchJobResponse:
    return job_service_pb2.WatchJobResponse(
        cursor=str(event.number),
        time=convert.time(event.time),
        state=job_pb2.JobState.ValueType(event.state),
        reason=job_pb2.JobReason.ValueType(event.reason),
        message=event.message,
        last=last,
    )


def _mask(found: str) -> UsageError:
    return UsageError(
        "update_mask", expected="some of priority, labels, name", found=found, cure="name what is to change"
    )
