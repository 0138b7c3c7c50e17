"""What may be done to a job, and what its end makes of it: pure functions from a job to a job."""

from dataclasses import replace

from dptrain.service.model import ENDED, Job, Reason, State, refused
from dptrain.service.runner import Ended, Lost, NeverBegun
from dptrain.service.scheduler import back_off

PAUSE_SECONDS = 120.0
"""In which a job that is paused or resized must have written its checkpoint; then it is killed, and the one before
counts."""

_CRASHED, _JOB_ERROR, _LOST = 1, 2, 3
"""Exit codes of ``dptrain run``: a bug; bad input; workers lost or a deadline passed."""


def cancel(job: Job, now: float, grace: float) -> Job:
    """End a job; one that runs is given ``grace`` seconds. Raises RefusedTransition for one that has ended."""
    if job.state in ENDED:
        raise refused(job, "to be cancelled", "it has ended; `dptrain retry` queues a failed or cancelled job again")
    if job.live:
        kill_at = now + grace
        if job.state is State.CANCELLING:
            return replace(job, kill_at=min(job.kill_at, kill_at))
        return job.to(State.CANCELLING, Reason.REQUESTED, "writes a checkpoint and ends", kill_at=kill_at)
    return job.to(State.CANCELLED, Reason.REQUESTED, "cancelled on request", workers=0)


def pause(job: Job, now: float) -> Job:
    """Stop a job with a checkpoint. Raises RefusedTransition."""
    if job.state is State.PAUSED or (job.state is State.PAUSING and job.reason is Reason.REQUESTED):
        return job
    if job.state is State.PAUSING:
        return replace(job, reason=Reason.REQUESTED, message="writes a checkpoint and pauses")
    if job.live and job.state is not State.CANCELLING:
        kill_at = now + PAUSE_SECONDS
        return job.to(State.PAUSING, Reason.REQUESTED, "writes a checkpoint and pauses", kill_at=kill_at)
    return job.to(State.PAUSED, Reason.REQUESTED, "paused on request", workers=0)


def resume(job: Job, now: float) -> Job:
    """Queue a paused job again. Raises RefusedTransition."""
    if job.state is not State.PAUSED:
        raise refused(job, "to be resumed", "only a paused job is; `dptrain retry` is for failed and cancelled ones")
    return job.to(State.QUEUED, message="resumed", since=now, not_before=0.0)


def retry(job: Job, now: float) -> Job:
    """Queue a job again that failed or was cancelled. Raises RefusedTransition."""
    if job.state not in (State.FAILED, State.CANCELLED):
        raise refused(job, "to be tried again", "only a failed or cancelled job is; wait for its end, or cancel it")
    return job.to(State.QUEUED, message="tried again", since=now, not_before=0.0, faults=0, trained=0.0, exit_code=None)


def resize(job: Job, now: float, workers: int) -> Job:
    """Have a running job go on with another number of workers."""
    message = f"goes on with {workers} workers"
    return job.to(State.PAUSING, Reason.RESIZING, message, kill_at=now + PAUSE_SECONDS)


def reshaping(job: Job, workers: int, why: str, held: int) -> Job:
    """A running job whose workers come and leave at a step is to have so many, and holds more slots until then.

    Raises RefusedTransition.
    """
    if job.state is not State.RUNNING:
        raise refused(job, "to have other workers")
    message = f"trains; goes on with {_workers(workers)} from some step on{why}"
    return job.to(State.RUNNING, Reason.RESIZING, message, workers=max(job.workers, held))


def move(job: Job, now: float, node: str) -> Job:
    """Have a running job go on elsewhere than on a node that takes no more work."""
    return job.to(State.PAUSING, Reason.RESIZING, f"moves off node {node}", kill_at=now + PAUSE_SECONDS)


def too_long(job: Job, now: float, grace: float) -> Job:
    """End a job that has run for longer than it may."""
    message = f"ran longer than its {job.spec.max_seconds:g} s"
    return job.to(State.CANCELLING, Reason.TOO_LONG, message, kill_at=now + grace)


def removable(job: Job) -> None:
    """Raises RefusedTransition for a job that has not ended."""
    if job.state not in ENDED:
        raise refused(job, "to be removed", "cancel it first")


def starting(job: Job, now: float, workers: int) -> Job:
    """The next launch of a job, before there is a process."""
    message = f"starts {_workers(workers)}"
    launch = job.launch + 1
    return job.to(State.STARTING, message=message, launch=launch, workers=workers, started=now, kill_at=0.0)


def running(job: Job, workers: int = 0) -> Job:
    """A job whose launch has come so far as to train, or whose workers are ``workers`` now."""
    workers = workers or job.workers
    return job.to(State.RUNNING, message=f"trains with {_workers(workers)}", workers=workers)


def restarting(job: Job, cause: str) -> Job:
    """A job whose supervisor starts its workers again; it keeps its slots."""
    return job.to(State.RECOVERING, Reason.WORKERS_LOST, cause)


def ended(job: Job, sight: Ended | Lost | NeverBegun, *, done: bool, newest: int, said: str, now: float) -> Job:
    """What a job becomes when its launch is no more.

    ``done``: there is a result; ``newest``: the step of the newest checkpoint; ``said``: its last line of error.
    """
    if isinstance(sight, NeverBegun) and job.state is State.STARTING:
        return job.to(State.QUEUED, message="the start did not come about", workers=0)
    ran = max(0.0, now - job.started) if job.started else 0.0
    code = sight.code if isinstance(sight, Ended) else None
    job = replace(job, trained=job.trained + ran, exit_code=code, kill_at=0.0)
    if done:
        return job.to(State.SUCCEEDED, message="done", exit_code=0, not_before=0.0)
    if job.state is State.CANCELLING:
        if job.reason is Reason.TOO_LONG:
            return job.to(State.FAILED, Reason.TOO_LONG, job.message)
        return job.to(State.CANCELLED, Reason.REQUESTED, f"cancelled on request after step {newest}")
    # Asked to stop before it could at a step, a run may end with any code but that of bad input.
    asked = isinstance(sight, Ended) and sight.requests > 0
    if isinstance(sight, Ended) and (sight.code == _JOB_ERROR or (sight.code == _CRASHED and not asked)):
        reason = Reason.JOB_ERROR if sight.code == _JOB_ERROR else Reason.CRASHED
        return job.to(State.FAILED, reason, said or f"dptrain run ended with code {sight.code}")
    if job.state is State.PAUSING:
        if job.reason is Reason.RESIZING:
            return job.to(State.QUEUED, Reason.RESIZING, f"goes on from step {newest}", workers=0)
        return job.to(State.PAUSED, Reason.REQUESTED, f"paused at step {newest}", workers=0)
    return _faulted(job, sight, newest, said, now)


def _workers(n: int) -> str:
    return "1 worker" if n == 1 else f"{n} workers"


def _faulted(job: Job, sight: Ended | Lost | NeverBegun, newest: int, said: str, now: float) -> Job:
    if isinstance(sight, Ended) and (sight.code == 0 or sight.requests):
        reason, cause = Reason.STOPPED_FROM_OUTSIDE, "someone asked its processes to stop"
    elif isinstance(sight, Ended) and sight.code == _LOST:
        reason, cause = Reason.WORKERS_LOST, said or "workers were lost"
    elif isinstance(sight, Ended) and sight.code < 0:
        reason, cause = Reason.SUPERVISOR_LOST, f"its supervisor was ended by signal {-sight.code}"
    elif isinstance(sight, Ended):
        reason, cause = Reason.WORKERS_LOST, f"its supervisor ended with code {sight.code}: {said}"
    else:
        reason, cause = Reason.SUPERVISOR_LOST, "its supervisor is gone"
    faults = 1 if newest > job.reached else job.faults + 1
    job = replace(job, faults=faults, reached=max(newest, job.reached))
    if faults > job.spec.max_retries:
        tries = "1 retry" if job.spec.max_retries == 1 else f"{job.spec.max_retries} retries"
        return job.to(State.FAILED, reason, f"{cause}; no newer checkpoint within {tries}")
    wait = back_off(faults)
    message = f"{cause}; goes on from step {newest} (retry {faults} of {job.spec.max_retries})"
    return job.to(State.RECOVERING, reason, message, not_before=now + wait, since=now, workers=0)
