"""Who is taken to hang: real processes, looked at over made-up times."""

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from dptrain import board
from dptrain.board import BEAT, BEGUN, BORN, ENDED, PHASE, PID, RANK, STEP, Cell
from dptrain.phases import Phase, Phases
from dptrain.processes import process
from dptrain.supervision import FOLDER
from dptrain.watchdog import RECOVERING, Watchdog

HANG, PATIENCE, TICK = 5.0, 60.0, 0.25


class Workers:
    """Processes that only wait, and cells in which the test writes what they would."""

    def __init__(self, count: int) -> None:
        self.children = [subprocess.Popen(["sleep", "600"]) for _ in range(count)]
        self.cells = board.cells(memoryview(bytearray(board.nbytes(count))))
        for rank, (child, cell) in enumerate(zip(self.children, self.own, strict=True)):
            found = process(child.pid)
            assert found is not None
            cell[PID], cell[BORN], cell[RANK] = child.pid, found.born, rank

    @property
    def own(self) -> list[Cell]:
        return list(self.cells[1:])

    @property
    def living(self) -> list[int]:
        return [rank for rank, cell in enumerate(self.own) if board.lives(cell)]

    def stop(self, rank: int) -> None:
        child = self.children[rank]
        child.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, child.pid, os.WSTOPPED)

    def beat(self, *ranks: int, steps: int = 0) -> None:
        for rank in ranks:
            self.own[rank][BEAT] += 1
            self.own[rank][STEP] += steps
            self.own[rank][BEGUN] += steps


@pytest.fixture
def workers() -> Iterator[Workers]:
    made = Workers(3)
    yield made
    for child in made.children:
        child.kill()
        child.wait()


def dog(workers: Workers) -> Watchdog:
    """A watchdog that has seen two steps of each worker, of a tenth of a second each."""
    made = Watchdog(workers.cells, HANG, PATIENCE)
    for _ in range(3):
        workers.beat(0, 1, 2, steps=1)
        made.look(0.1)
    for cell in workers.own:
        cell[PHASE] = Phase.FORWARD
    return made


def look(made: Watchdog, seconds: float, *alive: int, steps: int = 0) -> None:
    """So many seconds pass, in which these workers give signs of life."""
    for _ in range(round(seconds / TICK)):
        for rank in alive:
            made.workers[rank].cell[BEAT] += 1
            made.workers[rank].cell[STEP] += steps
        made.look(TICK)


def test_who_gives_no_sign_of_life_is_ended_and_told(
    workers: Workers, capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(FOLDER, str(tmp_path))
    made = dog(workers)
    look(made, HANG - TICK, 0, 2)
    assert workers.living == [0, 1, 2]
    look(made, 2 * TICK, 0, 2)
    assert workers.living == [0, 2]
    assert workers.own[1][ENDED] == 1
    assert workers.children[1].wait(5) == -signal.SIGKILL
    told = capfd.readouterr().err
    assert told.startswith("dptrain: rank 1 at step 3 in forward gave no sign of life for 5.")
    (line,) = (tmp_path / "ended.jsonl").read_text().splitlines()
    assert json.loads(line)["rank"] == 1
    look(made, 2 * HANG, 0, 2)
    assert workers.living == [0, 2]
    assert capfd.readouterr().err == ""


def test_who_waits_and_counts_its_polls_lives(workers: Workers) -> None:
    made = dog(workers)
    for cell in workers.own:
        cell[PHASE] = Phase.WAITING
    look(made, 10 * PATIENCE, 0, 1, 2)
    assert workers.living == [0, 1, 2]


def test_a_pause_shorter_than_the_deadline_ends_nobody(workers: Workers) -> None:
    made = dog(workers)
    for _ in range(5):
        workers.stop(1)
        look(made, HANG - 2 * TICK, 0, 2)
        workers.children[1].send_signal(signal.SIGCONT)
        look(made, TICK, 0, 1, 2)
    assert workers.living == [0, 1, 2]


@pytest.mark.parametrize("phase", [Phase.EVALUATION, Phase.CHECKPOINT, Phase.OTHER])
def test_there_is_patience_with_what_takes_long_but_not_with_a_stopped_one(workers: Workers, phase: Phase) -> None:
    made = dog(workers)
    workers.own[0][PHASE] = workers.own[1][PHASE] = phase
    workers.stop(0)
    look(made, 2 * HANG, 2)
    assert workers.living == [1, 2]
    look(made, PATIENCE, 2)
    assert workers.living == [2]


def test_a_recovery_that_is_stuck_is_ended_long_before_other_patience_ends(workers: Workers) -> None:
    made = Watchdog(workers.cells, HANG, 20 * RECOVERING)
    for cell in workers.own:
        cell[STEP], cell[BEGUN], cell[PHASE] = 5, 5, Phase.RECOVERY
    workers.own[0][PHASE] = Phase.WAITING
    look(made, RECOVERING - 2 * TICK, 0)
    assert workers.living == [0, 1, 2]
    look(made, 4 * TICK, 0)
    assert workers.living == [0]


def test_where_none_comes_out_of_a_recovery_all_are_ended(workers: Workers, capfd: pytest.CaptureFixture[str]) -> None:
    made = Watchdog(workers.cells, HANG, 20 * RECOVERING)
    for cell in workers.own:
        cell[STEP], cell[BEGUN], cell[PHASE] = 5, 5, Phase.RECOVERY
    look(made, RECOVERING - 2 * TICK, 0, 1, 2)
    workers.own[1][PHASE] = Phase.FORWARD
    look(made, 4 * TICK, 0, 1, 2)
    workers.own[1][PHASE] = Phase.RECOVERY
    look(made, RECOVERING - 2 * TICK, 0, 1, 2)
    assert workers.living == [0, 1, 2]
    look(made, 4 * TICK, 0, 1, 2)
    assert workers.living == []
    told = capfd.readouterr().err
    assert told.count("at step 5 in recovery did not come out of a recovery for") == 3


def test_before_the_first_step_is_done_there_is_patience(workers: Workers) -> None:
    made = Watchdog(workers.cells, HANG, PATIENCE)
    for cell in workers.own:
        cell[PHASE], cell[STEP], cell[BEGUN] = Phase.FORWARD, 1, 1
    look(made, PATIENCE - TICK, 0)
    assert workers.living == [0, 1, 2]
    look(made, 3 * TICK, 0)
    assert workers.living == [0]


def test_steps_that_were_done_before_anyone_looked_count(workers: Workers) -> None:
    made = Watchdog(workers.cells, HANG, PATIENCE)
    for cell in workers.own:
        cell[PHASE], cell[STEP], cell[BEGUN] = Phase.FORWARD, 24, 24
    look(made, HANG + 2 * TICK, 0, 2)
    assert workers.living == [0, 2]


def test_ten_usual_steps_are_waited_for(workers: Workers) -> None:
    made = Watchdog(workers.cells, HANG, PATIENCE)
    for cell in workers.own:
        cell[PHASE] = Phase.FORWARD
    for _ in range(3):
        workers.beat(0, 1, 2, steps=1)
        look(made, 2.0, 0, 1, 2)
    look(made, 18.0, 0, 2)
    assert workers.living == [0, 1, 2]
    look(made, 3.0, 0, 2)
    assert workers.living == [0, 2]


def test_where_all_are_stopped_somebody_paused_the_job(workers: Workers) -> None:
    made = dog(workers)
    for rank in range(3):
        workers.stop(rank)
    look(made, 10 * PATIENCE)
    assert workers.living == [0, 1, 2]
    for rank in (0, 1):
        workers.children[rank].send_signal(signal.SIGCONT)
        os.waitid(os.P_PID, workers.children[rank].pid, os.WCONTINUED)
    look(made, HANG - TICK, 0, 1)
    assert workers.living == [0, 1, 2]
    look(made, 2 * TICK, 0, 1)
    assert workers.living == [0, 1]


def test_where_others_are_elsewhere_all_of_a_machine_may_hang(workers: Workers) -> None:
    made = dog(workers)
    made.whole = False
    for rank in range(3):
        workers.stop(rank)
    look(made, HANG + 1)
    assert workers.living == []


def test_another_process_of_the_same_number_is_left_alone(workers: Workers) -> None:
    made = dog(workers)
    workers.own[1][BORN] -= 1
    look(made, 10 * PATIENCE, 0, 2)
    assert workers.children[1].poll() is None
    assert len(made.living()) == 2


def test_it_ends_with_the_last_worker(workers: Workers) -> None:
    made = Watchdog(workers.cells, HANG, PATIENCE)
    for child in workers.children:
        child.kill()
        child.wait()
    made.run()
    assert made.living() == []


def test_phases_tell_the_board(workers: Workers) -> None:
    phases = Phases()
    phases.cell = workers.own[0]
    before = phases.cell[BEAT]
    phases.at(7)
    phases.begin(Phase.UPDATE)
    phases.begin(Phase.WAITING)
    assert (phases.cell[STEP], phases.cell[PHASE], phases.cell[BEAT]) == (7, Phase.WAITING, before + 2)


def test_an_ended_process_that_nobody_has_reaped_does_not_live(workers: Workers) -> None:
    child = workers.children[0]
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    found = process(child.pid)
    assert found is not None
    assert found.state == "Z"
    assert workers.living == [1, 2]
