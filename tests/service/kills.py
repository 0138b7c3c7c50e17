"""A server that is killed again and again, at random moments of submitting, starting, running and finishing jobs.

Afterwards every accepted job must be there once, done, with the bits of a run by hand, started and begun exactly once:
nothing but the server was killed, so nothing may have been run twice.
"""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from dptrain import journal, rundir
from dptrain.errors import DptrainError
from dptrain.service import keeper
from dptrain.service.client import ENDED, Client
from dptrain.v1 import job_pb2
from dptrain.wire.limits import Patience
from tests.service.jobs import JOB, solo_hash

KINDS = ("any", "boot", "submit", "start", "finish")
"""When to kill: at any time; while it starts; just after a submit is sent; as a keeper is started; as one ends."""

_LOOK = 0.002
_UP = 60.0
_DONE = 600.0


class Verdict(NamedTuple):
    """What came of it."""

    jobs: int
    kills: Counter[str]
    lost: list[str]
    twice: list[str]
    wrong: list[str]

    @property
    def good(self) -> bool:
        return not (self.lost or self.twice or self.wrong)


class Killed:
    """A server in a folder, started again whenever it was killed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.data = folder / "data"
        self.environ = {**os.environ, "XDG_CONFIG_HOME": str(folder / "config")}
        for name in ("DPTRAIN_TOKEN", "DPTRAIN_SERVER"):
            self.environ.pop(name, None)
        self.address = f"unix:{folder / 's'}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with (self.folder / "serve.log").open("ab") as log:
            self.process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "dptrain", "serve", "--slots", "2"),
                    *("--listen", self.address, "--data", str(self.data)),
                ],
                env=self.environ,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=log,
            )

    def kill(self, number: int = signal.SIGKILL) -> None:
        assert self.process is not None
        self.process.send_signal(number)
        self.process.wait()

    def client(self) -> Client:
        patience = Patience(call_seconds=20.0, connect_seconds=_UP)
        return Client(self.address, environ=self.environ, patience=patience)

    def wait_until_up(self) -> None:
        until = time.monotonic() + _UP
        while True:
            with contextlib.suppress(DptrainError), self.client() as client:
                client.info()
                return
            assert self.process is not None
            assert self.process.poll() is None, (self.folder / "serve.log").read_text()[-3000:]
            assert time.monotonic() < until, "the server does not come up"
            time.sleep(0.05)


def campaign(folder: Path, kills: int, seed: int) -> Verdict:
    """Kill a server so many times, then see what has become of the jobs."""
    rng = random.Random(seed)
    wanted = solo_hash(folder)
    (folder / "job.toml").write_text(JOB)
    server = Killed(folder)
    server.start()
    server.wait_until_up()
    done: Counter[str] = Counter()
    requests: list[str] = []
    for number in range(kills):
        kind = KINDS[number % len(KINDS)] if number < len(KINDS) else rng.choice(KINDS)
        pending = [f"request-{seed}-{number}-{i}" for i in range(rng.randint(1, 2))]
        requests += pending
        _kill_once(server, kind, rng, pending)
        done[kind] += 1
        server.start()
        if kind == "boot":
            time.sleep(rng.uniform(0.0, 1.0))
            server.kill()
            server.start()
        server.wait_until_up()
        # Whose answer was lost asks again.
        with server.client() as client:
            for request in pending:
                client.submit(folder / "job.toml", name=request, request_id=request)
    try:
        return _judged(server, requests, wanted, done)
    finally:
        server.kill(signal.SIGTERM)


def _kill_once(server: Killed, kind: str, rng: random.Random, pending: list[str]) -> None:
    if kind == "boot":
        server.kill()
        return
    submits = subprocess.Popen(
        [sys.executable, "-m", "tests.service.kills", "--submit", str(server.folder), *pending],
        env=server.environ,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    try:
        assert submits.stdout is not None
        submits.stdout.readline()  # it is about to send
        if kind == "submit":
            time.sleep(rng.uniform(0.0, 0.03))
        elif kind == "any":
            time.sleep(rng.uniform(0.0, 2.0))
        else:
            _wait_for(server.data / "jobs", keeper.ORDER if kind == "start" else keeper.EXIT)
            time.sleep(rng.uniform(0.0, 0.05))
        server.kill()
    finally:
        submits.kill()
        submits.wait()
        assert submits.stdout is not None
        submits.stdout.close()


def _wait_for(jobs: Path, name: str) -> None:
    """Until one more job has such a file, or for so long that there will be none."""
    before = set(jobs.glob(f"*/{name}"))
    until = time.monotonic() + 5.0
    while time.monotonic() < until and set(jobs.glob(f"*/{name}")) == before:
        time.sleep(_LOOK)


def _judged(server: Killed, requests: list[str], wanted: str, kills: Counter[str]) -> Verdict:
    until = time.monotonic() + _DONE
    with server.client() as client:
        while any(job.state not in ENDED for job in client.jobs(page_size=1000)) and time.monotonic() < until:
            time.sleep(0.2)
        jobs = list(client.jobs(page_size=1000))
    names = Counter(job.spec.name for job in jobs)
    lost = [request for request in requests if not names[request]]
    twice = [request for request in requests if names[request] > 1]
    wrong = []
    for job in jobs:
        folder = server.data / "jobs" / job.id
        attempts = {line["attempt"] for line in journal.read_all(folder / "run" / rundir.JOURNAL)}
        if len(keeper.begun(folder)) != 1 or attempts != {1}:
            twice.append(f"{job.id}: begun {len(keeper.begun(folder))}, attempts {sorted(attempts)}")
        result = folder / "run" / rundir.RESULT
        found = json.loads(result.read_text())["weights_sha256"] if result.exists() else "none"
        if job.state != job_pb2.JOB_STATE_SUCCEEDED or found != wanted:
            wrong.append(f"{job.id}: {job_pb2.JobState.Name(job.state)} {found} {job.message}")
    return Verdict(len(jobs), kills, lost, twice, wrong)


def _submit(folder: Path, requests: list[str]) -> None:
    server = Killed(folder)
    with server.client() as client:
        client.info()
        print("about to", flush=True)
        for request in requests:
            client.submit(folder / "job.toml", name=request, request_id=request)


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
    import tempfile

    with tempfile.TemporaryDirectory(prefix="dptrain-kills-") as name:
        yield Path(name)


def main() -> int:
    import argparse

    parser = argparse.ArgumentParser(prog="python -m tests.service.kills", description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--submit", nargs="+", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.submit:
        _submit(Path(asked.submit[0]), asked.submit[1:])
        return 0
    with _folder() as folder:
        verdict = campaign(folder, asked.kills, asked.seed)
    kinds = " ".join(f"{kind}={count}" for kind, count in sorted(verdict.kills.items()))
    print(f"{sum(verdict.kills.values())} kills ({kinds}), {verdict.jobs} jobs:", end=" ")
    print(f"{len(verdict.lost)} lost, {len(verdict.twice)} run twice, {len(verdict.wrong)} with another end")
    for line in (*verdict.lost, *verdict.twice, *verdict.wrong):
        print(" ", line)
    return int(not verdict.good)


if __name__ == "__main__":
    sys.exit(main())
