"""``python -m tests.fuzz``: mutated messages to servers at work. Exits with 1 if one crashed or met a bug."""

import argparse
import random
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module

from tests.fuzz.attack import Tally, attack
from tests.fuzz.target import Target

TARGETS = ("every_server", "service")
"""Modules of this package with ``round(seed)``."""
CALLS = 500
"""Of one attacker, over one connection, before the next one comes."""
ATTACKERS = 8


def campaign(target: Target, runs: int, seed: int, attackers: int = ATTACKERS) -> Tally:
    """At least ``runs`` mutations, in as many rounds as they need; the same seed makes the same mutations.

    In which order the attackers' calls arrive, and which round they meet, is the machine's affair.
    """
    tally, number = Tally(), 0
    while tally.messages < runs and not tally.bad:
        with target.round(seed + number) as live, ThreadPoolExecutor(attackers) as pool:
            while tally.messages < runs and not live.over() and not tally.bad:
                calls = min(CALLS, max(1, (runs - tally.messages) // attackers))
                seeds = [seed * 1_000_003 + number + i for i in range(attackers)]
                number += attackers
                for part in pool.map(lambda one: attack(live, one, calls), seeds):  # noqa: B023
                    tally.add(part)
    return tally


def main(arguments: Sequence[str] | None = None) -> int:
    """Attack each target, and print what was sent and answered."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--runs", type=int, default=10_000, help="mutations a target (default 10000)")
    parser.add_argument("--seed", type=int, help="which ones (default: drawn, and told)")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS), metavar="TARGET")
    asked = parser.parse_args(arguments)
    seed = random.SystemRandom().randrange(1 << 31) if asked.seed is None else asked.seed
    print(f"seed {seed}", flush=True)
    bad = False
    for name in asked.targets:
        tally = campaign(import_module(f"tests.fuzz.{name}"), asked.runs, seed)
        print(f"{name}:\n{tally.table()}", flush=True)
        bad = bad or bool(tally.bad) or 3 * tally.reached < tally.messages
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
