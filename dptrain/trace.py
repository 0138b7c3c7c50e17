"""Every border between phases, of all workers on one clock, as a file that Perfetto and Chrome show.

A worker is a thread of the process that is its machine. Its steps hold phases, and phases hold details such as layers.
Format: https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU
"""

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np
import numpy.typing as npt

from dptrain.board import BEAT, PHASE
from dptrain.errors import StorageError
from dptrain.exchange.communicator import Communicator, Message
from dptrain.phases import NAMES, Phase, Phases
from dptrain.worker import together

MOST_OF_A_WORKER, MOST = 1_000_000, 4_000_000
"""Borders that are kept, of one worker and of all; beyond that the oldest are dropped, up to half of them."""

_ROUNDS = 30
_TIME, _PHASE, _DETAIL, _STEP = range(4)
_COLUMNS = 4


class Recorder(Phases):
    """Remembers the borders too, the newest ``most``: when so many are there, the older half is dropped."""

    def __init__(self, most: int = MOST_OF_A_WORKER, clock: Callable[[], float] = time.perf_counter) -> None:
        self.most = most
        self._half = max(1, most // 2) * _COLUMNS
        super().__init__(clock)

    def start(self) -> None:
        """See Phases."""
        super().start()
        self.dropped = 0
        self._older: list[Any] = []
        self._newer: list[Any] = [self.since, Phase.OTHER, "", 0]

    def begin(self, phase: Phase, detail: str = "") -> None:
        """See Phases."""
        now = self.clock()
        self.seconds[self._phase] += now - self.since
        self._phase = phase
        self.since = now
        cell = self.cell
        cell[PHASE] = phase
        cell[BEAT] += 1
        # One flat list: a tuple for each border would be one more object for the garbage collector to look at.
        newer = self._newer
        newer += (now, phase, detail, self.step)
        if len(newer) >= self._half:
            self.dropped += len(self._older) // _COLUMNS
            self._older, self._newer = newer, []

    def borders(self) -> tuple[npt.NDArray[np.float64], list[str]]:
        """The borders, (n, 4), and the details by their number; the last border ends all.

        The columns: when, which phase begins, the number of its detail, the step.
        """
        every = self._older + self._newer
        numbers = {"": 0}
        for detail in every[_DETAIL::_COLUMNS]:
            numbers.setdefault(detail, len(numbers))
        every[_DETAIL::_COLUMNS] = [numbers[detail] for detail in every[_DETAIL::_COLUMNS]]
        return np.array(every, np.float64).reshape(-1, _COLUMNS), list(numbers)


class Reading(NamedTuple):
    """A look at another worker's clock: at ``when`` of the own it was ``ahead`` seconds, to half of ``round_trip``."""

    when: float
    ahead: float
    round_trip: float

    @property
    def shift(self) -> float:
        """What to take off the other's times. Clocks that can't be told apart are the same one, as on one machine."""
        return self.ahead if abs(self.ahead) > self.round_trip / 2 else 0.0


def compare_clocks(communicator: Communicator, clock: Callable[[], float]) -> list[Reading]:
    """Rank 0's readings of every worker's clock, by rank; all workers call it. Of some rounds the quickest counts."""
    ball = np.zeros(1)
    there, phase = [Message(0, ball, 0)], "comparing clocks"
    readings = [Reading(clock(), 0.0, 0.0)]
    for rank in range(1, communicator.size):
        if communicator.rank == 0:
            here = [Message(rank, ball, 0)]
            rounds = []
            for _ in range(_ROUNDS):
                sent = clock()
                communicator.post(here, [], phase).wait()
                communicator.post([], here, phase).wait()
                back = clock()
                rounds.append(Reading((sent + back) / 2, float(ball[0]) - (sent + back) / 2, back - sent))
            readings.append(min(rounds, key=lambda reading: reading.round_trip))
        elif communicator.rank == rank:
            for _ in range(_ROUNDS):
                communicator.post([], there, phase).wait()
                ball[0] = clock()
                communicator.post(there, [], phase).wait()
    return readings


@dataclass(frozen=True)
class Track:
    """One worker's borders, on the clock of rank 0, and what it has to say of itself."""

    rank: int
    host: str
    details: Sequence[str]
    dropped: int
    borders: npt.NDArray[np.float64]


class Trace:
    """A run's trace, made and written by all workers of ``communicator`` together; rank 0 writes ``path``.

    Raises StorageError, before anything is trained, where the file can't be written.
    """

    def __init__(self, path: Path, communicator: Communicator, clock: Callable[[], float] = time.perf_counter) -> None:
        self.path = path
        self.communicator = communicator
        together(communicator, "opening the trace", lambda: None if communicator.rank else refuse(path))
        self.phases = Recorder(min(MOST_OF_A_WORKER, MOST // communicator.size), clock)
        self._before: list[Reading] = []

    def start(self) -> None:
        """Compare the clocks; training begins next, or goes on with those that are left."""
        self._before = compare_clocks(self.communicator, self.phases.clock)

    def write(self, host: str, facts: Mapping[str, Any]) -> StorageError | None:
        """Write what was recorded up to the last border; ``facts`` go into the file. On rank 0, what went wrong."""
        after = compare_clocks(self.communicator, self.phases.clock)
        tracks = self._gather(host, after)
        if tracks is None:
            return None
        clocks = [
            {"rank": rank, "ahead_seconds": [a.ahead, b.ahead], "round_trip_seconds": [a.round_trip, b.round_trip]}
            for rank, (a, b) in enumerate(zip(self._before, after, strict=True))
        ]
        dropped = {f"rank {track.rank}": track.dropped for track in tracks if track.dropped}
        kept = f"the newest {self.phases.most} borders a worker at most"
        try:
            write(self.path, tracks, {**facts, "kept": kept, "dropped_borders": dropped, "clocks": clocks})
        except OSError as error:
            return _refused(self.path, error.strerror or str(error))
        return None

    def _gather(self, host: str, after: Sequence[Reading]) -> list[Track] | None:
        """All workers' borders on the clock of rank 0; None on the other ranks."""
        communicator, phase = self.communicator, "gathering the trace"
        mine, details = self.phases.borders()
        said = communicator.allgather_json([len(mine), host, details, self.phases.dropped], phase)
        if communicator.rank:
            communicator.post([Message(0, mine, 0)], [], phase).wait()
            return None
        every = [mine, *(np.empty((length, _COLUMNS)) for length, *_ in said[1:])]
        communicator.post([], [Message(rank, every[rank], 0) for rank in range(1, communicator.size)], phase).wait()
        for borders, before, later in zip(every, self._before, after, strict=True):
            borders[:, _TIME] -= _shifts(borders[:, _TIME], before, later)
        return [
            Track(rank, name, its, dropped, borders)
            for rank, (_, name, its, dropped), borders in zip(communicator.members, said, every, strict=True)
        ]


def _shifts(times: npt.NDArray[np.float64], before: Reading, after: Reading) -> npt.NDArray[np.float64]:
    """What to take off times of a clock that was read before and after; between the readings it drifts evenly."""
    then, now = before.when + before.shift, after.when + after.shift
    return np.asarray(before.shift + (times - then) / max(now - then, 1e-9) * (after.shift - before.shift))


def refuse(path: Path) -> None:
    """Raises StorageError where a trace can't be written to ``path``."""
    folder = path.parent
    if path.is_dir():
        raise _refused(path, "a folder")
    if not folder.is_dir():
        raise _refused(path, f"no folder {folder}")
    if not os.access(folder, os.W_OK):
        raise _refused(path, f"no leave to write to {folder}")


def _refused(path: Path, found: str) -> StorageError:
    return StorageError(
        f"trace {path}", expected="a file that can be written", found=found, cure="name another with --trace"
    )


def write(path: Path, tracks: Sequence[Track], facts: Mapping[str, Any]) -> None:
    """Write the tracks to a file, whole or not at all. Raises OSError."""
    unfinished = path.with_name(path.name + ".part")
    try:
        with open(unfinished, "w") as out:
            _write(out, tracks, facts)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def _write(out: TextIO, tracks: Sequence[Track], facts: Mapping[str, Any]) -> None:
    start = min(float(track.borders[0, _TIME]) for track in tracks)
    nodes = {host: i for i, host in enumerate(dict.fromkeys(track.host for track in tracks))}
    out.write(f'{{"displayTimeUnit":"ms","otherData":{json.dumps(facts)},"traceEvents":[\n')
    names = [
        {"name": "process_name", "ph": "M", "pid": node, "tid": 0, "args": {"name": host}}
        for host, node in nodes.items()
    ]
    for track in tracks:
        thread = {"ph": "M", "pid": nodes[track.host], "tid": track.rank}
        names.append({"name": "thread_name", **thread, "args": {"name": f"rank {track.rank}"}})
        names.append({"name": "thread_sort_index", **thread, "args": {"sort_index": track.rank}})
    out.write(",\n".join(map(json.dumps, names)))
    for track in tracks:
        place = f'"ph":"X","pid":{nodes[track.host]},"tid":{track.rank}'
        quoted = [json.dumps(detail) for detail in track.details]
        out.writelines(_events(track.borders, quoted, place, start))
    out.write("\n]}\n")


def _events(borders: npt.NDArray[np.float64], details: Sequence[str], place: str, start: float) -> Iterator[str]:
    """Steps, their phases, and the phases' details; whatever holds another comes before it."""
    nanoseconds = np.round((borders[:, _TIME] - start) * 1e9).astype(np.int64)
    phases, steps = borders[:-1, _PHASE], borders[:-1, _STEP]
    new_step = np.concatenate([[True], np.diff(steps) != 0])[: len(steps)]
    new_phase = (new_step | np.concatenate([[True], np.diff(phases) != 0]))[: len(steps)]
    step_ends, phase_ends = _ends(nanoseconds, new_step), _ends(nanoseconds, new_phase)
    at, ends = nanoseconds.tolist(), nanoseconds[1:].tolist()
    numbers, kinds, whats = steps.astype(int).tolist(), phases.astype(int).tolist(), borders[:-1, _DETAIL].tolist()
    for i, step in enumerate(numbers):
        begin = at[i]
        if new_step[i] and step:
            yield _event(f'"step {step}"', "step", begin, step_ends[i], place, step)
        if new_phase[i]:
            yield _event(f'"{NAMES[kinds[i]]}"', "phase", begin, phase_ends[i], place, step)
        if whats[i]:
            yield _event(details[int(whats[i])], NAMES[kinds[i]], begin, ends[i], place, step)


def _ends(times: npt.NDArray[np.int64], new: npt.NDArray[np.bool_]) -> list[int]:
    """For every border, where the run of equals that it belongs to ends: at the next that is new, or at the last."""
    starts = np.append(np.flatnonzero(new), len(times) - 1)
    return np.repeat(times[starts[1:]], np.diff(starts)).tolist()


def _event(name: str, category: str, begin: int, end: int, place: str, step: int) -> str:
    return (
        f',\n{{"name":{name},"cat":"{category}",{place},"ts":{begin / 1000:.3f},"dur":{(end - begin) / 1000:.3f},'
        f'"args":{{"step":{step}}}}}'
    )
