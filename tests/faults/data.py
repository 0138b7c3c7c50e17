"""Data that changes under a job, while it trains or before a resume: cut off, rewritten, gone, not numbers any more."""

import os
import random
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dptrain import rundir
from tests.faults.fault import Fault, Outcome
from tests.faults.oracle import PROGRAM, Surroundings, Truth, judge, undisturbed

KIND = "data"

DEADLINE = 240.0
ROWS, COLUMNS, CLASSES = 1200, 20, 4
STEPS = 400

_FORMATS = {"folder": "data", "npz": "data.npz", "csv": "data.csv"}

_JOB = """
name = "data"
seed = 5

[data]
source = "{source}"
{keys}
validation = 0.1
test = 0.1

[model]
layers = [{{ type = "linear", units = 30 }}, {{ type = "relu" }}, {{ type = "linear", units = 4 }}]

[optimizer]
lr = 0.05
momentum = 0.9

[train]
batch_size = 60
shards = 4
steps = {steps}

[output]
journal_steps = 1
checkpoint_steps = 20
checkpoint_seconds = 0
"""


def text(form: str) -> str:
    """The job file for data of a format."""
    return _JOB.format(source=_FORMATS[form], keys='label = "y"' if form == "csv" else "", steps=STEPS)


def arrays() -> tuple[Any, Any]:
    """Features and labels, always the same."""
    rng = np.random.default_rng(17)
    y = rng.integers(0, CLASSES, ROWS)
    x = rng.standard_normal((ROWS, COLUMNS)).astype(np.float32) + y[:, None].astype(np.float32) / 2
    return x, y


def write(folder: Path, form: str) -> None:
    """The data as the job of that format wants it."""
    x, y = arrays()
    if form == "folder":
        (folder / "data").mkdir(exist_ok=True)
        np.save(folder / "data" / "x.npy", x)
        np.save(folder / "data" / "y.npy", y)
    elif form == "npz":
        np.savez(folder / "data.npz", x=x, y=y)
    else:
        lines = [",".join([*(f"c{i}" for i in range(COLUMNS)), "y"])]
        lines += [",".join([*(repr(float(v)) for v in row), str(label)]) for row, label in zip(x, y, strict=True)]
        (folder / "data.csv").write_text("\n".join(lines) + "\n")


def _folder(into: Path) -> None:
    write(into, "folder")


def _npz(into: Path) -> None:
    write(into, "npz")


def _csv(into: Path) -> None:
    write(into, "csv")


_WRITERS: dict[str, Callable[[Path], None]] = {"folder": _folder, "npz": _npz, "csv": _csv}


@dataclass(frozen=True)
class Change:
    """Something done to the data. ``refusal`` is what must then be said; "" where the job must not notice."""

    name: str
    form: str
    act: Callable[[Path, random.Random], None]
    refusal: str


def _cut(name: str) -> Callable[[Path, random.Random], None]:
    def act(folder: Path, rng: random.Random) -> None:
        path = folder / name
        os.truncate(path, rng.choice((0, 100, path.stat().st_size // 2, path.stat().st_size - 1)))

    return act


def _grow(folder: Path, rng: random.Random) -> None:
    with (folder / "data" / "x.npy").open("ab") as file:
        file.write(bytes(rng.randrange(1, 5000)))


def _in_place(name: str, fill: Callable[[Any, random.Random], None]) -> Callable[[Path, random.Random], None]:
    def act(folder: Path, rng: random.Random) -> None:
        array = np.load(folder / "data" / f"{name}.npy", mmap_mode="r+")
        fill(array, rng)
        array.flush()

    return act


def _other_rows(x: Any, rng: random.Random) -> None:
    x[rng.randrange(ROWS // 2) :] += 1


def _nan(x: Any, rng: random.Random) -> None:
    lo = rng.randrange(ROWS // 2)
    x[lo : lo + ROWS // 2, rng.randrange(COLUMNS)] = np.nan


def _labels_out_of_range(y: Any, rng: random.Random) -> None:
    y[rng.randrange(ROWS // 2) :] = rng.choice((-1, CLASSES, 10**6))


def _gone(name: str) -> Callable[[Path, random.Random], None]:
    def act(folder: Path, rng: random.Random) -> None:
        (folder / name).unlink()

    return act


def _replaced(folder: Path, rng: random.Random) -> None:
    """As careful programs write: a new file takes the name, and who has the old one open keeps it."""
    path = folder / "data" / "x.npy"
    x = np.load(path)
    np.save(path.with_name("new.npy"), x + 1)
    path.with_name("new.npy").replace(path)


def _no_file(folder: Path, rng: random.Random) -> None:
    path = folder / "data" / "x.npy"
    path.unlink()
    path.mkdir()


def _unreadable(folder: Path, rng: random.Random) -> None:
    """A link to itself: even who may read everything can't read that."""
    path = folder / "data" / "x.npy"
    path.unlink()
    path.symlink_to(path.name)


def _csv_cell(value: str) -> Callable[[Path, random.Random], None]:
    def act(folder: Path, rng: random.Random) -> None:
        path = folder / "data.csv"
        lines = path.read_text().splitlines()
        at = rng.randrange(1, len(lines))
        cells = lines[at].split(",")
        cells[rng.randrange(COLUMNS)] = value
        lines[at] = ",".join(cells)
        path.write_text("\n".join(lines) + "\n")

    return act


_SIZE = r"x\.npy: expected \d+ bytes, as when it was opened"
_CHANGED = r"[xy]\.npy: expected .*as when it was opened"
_OTHER = "found another job's"
_CUT = "cut off or forged|no npy header|broken npy header|readable file"

WHILE_TRAINING = (
    Change("features cut off", "folder", _cut("data/x.npy"), _SIZE),
    Change("features grown", "folder", _grow, _SIZE),
    Change("rows rewritten in place", "folder", _in_place("x", _other_rows), _CHANGED),
    Change("NaN written in place", "folder", _in_place("x", _nan), _CHANGED + "|expected a finite gradient"),
    Change("labels out of range written in place", "folder", _in_place("y", _labels_out_of_range), _CHANGED),
    Change("features removed", "folder", _gone("data/x.npy"), ""),
    Change("features replaced by another file", "folder", _replaced, ""),
    Change("npz cut off", "npz", _cut("data.npz"), ""),
    Change("csv removed", "csv", _gone("data.csv"), ""),
)
"""What is unpacked into the cache, and a file that is open, are not the job's source any more."""

BEFORE_RESUME = (
    Change("features cut off", "folder", _cut("data/x.npy"), _CUT),
    Change("features grown", "folder", _grow, _CUT),
    Change("rows rewritten", "folder", _in_place("x", _other_rows), _OTHER),
    Change("NaN written", "folder", _in_place("x", _nan), "expected a finite number, found NaN"),
    Change("labels out of range", "folder", _in_place("y", _labels_out_of_range), f"label|class|{_OTHER}"),
    Change("features removed", "folder", _gone("data/x.npy"), "x"),
    Change("features replaced by another file", "folder", _replaced, _OTHER),
    Change("a folder in the place of features", "folder", _no_file, "x"),
    Change("features unreadable", "folder", _unreadable, "x"),
    Change("npz cut off", "npz", _cut("data.npz"), "npz"),
    Change("npz removed", "npz", _gone("data.npz"), r"data\.npz"),
    Change("csv cut off", "csv", _cut("data.csv"), rf"data\.csv|{_OTHER}"),
    Change("a number of the csv is text", "csv", _csv_cell("abc"), rf"data\.csv|{_OTHER}"),
    Change("a value of the csv is missing", "csv", _csv_cell(""), rf"data\.csv .*expected a value|{_OTHER}"),
    Change("a value of the csv is another", "csv", _csv_cell("0.5"), _OTHER),
)


def faults(seed: int) -> Iterator[Fault]:
    """Without end: every change in turn, while the job trains and before it is resumed."""
    rng = random.Random(seed)
    while True:
        for act, when, changes in (
            (while_training, "while it trains", WHILE_TRAINING),
            (before_resume, "before a resume", BEFORE_RESUME),
        ):
            for change in rng.sample(changes, 4):
                one = rng.randrange(1 << 31)
                yield _fault(act, f"{change.name} {when}, seed {one}", change, one)


def _fault(act: Callable[[Path, Change, int], Outcome], name: str, change: Change, seed: int) -> Fault:
    return Fault(KIND, name, lambda folder: act(folder, change, seed))


class Run:
    """The job in a folder of its own, with its own data."""

    def __init__(self, folder: Path, form: str) -> None:
        self.folder, self.form = folder, form
        self.place = Surroundings(folder)
        self.run_dir = folder / "run"
        (folder / "job.toml").write_text(text(form))
        write(folder, form)

    @property
    def truth(self) -> Truth:
        """What the undisturbed job comes to."""
        return undisturbed(text(self.form), _WRITERS[self.form])

    def line(self, *more: str) -> list[str]:
        """The whole command."""
        return [*PROGRAM, "run", "job.toml", "--run-dir", "run", "--progress", "none", *more]

    def restored(self, phase: str) -> Outcome:
        """With the data as it was, the run goes on to the hash of the undisturbed job."""
        for path in (self.folder / "data").glob("*"):
            if path.is_dir() and not path.is_symlink():
                path.rmdir()
            else:
                path.unlink()
        write(self.folder, self.form)
        ended = self.place.run(self.line("--resume"), DEADLINE)
        return judge(self.place, ended, self.run_dir, self.truth, phase=phase)


PAUSING = [
    sys.executable,
    "-P",
    "-c",
    """
import os, signal, sys
step = int(sys.argv.pop(1))
from dptrain.journal import Journal
write = Journal.write

def pausing(journal, line):
    write(journal, line)
    if line.get("step") == step:
        os.kill(os.getpid(), signal.SIGSTOP)

Journal.write = pausing
from dptrain.cli.main import main
main()
""",
]
"""dptrain, stopped once the line of a step is in its journal: between two steps, where it reads no data."""


def while_training(folder: Path, change: Change, seed: int) -> Outcome:
    """The data changes between two steps of a job that trains."""
    rng = random.Random(seed)
    run = Run(folder, change.form)
    truth = run.truth
    command = run.place.start([*PAUSING, str(rng.randrange(1, STEPS // 2)), *run.line()[len(PROGRAM) :]])
    if not command.paused(DEADLINE):
        run.place.kill()
        return Outcome("no verdict", "while it trains", note="it was over before its data changed")
    change.act(folder, rng)
    command.process.send_signal(signal.SIGCONT)
    ended = run.place.ended(command, DEADLINE)
    refusal = change.refusal
    outcome = judge(
        run.place, ended, run.run_dir, truth, phase="while it trains", refusal=refusal, must_fail=bool(refusal)
    )
    if not outcome.good or not refusal:
        return _named(outcome, change)
    return _named(_worse(outcome, run.restored(outcome.phase)), change)


def before_resume(folder: Path, change: Change, seed: int) -> Outcome:
    """The data changes between two parts of a run."""
    rng = random.Random(seed)
    run = Run(folder, change.form)
    truth = run.truth
    ended = run.place.run(run.line("--set", f"train.steps={rng.randrange(1, STEPS)}"), DEADLINE)
    if ended.code != 0:
        return Outcome("no verdict", "before a resume", note=ended.said)
    (run.run_dir / rundir.RESULT).unlink()
    change.act(folder, rng)
    ended = run.place.run(run.line("--resume"), DEADLINE)
    outcome = judge(
        run.place, ended, run.run_dir, truth, phase="before a resume", refusal=change.refusal, must_fail=True
    )
    if not outcome.good:
        return _named(outcome, change)
    return _named(_worse(outcome, run.restored(outcome.phase)), change)


def _worse(first: Outcome, then: Outcome) -> Outcome:
    return first if then.good else then


def _named(outcome: Outcome, change: Change) -> Outcome:
    return outcome if outcome.good else Outcome(outcome.verdict, outcome.phase, note=f"{change.name}\n{outcome.note}")
