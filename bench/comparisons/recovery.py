"""From SIGKILL of one worker to the next step that all who are left agree on: dptrain, and torchrun."""

import json
import os
import random
import signal
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from bench import plot, report
from bench.contestants import ours
from bench.contestants.running import (
    BEGUN,
    CELLS,
    POLL,
    SEARCH,
    Command,
    Find,
    Workers,
    interpreter,
    joined,
    on_board,
    python_with,
    until,
)
from bench.interleave import Runs, interleaved, spread
from bench.options import Options, data_folder
from bench.spawn import TIMEOUT, Found, NotRun
from bench.workload import CASES, Workload
from dptrain import board
from dptrain.board import PID, Cell
from dptrain.job.load import to_toml
from dptrain.rundir import JOURNAL

WORKERS = 4
SHARDS = 8
ENDLESS = 10_000_000
"""Steps: every run is ended from outside."""

CHECKPOINT_SECONDS = 1.0
SETTLED = 1.5
"""Seconds of training before a kill that costs the steps since the checkpoint: one has been written by then, and the
kill meets any moment of the interval after it."""

PACE = 50
"""Steps before a kill that costs a step, and at most twice as many."""


@dataclass(frozen=True)
class Contestant:
    """``run`` takes the workload, the number of kills and the repetition."""

    name: str
    kind: str
    run: Callable[[Workload, int, int], Found]
    kills: int
    quick_kills: int


def main(options: Options) -> None:
    """Leaves recovery.json, .md and .png."""
    with data_folder() as folder:
        work = options.case("mlp-128", folder).at(workers=WORKERS, steps=ENDLESS)
        runs = interleaved(
            {
                key: partial(_run, contestant, work, contestant.quick_kills if options.quick else contestant.kills)
                for key, contestant in CONTESTANTS.items()
            },
            options.repeats,
            "recovery",
        )
    figures = {key: _figures(CONTESTANTS[key], some) for key, some in runs.items()}
    title = (
        f"SIGKILL to one worker: {CASES['mlp-128'].at(workers=WORKERS).title}; medians of all kills "
        f"of {options.repeats} interleaved repetitions (lowest to highest)\n\n"
        "Seconds from the signal to the end of the next step that the dead worker had no part in, less the usual time "
        "of those steps; steps that had been agreed on and were done again. Checkpoints every "
        f"{CHECKPOINT_SECONDS:g} s where a restart needs them. After a death within MPI three workers go on; after a "
        "restart four."
    )
    settings = {"repeats": options.repeats, "quick": options.quick, "workers": WORKERS, "poll_seconds": POLL}
    report.write(options.results, "recovery", title, settings, {"recovery": figures}, _table(figures))
    panels = {"seconds without a new step": _bars(figures, "seconds"), "steps done again": _bars(figures, "lost")}
    if any(panels.values()):
        plot.bars(options.results / "recovery.png", panels, "")


def _run(contestant: Contestant, work: Workload, kills: int, repeat: int) -> Found:
    return contestant.run(work.at(seed=repeat), kills, repeat)


def _survived(work: Workload, kills: int, repeat: int) -> Found:
    """One kill in each of several starts, every rank in turn."""
    python, version = python_with("Open MPI", "BENCH_OPENMPI")
    rng = random.Random(repeat)
    found = []
    for number in range(kills):
        with tempfile.TemporaryDirectory() as name, _dptrain(work, Path(name), python, 0.0) as command:
            workers = joined(command, partial(on_board, command), WORKERS)
            usual = _usual(workers, command, rng.randrange(PACE, 2 * PACE))
            victim = (repeat * kills + number) % WORKERS
            struck, step = _kill(workers, victim)
            # The dead worker may have done its part of this step, but it never entered the next.
            _reached(workers, step + 2, command)
            seconds = time.perf_counter() - struck
            kept = [line["step"] for line in _journal(Path(name)) if line.get("event") == "recovery"]
            if len(kept) != 1:
                raise command.why(f"one worker was killed, and the journal tells of {len(kept)} recoveries")
            found.append(_kill_figures(victim, seconds, usual, 2, step, kept[0]))
    return {"kills": found, "version": version}


def _restarted(work: Workload, kills: int, repeat: int) -> Found:
    """Several kills in one supervised run; the job is restarted from the newest checkpoint."""
    python, version = python_with("MPICH")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with _dptrain(work, folder, python, CHECKPOINT_SECONDS) as command:
            kept = partial(_first_step_of_attempts, folder)
            found = _kills(command, partial(on_board, command), kept, kills, repeat)
    return {"kills": found, "version": version}


def _torchrun(work: Workload, kills: int, repeat: int) -> Found:
    """The same with torchrun's agent as the supervisor."""
    python = interpreter("BENCH_TORCH")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / CELLS).write_bytes(bytes(board.nbytes(WORKERS)))
        line = [python, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={WORKERS}"]
        line += [f"--max-restarts={kills}", "-m", "bench.contestants.torch_elastic"]
        line += [work.text(), name, str(CHECKPOINT_SECONDS)]
        with (folder / CELLS).open("r+b") as file:
            cells = board.mapped(file.fileno(), WORKERS)[1:]

        def kept() -> Sequence[int]:
            return [int(step) for step in (folder / BEGUN).read_text().split()]

        # Else a restart meets the addresses of before in the agent's store, and fails or hangs (pytorch#135712).
        with Command(line, folder, {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}) as command:
            try:
                return {"kills": _kills(command, lambda: cells, kept, kills, repeat)}
            except NotRun as error:
                if "No module named" in str(error):
                    raise NotRun(f"{error} in {python}; BENCH_TORCH can name another Python") from None
                raise


def _kills(
    command: Command, find: Find, kept: Callable[[], Sequence[int]], kills: int, repeat: int
) -> list[dict[str, Any]]:
    """Kill every rank in turn; ``kept`` says from which step each start so far went on."""
    rng = random.Random(repeat)
    found = []
    workers = joined(command, find, WORKERS)
    for number in range(kills):
        usual = _usual(workers, command, seconds=SETTLED + rng.random() * CHECKPOINT_SECONDS)
        victim = (repeat * kills + number) % WORKERS
        struck, step = _kill(workers, victim)
        workers = joined(command, find, WORKERS, before=workers)
        _reached(workers, step + 1, command)
        seconds = time.perf_counter() - struck
        found.append(_kill_figures(victim, seconds, usual, 1, step, _of_start(number + 1, kept, command)))
    return found


def _dptrain(work: Workload, folder: Path, python: str, checkpoint_seconds: float) -> Command:
    job = ours.job(work, SHARDS, "auto")
    output = replace(job.output, checkpoint_seconds=checkpoint_seconds, journal_steps=1)
    (folder / "job.toml").write_text(to_toml(replace(job, output=output)))
    line = [python, "-P", "-m", "dptrain", "run", str(folder / "job.toml"), "-n", str(WORKERS)]
    return Command([*line, "--run-dir", str(folder / "run"), "--progress", "none"], folder)


def _usual(workers: Workers, command: Command, steps: int = ENDLESS, seconds: float = TIMEOUT) -> float:
    """Seconds that each of the next steps takes: so many, or for so long. Raises NotRun where a worker ends."""
    first, started = workers.step, time.perf_counter()
    # Seldom, as these looks take time from the steps.
    until(lambda: workers.step >= first + steps or len(workers.living) < WORKERS, seconds, SEARCH)
    elapsed, reached = time.perf_counter() - started, workers.step
    if reached <= first or len(workers.living) < WORKERS:
        raise command.why("a worker ended by itself, or trained no more")
    return elapsed / (reached - first)


def _kill(workers: Workers, victim: int) -> tuple[float, int]:
    """End a worker; when that was, and the step that was under way."""
    cell: Cell = workers.cells[victim]
    struck = time.perf_counter()
    os.kill(cell[PID], signal.SIGKILL)
    until(lambda: not board.lives(cell))
    return struck, workers.step


def _reached(workers: Workers, step: int, command: Command) -> None:
    """Return as soon as a step is under way. Raises NotRun where that never is."""
    deadline = time.monotonic() + TIMEOUT
    # Of those that have died no step changes; whether all have is looked at now and then.
    while not until(lambda: workers.step >= step, 1.0):
        if not workers.living or time.monotonic() > deadline:
            raise command.why(f"a death was not gone on from within {TIMEOUT:g} s")


def _of_start(number: int, kept: Callable[[], Sequence[int]], command: Command) -> int:
    """What ``kept`` says of the start of that number; whoever writes it down may come after who took the step."""
    if not until(lambda: len(kept()) > number, 10):
        raise command.why(f"start {number} left no word from which step it went on")
    return kept()[number]


def _kill_figures(victim: int, elapsed: float, usual: float, steps: int, step: int, kept: int) -> dict[str, Any]:
    """One kill at ``step``: ``elapsed`` covers ``steps`` steps, and the state after step ``kept`` was gone on from."""
    return {
        "victim": victim,
        "seconds": elapsed - steps * usual,
        "lost": max(0, step - 1 - kept),
        "usual_step_seconds": usual,
    }


def _journal(folder: Path) -> list[dict[str, Any]]:
    """The lines of a journal that is still being written."""
    whole = (folder / "run" / JOURNAL).read_bytes().rpartition(b"\n")[0]
    return [json.loads(line) for line in whole.splitlines()]


def _first_step_of_attempts(folder: Path) -> list[int]:
    """The step that each start went on from: the one before its first line."""
    first: dict[int, int] = {}
    for line in _journal(folder):
        if "loss" in line:
            first.setdefault(line["attempt"], line["step"] - 1)
    return [first[attempt] for attempt in sorted(first)]


CONTESTANTS = {
    "ulfm": Contestant("dptrain, Open MPI with ULFM: the others go on", "ours", _survived, 12, 1),
    "restart": Contestant("dptrain, MPICH: `dptrain run` restarts", "ours", _restarted, 4, 1),
    "torchrun": Contestant("PyTorch DDP, gloo: torchrun restarts", "other", _torchrun, 4, 1),
}


def _figures(contestant: Contestant, some: Runs) -> dict[str, Any]:
    figures: dict[str, Any] = {"name": contestant.name, "kind": contestant.kind}
    if some.reason:
        figures["not_run"] = some.reason
    kills = [kill for run in some.found for kill in run["kills"]]
    if kills:
        figures |= {key: spread([kill[key] for kill in kills]) for key in ("seconds", "lost", "usual_step_seconds")}
        figures["runs"] = some.found
    return figures


def _table(figures: Mapping[str, Any]) -> str:
    heads = ["", "kills", "seconds without a new step", "steps done again", "usual ms a step"]
    rows = []
    for some in figures.values():
        if "seconds" not in some:
            rows.append(report.not_run(some["name"], some["not_run"], len(heads)))
            continue
        seconds, lost, usual = some["seconds"], some["lost"], some["usual_step_seconds"]
        rows.append(
            [
                some["name"],
                str(sum(len(run["kills"]) for run in some["runs"])),
                f"{seconds['median']:.3f} ({seconds['lowest']:.3f} to {seconds['highest']:.3f})",
                f"{lost['median']:g} ({lost['lowest']} to {lost['highest']})",
                f"{1e3 * usual['median']:.2f}",
            ]
        )
    return report.table(heads, rows)


def _bars(figures: Mapping[str, Any], key: str) -> list[plot.Bar]:
    return [plot.Bar(some["name"], **some[key], kind=some["kind"]) for some in figures.values() if key in some]
