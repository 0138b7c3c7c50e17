import itertools

import pytest

from dptrain.errors import JobError, RefusedTransition
from dptrain.service import verbs
from dptrain.service.model import ENDED, TRANSITIONS, Job, Reason, Spec, State, workers_of
from dptrain.service.runner import Ended, Lost, NeverBegun
from dptrain.v1 import job_pb2

SPEC = Spec(job_toml="", run_toml="", name="x", max_retries=1)


def job(state: State, **given: object) -> Job:
    return Job(id="a", owner="o", spec=SPEC, state=state, message="m", launch=1, started=10.0, **given)  # type: ignore[arg-type]


def test_the_numbers_are_the_protos() -> None:
    assert {f"JOB_STATE_{state.name}": int(state) for state in State} == {
        name: number for name, number in job_pb2.JobState.items() if number
    }
    assert {f"JOB_REASON_{reason.name}": int(reason) for reason in Reason} == dict(job_pb2.JobReason.items())


def test_every_state_is_reached_and_left_but_one() -> None:
    assert set(TRANSITIONS) == set(State)
    assert set().union(*TRANSITIONS.values()) == set(State)
    assert [state for state in State if not TRANSITIONS[state]] == [State.SUCCEEDED]
    for state, workers in itertools.product(State, (0, 2)):
        found = job(state, workers=workers)
        assert found.live + found.waits + (state in ENDED) + (state is State.PAUSED) == 1


@pytest.mark.parametrize(("before", "after"), list(itertools.product(State, State)))
def test_only_what_the_table_has_is_possible(before: State, after: State) -> None:
    if after is before or after in TRANSITIONS[before]:
        assert job(before).to(after).state is after
    else:
        with pytest.raises(RefusedTransition, match=before.name):
            job(before).to(after)


@pytest.mark.parametrize("verb", ["cancel", "pause", "resume", "retry"])
@pytest.mark.parametrize("state", State)
def test_every_verb_is_answered_in_every_state(verb: str, state: State) -> None:
    before = job(state, kill_at=50.0)
    actions = {
        "cancel": lambda: verbs.cancel(before, 10.0, 5.0),
        "pause": lambda: verbs.pause(before, 10.0),
        "resume": lambda: verbs.resume(before, 10.0),
        "retry": lambda: verbs.retry(before, 10.0),
    }
    allowed = {
        "cancel": set(State) - ENDED,
        "pause": {State.QUEUED, State.STARTING, State.RUNNING, State.PAUSING, State.PAUSED, State.RECOVERING},
        "resume": {State.PAUSED},
        "retry": {State.FAILED, State.CANCELLED},
    }
    if state in allowed[verb]:
        assert actions[verb]().message
    else:
        with pytest.raises(RefusedTransition):
            actions[verb]()


def test_a_second_cancel_only_shortens_the_grace() -> None:
    first = verbs.cancel(job(State.RUNNING), 10.0, 30.0)
    assert first.kill_at == 40.0
    assert verbs.cancel(first, 11.0, 60.0).kill_at == 40.0
    assert verbs.cancel(first, 11.0, 0.0).kill_at == 11.0


SIGHTS = [Ended(0, 0), Ended(0, 1), Ended(1, 0), Ended(1, 1), Ended(2, 0), Ended(3, 0), Ended(-9, 0), Ended(-15, 1)]


LIVE = [state for state in State if job(state, workers=2).live]


@pytest.mark.parametrize("state", LIVE)
@pytest.mark.parametrize("sight", [*SIGHTS, Lost(), NeverBegun()])
@pytest.mark.parametrize("done", [True, False])
def test_every_end_leads_out_of_every_live_state(state: State, sight: Ended | Lost | NeverBegun, done: bool) -> None:
    after = verbs.ended(job(state, workers=2), sight, done=done, newest=7, said="why", now=20.0)
    assert not after.live
    if done and not (isinstance(sight, NeverBegun) and state is State.STARTING):
        assert after.state is State.SUCCEEDED
    assert after.message


@pytest.mark.parametrize(
    ("sight", "state", "reason"),
    [
        (Ended(2, 0), State.FAILED, Reason.JOB_ERROR),
        (Ended(1, 0), State.FAILED, Reason.CRASHED),
        (Ended(3, 0), State.RECOVERING, Reason.WORKERS_LOST),
        (Ended(-9, 0), State.RECOVERING, Reason.SUPERVISOR_LOST),
        (Ended(0, 1), State.RECOVERING, Reason.STOPPED_FROM_OUTSIDE),
        (Lost(), State.RECOVERING, Reason.SUPERVISOR_LOST),
    ],
)
def test_errors_end_a_job_and_faults_do_not(sight: Ended | Lost, state: State, reason: Reason) -> None:
    after = verbs.ended(job(State.RUNNING), sight, done=False, newest=0, said="why", now=20.0)
    assert (after.state, after.reason) == (state, reason)


def test_faults_without_a_newer_checkpoint_end_it_at_last() -> None:
    first = verbs.ended(job(State.RUNNING), Lost(), done=False, newest=5, said="", now=20.0)
    assert (first.faults, first.not_before) == (1, 21.0)
    again = verbs.starting(first, 21.0, 1)
    assert verbs.ended(again, Lost(), done=False, newest=5, said="", now=30.0).state is State.FAILED
    further = verbs.ended(again, Lost(), done=False, newest=6, said="", now=30.0)
    assert (further.state, further.faults) == (State.RECOVERING, 1)


def test_a_start_that_did_not_come_about_is_no_fault() -> None:
    after = verbs.ended(job(State.STARTING), NeverBegun(), done=False, newest=0, said="", now=20.0)
    assert (after.state, after.faults) == (State.QUEUED, 0)


@pytest.mark.parametrize(("text", "found"), [("", (1, 1)), ("4", (4, 4)), ("2..8", (2, 8)), ("1..4096", (1, 4096))])
def test_workers(text: str, found: tuple[int, int]) -> None:
    assert workers_of(text, 8) == found


@pytest.mark.parametrize("text", ["0", "-1", "8..2", "a", "2..", "..2", "2...8", " 2", "1e3", "٣", "9", "9" * 30])
def test_workers_that_can_not_be(text: str) -> None:
    with pytest.raises(JobError, match="workers"):
        workers_of(text, 8)
