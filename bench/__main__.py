"""Side by side, interleaved, in one run: ``python -m bench [CASE ...] [--repeats 5]``.

Prints the median and spread of whole training steps a second, and each contestant's ratio to PyTorch DDP on gloo.
Needs ``pip install '.[mpich,bench]'`` in an environment of its own.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from bench.cases import CASES, Case
from dptrain.launch import command

RESULTS = Path(__file__).parent / "results"
ENVIRON = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def ours(case: Case, shards: int, exchange: str, *, shared_memory: bool = True) -> dict[str, float]:
    """dptrain over the case's workers."""
    line, environ = command(case.workers, [], ENVIRON)
    line = [*line[: line.index(sys.executable) + 1], "-m", "bench.ours", case.name, str(shards), exchange]
    line += ["--messages"] * (not shared_memory)
    return told(subprocess.run(line, env=environ, capture_output=True, text=True, check=False))


def ddp(case: Case) -> dict[str, float]:
    """PyTorch DDP over the case's workers."""
    with tempfile.TemporaryDirectory() as folder:
        line = [sys.executable, "-m", "bench.ddp", case.name, f"{folder}/meeting"]
        others = [
            subprocess.Popen(line, env={**ENVIRON, "RANK": str(rank)}, stdout=subprocess.DEVNULL)
            for rank in range(1, case.workers)
        ]
        done = subprocess.run(line, env={**ENVIRON, "RANK": "0"}, capture_output=True, text=True, check=False)
        for other in others:
            other.wait(60)
    return told(done)


def told(done: "subprocess.CompletedProcess[str]") -> dict[str, float]:
    """The line of JSON a contestant ends with."""
    if done.returncode:
        raise SystemExit(f"{' '.join(done.args)} ended with {done.returncode}:\n{done.stderr}")
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


CONTESTANTS: dict[str, Callable[[Case], dict[str, float]]] = {
    "PyTorch DDP, gloo": ddp,
    "dptrain, G = workers": lambda case: ours(case, case.workers, "segments"),
    "dptrain, G = workers, messages": lambda case: ours(case, case.workers, "segments", shared_memory=False),
    "dptrain, G = 8": lambda case: ours(case, 8, "segments"),
    "dptrain allreduce": lambda case: ours(case, case.workers, "allreduce"),
}


def main() -> None:
    """Run the cases and write bench/results/steps.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", default=list(CASES), help=f"some of {', '.join(CASES)}")
    parser.add_argument("--only", nargs="*", default=list(CONTESTANTS), help="some of the contestants")
    parser.add_argument("--repeats", type=int, default=5, help="interleaved repetitions of each (5)")
    arguments = parser.parse_args()
    report = {"machine": {"cpu": cpu(), "cores": os.cpu_count(), "python": platform.python_version()}, "cases": {}}
    for name in arguments.cases:
        case = CASES[name]
        rates: dict[str, list[float]] = {contestant: [] for contestant in arguments.only}
        losses: dict[str, float] = {}
        for _ in range(arguments.repeats):
            for contestant in arguments.only:
                found = CONTESTANTS[contestant](case)
                rates[contestant].append(found["samples_per_second"])
                losses[contestant] = found["loss"]
        report["cases"][name] = table(case, rates, losses)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "steps.json").write_text(json.dumps(report, indent=1) + "\n")


def table(case: Case, rates: dict[str, list[float]], losses: dict[str, float]) -> dict[str, dict[str, float]]:
    """Print and return the medians of a case, their spread, and their ratio to DDP, repetition by repetition."""
    print(f"\n{case.name}: MLP {'-'.join(map(str, case.widths))}, {case.workers} workers, {case.rows} rows each")
    peer = rates["PyTorch DDP, gloo"]
    rows = {}
    for contestant, some in rates.items():
        ratios = [a / b for a, b in zip(some, peer, strict=True)]
        rows[contestant] = row = {
            "samples_per_second": statistics.median(some),
            "lowest": min(some),
            "highest": max(some),
            "ratio": statistics.median(ratios),
            "lowest_ratio": min(ratios),
            "loss": losses[contestant],
        }
        print(
            f"  {contestant:32} {row['samples_per_second']:9,.0f} samples/s ({row['lowest']:,.0f} to "
            f"{row['highest']:,.0f})  {row['ratio']:.2f} x DDP (at least {row['lowest_ratio']:.2f})  "
            f"loss {row['loss']:.4f}",
            flush=True,
        )
    return rows


def cpu() -> str:
    """The processor's name."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


if __name__ == "__main__":
    main()
