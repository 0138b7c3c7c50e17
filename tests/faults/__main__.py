"""``python -m tests.faults``: the long campaign. Exits with 1 if any fault ended otherwise than it should."""

import argparse
import dataclasses
import itertools
import json
import os
import random
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path

from dptrain.phases import Phase
from tests.faults.fault import Fault, Outcome, Tally, mixed, perform

WEIGHTS = {"process": 4, "series": 2, "hang": 2, "network": 1, "servers": 1, "stale": 1, "storage": 3, "data": 1}
"""The kinds, each a module of this package with ``faults(seed)``, and how often each comes."""

FARTHEST = 100_000
"""Faults that are looked through for one by name."""


AIMED = ("process", "series")
"""The kinds whose faults aim at phases."""


def chosen(kinds: Sequence[str], seed: int, name: str, phases: Sequence[Phase] = ()) -> Iterator[Fault]:
    """The campaign of a seed, or the one fault of that name. ``phases``: what to aim at (none: at all)."""
    sources = {kind: import_module(f"tests.faults.{kind}").faults for kind in kinds}
    sources = {
        kind: faults(seed, phases) if phases and kind in AIMED else faults(seed) for kind, faults in sources.items()
    }
    if not name:
        return mixed(sources, WEIGHTS, seed)
    everything = itertools.chain.from_iterable(itertools.islice(some, FARTHEST) for some in sources.values())
    return itertools.islice((fault for fault in everything if fault.name == name), 1)


def part_of(text: str) -> tuple[int, int]:
    """Which of how many parts, counted from 1, as in "2/4"."""
    number, _, parts = text.partition("/")
    if not 1 <= int(number) <= int(parts):
        raise ValueError(text)
    return int(number), int(parts)


def recorded(paths: Sequence[Path]) -> Tally:
    """What became of the faults that were written to files by ``--record``."""
    tally = Tally()
    for path in paths:
        for line in path.read_text().splitlines():
            entry = json.loads(line)
            fault = Fault(entry.pop("kind"), entry.pop("name"), lambda folder: Outcome("no verdict"))
            strikes = tuple((phase, seconds) for phase, seconds in entry.pop("more"))
            tally.add(fault, Outcome(**entry, more=strikes))
    return tally


def main(arguments: Sequence[str] | None = None) -> int:
    """Run faults, tell of each that ended badly at once, and print the table."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--runs", type=int, default=100, help="how many runs with faults (default 100)")
    parser.add_argument("--seed", type=int, help="which ones (default: drawn, and told)")
    parser.add_argument("--kinds", nargs="+", choices=list(WEIGHTS), default=list(WEIGHTS), metavar="KIND")
    parser.add_argument("--name", default="", help="only the fault of this name")
    parser.add_argument("--keep", action="store_true", help="keep the folders of faults that ended badly")
    parser.add_argument("--verbose", "-v", action="store_true", help="tell of each fault, not only of bad ends")
    parser.add_argument(
        "--part", type=part_of, default=(1, 1), metavar="I/N", help="only each N-th fault, from the I-th"
    )
    named = {phase.name.lower(): phase for phase in Phase}
    parser.add_argument(
        "--phases", nargs="+", choices=list(named), default=[], metavar="PHASE", help="aim at these only"
    )
    parser.add_argument("--record", type=Path, metavar="FILE", help="add a line for each fault to a file")
    parser.add_argument("--table", type=Path, nargs="+", metavar="FILE", help="only print the table of such files")
    asked = parser.parse_args(arguments)
    if asked.table:
        tally = recorded(asked.table)
        print(tally.table())
        return 1 if tally.bad else 0
    seed = random.SystemRandom().randrange(1 << 31) if asked.seed is None else asked.seed
    print(f"seed {seed}", flush=True)

    tally = Tally()
    work = Path(tempfile.mkdtemp(prefix="faults-"))
    began = time.monotonic()
    # Data is prepared once, and in nobody's own cache.
    os.environ.setdefault("DPTRAIN_CACHE", str(work / "cache"))
    done = 0
    try:
        part, parts = asked.part
        campaign = itertools.islice(
            chosen(asked.kinds, seed, asked.name, [named[name] for name in asked.phases]), part - 1, asked.runs, parts
        )
        for number, fault in enumerate(campaign):
            folder = work / f"{number:05d}"
            started = time.monotonic()
            outcome = perform(fault, folder)
            done += 1
            tally.add(fault, outcome)
            if asked.record is not None:
                entry = {"kind": fault.kind, "name": fault.name, **dataclasses.asdict(outcome)}
                with asked.record.open("a") as file:
                    file.write(json.dumps(entry) + "\n")
            if asked.verbose or not outcome.good:
                seconds = time.monotonic() - started
                phases = ", ".join((outcome.phase, *(phase for phase, _ in outcome.more)))
                print(f"{outcome.verdict}: {fault.kind}: {fault.name} [{phases}] {seconds:.1f} s", flush=True)
            if not outcome.good:
                again = ["python", "-m", "tests.faults", "--kinds", fault.kind, "--seed", str(seed)]
                print(f"  again: {shlex.join([*again, '--name', fault.name])}")
                print("\n".join(f"  {line}" for line in outcome.note.splitlines()), flush=True)
            if outcome.good or not asked.keep:
                shutil.rmtree(folder, ignore_errors=True)
            else:
                print(f"  folder: {folder}", flush=True)
    except KeyboardInterrupt:
        print("interrupted", flush=True)
    finally:
        if not (asked.keep and tally.bad):
            shutil.rmtree(work, ignore_errors=True)
    print(f"\n{tally.table()}\n")
    seconds = time.monotonic() - began
    print(f"seed {seed}: {done} runs, {tally.strikes} faults, {tally.bad} bad, {seconds:.0f} s")
    if asked.name and not done:
        print(f"no fault is called {asked.name!r}", file=sys.stderr)
    return 1 if tally.bad or not done else 0


if __name__ == "__main__":
    sys.exit(main())
