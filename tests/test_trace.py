import json
import os
import signal
import threading
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from queue import Queue
from typing import Any

import numpy as np
import pytest

import dptrain
from dptrain import trace
from dptrain.errors import StorageError
from dptrain.exchange.communicator import Alone, Message
from dptrain.phases import NAMES, Phase
from dptrain.trace import Reading, Recorder, Trace, Track, compare_clocks, write
from dptrain.watch import Unwatched
from tests.softmax import LAYERS, job
from tests.traces import check_nesting, only, read, sums


class Clock:
    def __init__(self, ticks: Sequence[float] = ()) -> None:
        self.ticks = iter(ticks)
        self.now = 0.0

    def __call__(self) -> float:
        self.now = next(self.ticks, self.now + 1.0)
        return self.now


class Pair(Alone):
    """One of two workers in two threads of this process."""

    def __init__(self, rank: int, boxes: list["Queue[Any]"]) -> None:
        self.rank, self.size, self.members, self.boxes = rank, 2, (0, 1), boxes

    def post(self, sends: Sequence[Message], receives: Sequence[Message], phase: str) -> Any:
        for message in sends:
            self.boxes[message.peer].put(message.array.copy())
        for message in receives:
            np.copyto(message.array, self.boxes[self.rank].get(timeout=30))
        return Alone().post([], [], phase)

    def allgather_json(self, content: Any, phase: str) -> list[Any]:
        self.boxes[1 - self.rank].put(json.dumps(content))
        other = json.loads(self.boxes[self.rank].get(timeout=30))
        return [content, other] if self.rank == 0 else [other, content]


def two(action: Any) -> list[Any]:
    """What ``action`` of a communicator gives to each of two workers."""
    boxes: list[Queue[Any]] = [Queue(), Queue()]
    found: list[Any] = [None, None]

    def run(rank: int) -> None:
        found[rank] = action(Pair(rank, boxes))

    other = threading.Thread(target=run, args=(1,))
    other.start()
    run(0)
    other.join()
    return found


def record(recorder: Recorder, steps: int) -> None:
    for step in range(1, steps + 1):
        recorder.step = step
        recorder.begin(Phase.FORWARD, "below")
        recorder.begin(Phase.FORWARD, "above")
        recorder.begin(Phase.WAITING)
    recorder.begin(Phase.OTHER)


def test_borders_are_what_was_begun_and_sums_the_same() -> None:
    recorder = Recorder(100, Clock())
    record(recorder, 2)
    borders, details = recorder.borders()
    assert details == ["", "below", "above"]
    assert borders[:, 0].tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    assert [NAMES[int(phase)] for phase in borders[:, 1]] == [
        "other", "forward", "forward", "waiting", "forward", "forward", "waiting", "other",
    ]  # fmt: skip
    assert borders[:, 2].tolist() == [0, 1, 2, 0, 1, 2, 0, 0]
    assert borders[:, 3].tolist() == [0, 1, 1, 1, 2, 2, 2, 2]
    assert recorder.named() == dict.fromkeys(NAMES, 0.0) | {"other": 1.0, "forward": 4.0, "waiting": 2.0}
    assert recorder.dropped == 0


@pytest.mark.parametrize("steps", [3, 10, 33, 34, 100, 333])
def test_the_oldest_borders_go_first(steps: int) -> None:
    recorder = Recorder(100, Clock())
    record(recorder, steps)
    whole = 2 + 3 * steps
    borders, _ = recorder.borders()
    assert len(borders) + recorder.dropped == whole
    assert len(borders) <= 100
    assert len(borders) >= min(50, whole)
    assert borders[:, 0].tolist() == list(range(whole - len(borders) + 1, whole + 1))
    assert sum(recorder.seconds) == whole - 1


def test_starting_again_forgets_the_borders() -> None:
    recorder = Recorder(100, Clock())
    record(recorder, 40)
    recorder.start()
    assert recorder.borders()[0].tolist() == [[recorder.clock.now, 0, 0, 0]]  # type: ignore[attr-defined]
    assert recorder.dropped == 0


@pytest.mark.parametrize("ahead", [0.0, 5.0, -3e5])
def test_clocks_are_compared_to_half_a_round_trip(ahead: float) -> None:
    from time import perf_counter

    readings = two(lambda c: compare_clocks(c, (lambda: perf_counter() + ahead) if c.rank else perf_counter))[0]
    assert readings[0].shift == 0
    assert abs(readings[1].ahead - ahead) <= readings[1].round_trip / 2 + 1e-9
    assert readings[1].shift == (readings[1].ahead if ahead else 0.0)


def test_of_the_rounds_the_quickest_counts() -> None:
    # Rank 0 looks at its clock before and after each round; the third round is the quick one.
    ticks = [0.0]
    for i in range(30):
        ticks += [10.0 * i, 10.0 * i + (1.0 if i == 2 else 8.0)]
    clocks = [Clock(ticks), Clock([0.0, *(100.5 + 10.0 * i for i in range(30))])]
    readings = two(lambda c: compare_clocks(c, clocks[c.rank]))[0]
    assert readings[1] == Reading(20.5, 100.0, 1.0)


def test_a_worker_whose_clock_drifts_is_put_in_step(tmp_path: Path) -> None:
    """Its clock is 50 s ahead at the start and gains one second in ten."""
    base = [0.0]

    def ours() -> float:
        base[0] += 1e-7
        return base[0]

    def work(communicator: Pair) -> Any:
        clock = ours if communicator.rank == 0 else lambda: 50 + 1.1 * base[0]
        made = Trace(tmp_path / "t.json", communicator, clock)
        made.start()
        made.phases.start()
        for step in range(1, 6):
            # Both are at the same border at the same time, and no one goes on before.
            communicator.allgather_json(0, "x")
            if communicator.rank == 0:
                base[0] += 1.0
            communicator.allgather_json(0, "x")
            made.phases.at(step)
            made.phases.begin(Phase.FORWARD)
        made.phases.begin(Phase.OTHER)
        return made.write(f"host{communicator.rank}", {})

    assert two(work) == [None, None]
    facts, threads = read(tmp_path / "t.json")
    assert facts["clocks"][1]["ahead_seconds"] == pytest.approx([50.0, 50.5], abs=0.01)
    starts = [[event["begin"] for event in only(threads[rank], "step")] for rank in (0, 1)]
    assert len(starts[0]) == 5
    np.testing.assert_allclose(starts[0], starts[1], atol=1e6)


def test_what_a_trace_holds(tmp_path: Path) -> None:
    recorder = Recorder(100, Clock())
    record(recorder, 2)
    borders, details = recorder.borders()
    tracks = [Track(0, "a", details, 0, borders), Track(1, "b", details, 7, borders + np.array([0.5, 0, 0, 0]))]
    write(tmp_path / "t.json", tracks, {"job": "x"})
    facts, threads = read(tmp_path / "t.json")
    assert facts == {"job": "x"}
    content = json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    hosts = {event["pid"]: event["args"]["name"] for event in content if event["name"] == "process_name"}
    names = {event["tid"]: (event["pid"], event["args"]["name"]) for event in content if event["name"] == "thread_name"}
    assert hosts == {0: "a", 1: "b"}
    assert names == {0: (0, "rank 0"), 1: (1, "rank 1")}
    shown = [(e["name"], e["begin"] / 1e9, e["end"] / 1e9, e["args"]["step"]) for e in threads[1]]
    assert shown == [
        ("other", 0.5, 1.5, 0),
        ("step 1", 1.5, 4.5, 1), ("forward", 1.5, 3.5, 1), ("below", 1.5, 2.5, 1), ("above", 2.5, 3.5, 1),
        ("waiting", 3.5, 4.5, 1),
        ("step 2", 4.5, 7.5, 2), ("forward", 4.5, 6.5, 2), ("below", 4.5, 5.5, 2), ("above", 5.5, 6.5, 2),
        ("waiting", 6.5, 7.5, 2),
    ]  # fmt: skip
    for events in threads.values():
        check_nesting(events)


def test_a_trace_that_holds_one_border_is_whole(tmp_path: Path) -> None:
    borders, details = Recorder(4, Clock()).borders()
    write(tmp_path / "t.json", [Track(0, "a", details, 0, borders)], {})
    assert read(tmp_path / "t.json") == ({}, {})


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "t.json").mkdir()
    borders, details = Recorder(4, Clock()).borders()
    with pytest.raises(OSError):
        write(tmp_path / "t.json", [Track(0, "a", details, 0, borders)], {})
    assert [path.name for path in tmp_path.iterdir()] == ["t.json"]


class Counted(Unwatched):
    def __init__(self, stop_at: int = 0, break_at: Path | None = None) -> None:
        self.stop_at, self.break_at = stop_at, break_at
        self.warnings: list[str] = []
        self.result: Mapping[str, Any] = {}

    def progressed(self, line: Mapping[str, Any]) -> None:
        if line["step"] == self.stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        if self.break_at is not None and not self.break_at.exists():
            self.break_at.mkdir()

    def warned(self, text: str) -> None:
        self.warnings.append(text)

    def finished(self, result: Mapping[str, Any]) -> None:
        self.result = result


def test_a_run_alone_writes_all_its_phases_and_layers(tmp_path: Path) -> None:
    plain = dptrain.train(job(LAYERS), run_dir=tmp_path / "plain")
    result = dptrain.train(job(LAYERS), run_dir=tmp_path / "run", trace=tmp_path / "t.json")
    assert result.weights_sha256 == plain.weights_sha256
    facts, threads = read(tmp_path / "t.json")
    assert facts["job"] == "softmax"
    assert facts["dropped_borders"] == {}
    (events,) = threads.values()
    check_nesting(events)
    assert all(a["begin"] <= b["begin"] for a, b in pairwise(events))
    assert [event["name"] for event in only(events, "step")] == [f"step {i}" for i in range(1, 21)]
    (worker,) = result.per_worker
    found = sums(events)
    for name in NAMES:
        assert found[name] == pytest.approx(worker["phases"][name], abs=1e-4), name
    layers = ["layers.0.linear", "layers.1.dropout", "layers.2.tanh", "layers.3.linear"]
    for step in (1, 20):
        of_step = [event for event in events if event["args"]["step"] == step]
        forward = [event["name"] for event in only(of_step, "forward")]
        assert forward == [*layers, "loss"]
        assert [event["name"] for event in only(of_step, "backward")] == layers[::-1]
        assert {"data", "forward", "backward", "partials", "update"} <= {e["name"] for e in only(of_step, "phase")}
    assert {event["args"]["step"] for event in events if event["name"] == "evaluation"} == {5, 10, 15, 20}


def test_a_run_that_is_stopped_writes_its_trace(tmp_path: Path) -> None:
    result = dptrain.train(
        job(LAYERS), run_dir=tmp_path / "run", trace=str(tmp_path / "t.json"), observer=Counted(stop_at=7)
    )
    assert result.state == "stopped"
    (events,) = read(tmp_path / "t.json")[1].values()
    assert len(only(events, "step")) == result.steps


def test_a_long_run_keeps_the_newest_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace, "MOST_OF_A_WORKER", 100)
    result = dptrain.train(job(LAYERS), run_dir=tmp_path / "run", trace=tmp_path / "t.json")
    facts, threads = read(tmp_path / "t.json")
    assert facts["kept"] == "the newest 100 borders a worker at most"
    assert facts["dropped_borders"]["rank 0"] > 100
    check_nesting(threads[0])
    assert threads[0][-1]["args"]["step"] == result.steps


@pytest.mark.parametrize("bad", ["none/t.json", "folder"])
def test_a_path_that_can_not_be_written_is_told_before_training(bad: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(StorageError, match=r"trace .*: expected a file that can be written, found .*--trace"):
        dptrain.train(job(LAYERS), run_dir=tmp_path / "run", trace=tmp_path / bad)
    assert not (tmp_path / "run").exists()


def test_a_folder_without_leave_to_write_is_told_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trace.refuse(tmp_path / "t.json")
    monkeypatch.setattr(os, "access", lambda path, mode: (path, mode) != (tmp_path, os.W_OK))
    with pytest.raises(StorageError, match="no leave to write"):
        trace.refuse(tmp_path / "t.json")


def test_a_trace_that_fails_at_the_end_costs_no_result(tmp_path: Path) -> None:
    seen = Counted(break_at=tmp_path / "t.json")
    result = dptrain.train(job(LAYERS), run_dir=tmp_path / "run", trace=tmp_path / "t.json", observer=seen)
    assert result.state == "done"
    assert (tmp_path / "run/result.json").exists()
    assert seen.result["weights_sha256"] == result.weights_sha256
    assert any("t.json" in text for text in seen.warnings)
