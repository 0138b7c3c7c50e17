"""Several processes of a host, held byte for byte to one that computes the same range alone."""

import contextlib
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dptrain.arithmetic import limited
from dptrain.assemble import assemble
from dptrain.board import PHASE, PID
from dptrain.data.prepare import prepare
from dptrain.errors import ArithmeticMismatch, PoisonError, WorkerCrashed
from dptrain.exchange.parameter_server import several
from dptrain.exchange.parameter_server.means import Means
from dptrain.exchange.parameter_server.several import Several
from dptrain.fingerprint import probe
from dptrain.job.spec import Job, plain
from dptrain.layout import Array
from dptrain.parts import batches_of, reader_of, start_of
from dptrain.phases import Phase
from dptrain.processes import process
from dptrain.rule import Rule
from tests.exchange.jobs import job


class Host:
    """A job's means in this process, and what computes alone with others of them."""

    def __init__(self, wanted: Job) -> None:
        self.job = wanted
        self.plan = prepare(wanted.data, directory=Path(wanted.directory), seed=wanted.seed)
        self.truth, _ = self.means()
        self.shards = self.truth.accumulator.shards
        size = self.truth.accumulator.model.layout.size
        self.outbox: Array = np.zeros((16, size), self.truth.accumulator.model.dtype)

    def means(self, at_once: int = 2) -> tuple[Means, str]:
        a = assemble(self.job, self.plan)
        batches = batches_of(a)
        rule = Rule(self.job.train, batches.steps_per_epoch, a.dataset.validation.rows > 0)
        accumulator, evaluator = a.accumulator(2), a.evaluator()
        self.start = start_of(a)
        with limited(1):
            found = probe(accumulator, evaluator, a.update(rule.total_steps), self.start, a.sample, a.rows_per_shard)
        accumulator.at_once = at_once
        parts = {"validation": a.dataset.validation, "test": a.dataset.test}
        return Means(accumulator, evaluator, reader_of(a, batches), parts), found.fingerprint

    @contextmanager
    def several(self, processes: int, **changes: Any) -> Iterator[Several]:
        means, fingerprint = self.means()
        options = {"fingerprint": fingerprint, "hang_seconds": 5.0, "deadline": 60.0, "who": "worker 7", **changes}
        with limited(1):
            host = Several(means, plain(self.job), self.plan, processes=processes, **options)
            try:
                np.copyto(host.weights, self.start)
                host.await_all()
                yield host
            finally:
                host.close()

    def same(self, host: Several, step: int, lo: int, hi: int) -> None:
        """The partials of several are those of one, to the last byte."""
        found = host.partials(step, lo, hi)
        with limited(1):
            expected = self.truth.partials(self.start, self.outbox, step, lo, hi)
        assert list(found.nodes) == list(expected.nodes)
        assert found.tallies.tobytes() == expected.tallies.tobytes()
        for mine, theirs in zip(found.vectors, expected.vectors, strict=True):
            assert mine.tobytes() == theirs.tobytes()

    def same_evaluation(self, host: Several, part: str, lo: int, hi: int) -> None:
        """The rows of an evaluation too."""
        with limited(1):
            expected = self.truth.evaluate(self.start, part, lo, hi)
        assert host.evaluate(part, lo, hi, 5).tobytes() == expected.tobytes()


def host_of(name: str, shards: int, **changes: Any) -> Host:
    wanted = job(name, shards, **changes)
    # Many small blocks, so that there is something to share.
    return Host(replace(wanted, train=replace(wanted.train, evaluate_rows=16)))


def living(host: Several) -> list[int]:
    return [place.pid for place in host._places if place.pid]


@pytest.mark.parametrize(
    ("name", "shards", "processes"),
    [
        *zip(["mlp"] * 8, (1, 5, 6, 6, 8, 8, 12, 12), (2, 3, 1, 4, 2, 3, 1, 4), strict=True),
        *zip(["cnn"] * 5, (1, 5, 6, 8, 12), (2, 3, 4, 2, 3), strict=True),
    ],
)
def test_partials_and_evaluations_are_those_of_one(name: str, shards: int, processes: int) -> None:
    host = host_of(name, shards)
    ranges = list(combinations(range(shards + 1), 2))
    random.Random(shards * 10 + processes).shuffle(ranges)
    with host.several(processes) as together:
        assert together.ready == processes
        for step, (lo, hi) in enumerate([(0, shards), *ranges[:8], (0, shards)]):
            host.same(together, step, lo, hi)
        for part, rows in host.truth.parts.items():
            total = host.truth.evaluator.blocks(rows)
            for lo, hi in ((0, total), (1, total), (total // 2, total // 2 + 1), (0, 0)):
                host.same_evaluation(together, part, lo, hi)
        report = together.report()
    assert [one["process"] for one in report] == list(range(processes))
    assert sum(one["shards_computed"] for one in report) == 2 * shards + sum(hi - lo for lo, hi in ranges[:8])
    if shards >= processes:
        assert all(one["shards_computed"] and one["rows_read"] for one in report)
    assert all(one["starts"] == 1 for one in report)


def test_sums_of_a_host_are_rounded_as_the_job_declares() -> None:
    host = host_of("cnn", 8, arithmetic={"gradients": "bfloat16"})
    with host.several(3) as together:
        for step, (lo, hi) in enumerate([(0, 8), (1, 8), (2, 6), (0, 7)]):
            host.same(together, step, lo, hi)


def test_a_range_without_shards_gives_nothing() -> None:
    host = host_of("mlp", 6)
    with host.several(2) as together:
        found = together.partials(0, 3, 3)
    assert (list(found.nodes), len(found.vectors), found.tallies.shape) == ([], 0, (0, 3))


class Killer:
    """A thread that sends a signal to a process as soon as its own loop says that it is at a phase."""

    def __init__(self, host: Several, number: int, phase: Phase, kind: int = signal.SIGKILL) -> None:
        self._cell = host._placed.signs[number]
        self._phase, self._kind = phase, kind
        self.hit = False
        self._over = False
        self._thread = threading.Thread(target=self._watch)

    def _watch(self) -> None:
        while not self._over:
            pid = self._cell[PID]
            if pid and self._cell[PHASE] == self._phase:
                os.kill(pid, self._kind)
                self.hit = True
                return
            os.sched_yield()

    def __enter__(self) -> "Killer":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over = True
        self._thread.join()


@pytest.mark.parametrize("phase", [Phase.DATA, Phase.FORWARD, Phase.BACKWARD, Phase.PARTIALS, Phase.WAITING])
def test_a_process_killed_at_a_phase_costs_no_bits(phase: Phase, capfd: pytest.CaptureFixture[str]) -> None:
    host = host_of("mlp", 6)
    with host.several(3) as together:
        host.same(together, 0, 0, 6)
        deaths = 0
        for step in range(1, 100):
            with Killer(together, 1 + step % 2, phase) as killer:
                host.same(together, step, 0, 6)
            deaths += killer.hit
            together.await_all()
            if deaths == 3:
                break
        host.same(together, 100, 1, 6)
        assert sum(one["starts"] for one in together.report()) == 3 + deaths == 6
        pids = living(together)
    assert "died" in capfd.readouterr().err
    assert not any(process(pid) for pid in pids)


def test_a_process_killed_while_it_adds_costs_no_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The others of the range may have added a part already; so all of it is computed again."""
    host = host_of("mlp", 5)
    monkeypatch.setattr(several, "_SHARED", 0)
    with host.several(2) as together:
        given = together._places[0].give
        kills = []

        def give(task: Any, arguments: Any) -> None:
            # It can be in the middle of its additions, or before them.
            given(task, arguments)
            if task.what == several.ADD and len(kills) < 3:
                pid = together._places[0].pid
                kills.append(pid)
                os.kill(pid, signal.SIGKILL)

        monkeypatch.setattr(together._places[0], "give", give)
        for step in range(6):
            host.same(together, step, 0, 5)
            together.await_all()
    assert len(kills) == 3


def test_a_process_killed_in_an_evaluation_costs_no_rows() -> None:
    host = host_of("mlp", 6)
    total = host.truth.evaluator.blocks(host.truth.parts["validation"])
    with host.several(3) as together, Killer(together, 2, Phase.EVALUATION) as killer:
        for _ in range(100):
            host.same_evaluation(together, "validation", 0, total)
    assert killer.hit


@pytest.mark.parametrize("seed", range(2))
def test_processes_killed_at_any_time_cost_no_bits(seed: int) -> None:
    host = host_of("cnn", 8)
    rng = random.Random(seed)
    over, turn = threading.Event(), threading.Lock()
    steps = [0]
    kills: dict[int, int] = {}
    with host.several(4) as together:

        def kill() -> None:
            while not over.wait(rng.uniform(0.0, 0.05)):
                # One at a step and the next, where it may be noticed: the second might have the same shards, and they
                # would be to blame. It may have gone by itself since, with the one before.
                with turn, contextlib.suppress(ProcessLookupError):
                    pid, step = rng.choice(together._placed.signs[1:])[PID], steps[0]
                    if kills.keys().isdisjoint((step - 1, step)) and pid in living(together):
                        os.kill(pid, signal.SIGKILL)
                        kills[step] = pid

        thread = threading.Thread(target=kill)
        thread.start()
        try:
            for step in range(100):
                with turn:
                    steps[0] = step
                lo, hi = sorted(rng.sample(range(9), 2))
                host.same(together, step, lo, hi)
        finally:
            over.set()
            thread.join()
        together.await_all()
        host.same(together, 100, 0, 8)
    assert kills


def test_processes_that_were_dead_before_they_were_given_anything_accuse_no_shards() -> None:
    """They are noticed when they are to get something, one after the other the same."""
    host = host_of("mlp", 6)
    with host.several(3) as together:
        host.same(together, 0, 0, 6)
        for pid in living(together):
            os.kill(pid, signal.SIGKILL)
            os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        host.same(together, 1, 0, 2)
        together.await_all()
        host.same(together, 2, 0, 6)


@pytest.mark.parametrize("phase", [Phase.FORWARD, Phase.PARTIALS])
def test_a_process_that_is_stopped_is_ended_and_costs_no_bits(phase: Phase, capfd: pytest.CaptureFixture[str]) -> None:
    host = host_of("mlp", 6)
    with host.several(2, hang_seconds=0.2) as together:
        for step in range(5):
            host.same(together, step, 0, 6)
        with Killer(together, 1, phase, signal.SIGSTOP) as killer:
            while not killer.hit:
                step += 1
                host.same(together, step, 0, 6)
        host.same(together, step + 1, 0, 6)
        together.await_all()
        host.same(together, step + 2, 0, 6)
        assert [one["starts"] for one in together.report()] == [1, 2]
    assert "was stopped for" in capfd.readouterr().err


def test_a_process_of_other_bits_is_refused() -> None:
    host = host_of("mlp", 6)
    with pytest.raises(ArithmeticMismatch, match="process 1 of worker 7 on"), host.several(2, fingerprint="sha256:0"):
        pass


OWN = """
import os, signal, sys
import numpy as np

class Model:
    def parameters(self, rng):
        return {"W": 0.1 * rng.standard_normal((64, 10))}

    def forward(self, params, x, rng):
        if sys.argv[0].endswith("companion.py") and rng is not None:
            <<HERE>>
        return x @ params["W"], lambda dy: {"W": x.T @ dy}
"""


def own_model(folder: Path, here: str) -> Host:
    (folder / "own.py").write_text(OWN.replace("<<HERE>>", here))
    wanted = job("mlp", 6, model={"layers": [], "python": "own.py:Model"})
    return Host(replace(wanted, directory=str(folder)))


@pytest.mark.parametrize(
    ("here", "found"),
    [("raise ValueError('no such thing')", "ValueError: no such thing"), ("sys.exit(3)", "SystemExit")],
)
def test_an_exception_in_a_process_is_the_worker_s(
    tmp_path: Path, here: str, found: str, capfd: pytest.CaptureFixture[str]
) -> None:
    host = own_model(tmp_path, f"if os.path.exists({str(tmp_path / 'now')!r}): {here}")
    with host.several(2) as together:
        host.same(together, 0, 0, 6)
        (tmp_path / "now").touch()
        with pytest.raises(WorkerCrashed) as raised:
            together.partials(1, 0, 6)
    assert raised.value.where == "worker 7, process 1 at step 1 in forward and backward"
    assert found in raised.value.found
    assert "Traceback" in capfd.readouterr().err


def test_a_shard_that_ends_two_processes_is_named(tmp_path: Path) -> None:
    host = own_model(
        tmp_path,
        f"where = {str(tmp_path / 'now')!r}\n"
        "            if os.path.exists(where) and float(open(where).read()) == float(x.sum()):\n"
        "                os.kill(os.getpid(), signal.SIGKILL)",
    )
    with host.several(3) as together:
        host.same(together, 0, 0, 6)
        # Of three processes the second has shards 2 and 3.
        (tmp_path / "now").write_text(repr(float(host.truth.reader.load(1, 3, 4).x.sum())))
        with pytest.raises(PoisonError, match="worker 7: shards 2 to 3 at step 1: "):
            together.partials(1, 0, 6)


def test_the_processes_end_with_the_worker(tmp_path: Path) -> None:
    """It is killed, so that it can tell nobody."""
    import subprocess
    import sys

    code = (
        "import sys, time\n"
        "from tests.exchange.parameter_server.test_several import host_of, living\n"
        "with host_of('mlp', 6).several(3) as together:\n"
        "    print(*living(together), flush=True)\n"
        "    time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as worker:
        assert worker.stdout is not None
        pids = [int(pid) for pid in worker.stdout.readline().split()]
        worker.kill()
    assert len(pids) == 2
    wait_until(lambda: not any(process(pid) for pid in pids))


def wait_until(true: Callable[[], bool]) -> None:
    until = time.monotonic() + 30
    while not true():
        assert time.monotonic() < until
        time.sleep(0.01)
