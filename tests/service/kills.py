"""A server that is killed again and again, at random moments of submitting, starting, running and finishing jobs.

Afterwards every accepted job must be there once, done, with the bits of a run by hand, started and begun exactly once:
nothing but the server was killed, so nothing may have been run twice.
"""

import contextlib
import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from dptrain import journal, rundir
from dptrain.errors import DptrainError
from dptrain.service import keeper
from dptrain.service.client import ENDED, Client
from dptrain.service.model import State
from dptrain.service.server import STORE
from dptrain.v1 import job_pb2
from dptrain.wire.limits import Patience
from tests.service.jobs import JOB, solo_hash

KINDS = ("any", "boot", "submit", "start", "run", "finish")
"""When to kill: at any time; while it starts; just after a submit is sent; as a keeper is started; as a run has begun
to train; as a keeper ends."""

_SIGNS = {"start": keeper.ORDER, "run": f"run/{rundir.JOURNAL}", "finish": keeper.EXIT}
"""Of a job's folder: the file that comes at that moment."""

_NOT_THERE = "not accepted"
_STATES = (_NOT_THERE, *(state.name for state in State))

_LOOK = 0.002
_UP = 60.0
_DONE = 600.0


class Verdict(NamedTuple):
    """What came of it."""

    jobs: int
    kills: Counter[str]
    hit: Counter[tuple[str, str]]
    """By kind of kill: the states in which it found the jobs that were just sent."""
    lost: list[str]
    twice: list[str]
    wrong: list[str]

    @property
    def good(self) -> bool:
        return not (self.lost or self.twice or self.wrong)

    def table(self) -> str:
        """What was hit, by kind of kill; then what came of it."""
        states = [state for state in _STATES if any(found == state for _, found in self.hit)]
        lines = [("kill", "kills", *states)]
        for kind in KINDS:
            lines.append((kind, str(self.kills[kind]), *(str(self.hit[kind, state]) for state in states)))
        text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        ends = f"{len(self.lost)} lost, {len(self.twice)} run twice, {len(self.wrong)} with another end"
        return "\n".join(
            [text, f"{self.kills.total()} kills, {self.jobs} jobs: {ends}", *self.lost, *self.twice, *self.wrong]
        )


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
    hit: Counter[tuple[str, str]] = Counter()
    requests: list[str] = []
    for number in range(kills):
        kind = KINDS[number % len(KINDS)] if number < len(KINDS) else rng.choice(KINDS)
        pending = [f"request-{seed}-{number}-{i}" for i in range(rng.randint(1, 2))]
        requests += pending
        _kill_once(server, kind, rng, pending)
        done[kind] += 1
        hit.update((kind, state) for state in _states(server.data / STORE, pending))
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
        return _judged(server, requests, wanted, done, hit)
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
            _wait_for(server.data / "jobs", _SIGNS[kind])
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


def _states(store: Path, names: list[str]) -> Iterator[str]:
    """In which states jobs are by the store of a killed server, read from a copy: the next start is to find it so."""
    with tempfile.TemporaryDirectory(prefix="dptrain-kills-") as folder:
        for part in store.parent.glob(f"{store.name}*"):
            shutil.copy(part, folder)
        with contextlib.closing(sqlite3.connect(Path(folder) / store.name)) as connection:
            found = dict(connection.execute("SELECT name, state FROM jobs").fetchall())
    return (State(found[name]).name if name in found else _NOT_THERE for name in names)


def _judged(
    server: Killed, requests: list[str], wanted: str, kills: Counter[str], hit: Counter[tuple[str, str]]
) -> Verdict:
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
    return Verdict(len(jobs), kills, hit, lost, twice, wrong)


def _submit(folder: Path, requests: list[str]) -> None:
    server = Killed(folder)
    with server.client() as client:
        client.info()
        print("about to", flush=True)
        for request in requests:
            client.submit(folder / "job.toml", name=request, request_id=request)


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
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
    print(verdict.table())
    return int(not verdict.good)


if __name__ == "__main__":
    sys.exit(main())
