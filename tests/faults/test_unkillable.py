"""A worker that not even SIGKILL ends: the kernel holds it, as it does in a read from a server that is gone."""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dptrain.board import PID
from tests.faults import jobs
from tests.faults.live import begun, pace
from tests.faults.oracle import Surroundings, judge, undisturbed

FREEZER = Path("/sys/fs/cgroup/freezer")
"""Of cgroups' first version: what it froze gets no signal before it is thawed. The second's lets SIGKILL pass."""


@contextlib.contextmanager
def frozen(pid: int, name: str) -> Iterator[None]:
    """Within it, a process does nothing, not even end."""
    group = FREEZER / f"dptrain-{name}"
    group.mkdir()
    try:
        (group / "cgroup.procs").write_text(str(pid))
        (group / "freezer.state").write_text("FROZEN")
        yield
    finally:
        (group / "freezer.state").write_text("THAWED")
        while (group / "cgroup.procs").read_text():
            time.sleep(0.01)
        group.rmdir()


def missing() -> str:
    """Why nothing can be frozen here; "" where it can."""
    try:
        group = FREEZER / "dptrain-probe"
        group.mkdir()
        group.rmdir()
    except OSError as error:
        return f"no freezer of cgroups' first version: {error.strerror}"
    return ""


@pytest.mark.long
@pytest.mark.skipif(missing() != "", reason=missing())
def test_the_job_goes_on_without_a_worker_that_can_not_be_ended(tmp_path: Path) -> None:
    job = jobs.JOBS[0].of(300)
    truth = undisturbed(job.text)
    place = Surroundings(tmp_path / "fault")
    settings = ["--set", "exchange.hang_seconds=1", "--set", "exchange.deadline=15"]
    command, live = begun(place, job.text, 3, *settings)
    assert live is not None, command.err
    pace(live, 20)
    with frozen(live.cells[1][PID], place.mark):
        ended = command.wait(200)
    assert ended is not None, command.err
    outcome = judge(place, ended, place.folder / "run", truth, phase="frozen", said="can't be ended: the job is")
    assert outcome.verdict == "restarted", outcome.note
    assert "can't be ended and is left behind" in ended.err
