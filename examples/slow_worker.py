"""Three workers, one of them slow, under a parameter server: waiting for the slowest, or not. On Fashion-MNIST.

    python examples/slow_worker.py [--target 0.85] [--seeds 3] [--times 8]

The slow one is a process like the others that is stopped and let go again, so that it gets one N-th of the time, as on
a machine that others use too. `sync` shares every batch out and waits; `async` makes a step of each batch whose
gradient arrives; `ssp` does so too, but waits where a gradient would become more than 8 steps old. Each trains until
the validation part is classified as well as asked for. Exits with 1 where that isn't reached, or where a run does not
replay to its own weights.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

JOB = Path(__file__).resolve().parent / "fashion_mnist_mlp.toml"
DPTRAIN = [sys.executable, "-m", "dptrain"]
WORKERS = 3
PERIOD = 0.05
"""Seconds in which the slow worker is stopped and let go once."""


def train(folder: Path, mode: str, seed: int, target: float, times: float) -> dict:
    """Train once, and return the result."""
    address = f"unix:{folder / 'server'}"
    sets = [f"exchange.mode={mode}", f"seed={seed}", "optimizer.momentum=0.0", "optimizer.schedule.type=constant"]
    sets += ["train.epochs=40", "train.evaluate_steps=100", "train.stop.metric=accuracy", f"train.stop.target={target}"]
    options = [word for each in sets for word in ("--set", each)]
    server = subprocess.Popen(
        [*DPTRAIN, "param-server", str(JOB), *options, "--listen", address, "--run-dir", str(folder / "run")],
        env={**os.environ, "DPTRAIN_PROGRESS": "none"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    workers = [subprocess.Popen([*DPTRAIN, "worker", "--server", address]) for _ in range(WORKERS)]
    over = threading.Event()
    brake = threading.Thread(target=slow_down, args=(workers[0], times, over))
    brake.start()
    try:
        if server.wait():
            sys.exit(f"{mode}: the server ended with {server.returncode}")
    finally:
        over.set()
        brake.join()
        for process in (server, *workers):
            process.kill()
            process.wait()
    if mode != "sync":
        subprocess.run([*DPTRAIN, "replay", str(folder / "run")], check=True, stdout=subprocess.DEVNULL)
    return json.loads((folder / "run" / "result.json").read_text())


def slow_down(worker: subprocess.Popen, times: float, over: threading.Event) -> None:
    """Let a process run one ``times``-th of the time, until it is ``over``."""
    while not over.wait(PERIOD / times) and worker.poll() is None:
        worker.send_signal(signal.SIGSTOP)
        over.wait(PERIOD * (1 - 1 / times))
        worker.send_signal(signal.SIGCONT)


def main() -> None:
    """Train in each mode with each seed, and print a table."""
    asked = argparse.ArgumentParser()
    asked.add_argument("--target", type=float, default=0.85, help="validation accuracy at which training ends")
    asked.add_argument("--seeds", type=int, default=3)
    asked.add_argument("--times", type=float, default=8.0, help="how much slower one worker is")
    given = asked.parse_args()
    found: dict[str, list[dict]] = {"sync": [], "ssp": [], "async": []}
    for seed in range(given.seeds):
        for mode, results in found.items():
            with tempfile.TemporaryDirectory() as folder:
                results.append(train(Path(folder), mode, seed, given.target, given.times))
    print(f"{WORKERS} workers, one {given.times:g} times slower, until validation accuracy {given.target:g}; medians")
    print("mode   seconds (from - to)     steps   test accuracy   staleness mean, max")
    for mode, results in found.items():
        seconds = [result["seconds"] for result in results]
        late = [result["staleness"] or {"mean": 0.0, "max": 0} for result in results]
        print(
            f"{mode:5}  {statistics.median(seconds):7.1f} ({min(seconds):.1f} - {max(seconds):.1f})"
            f"  {statistics.median(result['steps'] for result in results):8.0f}"
            f"   {statistics.median(result['metrics']['test']['accuracy'] for result in results):13.4f}"
            f"   {statistics.median(one['mean'] for one in late):.2f}, {max(one['max'] for one in late)}"
        )
        if not all(result["reason"] for result in results):
            sys.exit(f"{mode}: the accuracy was not reached")


if __name__ == "__main__":
    main()
