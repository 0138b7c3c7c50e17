"""The job service's figures: submits a second, lists of many jobs, followers of one log, the way to the first step."""

import contextlib
import json
import os
import select
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

from bench import report, spawn
from bench.interleave import interleaved, spread
from bench.options import Options
from bench.spawn import Found, NotRun
from dptrain.errors import DptrainError
from dptrain.job.load import load_job
from dptrain.processes import session
from dptrain.rundir import JOURNAL
from dptrain.service import keeper, known
from dptrain.service.client import Client
from dptrain.service.model import Job, Spec, State
from dptrain.service.runner import RUN, Alive, Runner
from dptrain.service.runner import Limits as RunLimits
from dptrain.service.server import JOBS, STORE
from dptrain.service.store import Store
from dptrain.v1 import log_service_pb2
from dptrain.wire.address import parse
from dptrain.wire.channel import connect
from dptrain.wire.security import Calling

POLL = 0.002
SUBMITTERS = 8
_FILLERS = 256
JOB = """
name = "bench"
[data]
source = "digits"
[model]
layers = [{ type = "linear", units = 256 }, { type = "relu" }, { type = "linear", units = 10 }]
[train]
steps = 100000000
[output]
journal_steps = 1
checkpoint_seconds = 0.0
"""
NAMES = {
    "submits": ("submits", f"jobs accepted durably, a second, by {SUBMITTERS} clients at a time"),
    "one client": ("submits", "jobs accepted durably, a second, by one client"),
    "list": ("list", "ListJobs, the slowest of 22 kinds of lists, ms"),
    "usual list": ("list", "ListJobs, the newest 50, ms"),
    "followers": ("followers", "steps a second with followers, of those without"),
    "first step": ("first step", "submit to first step, of `dptrain run` by hand"),
}


_NONE = ("label.team=none", "name=none", "active=true")
_FILTERS = ("", "label.team=bench", "state=SUCCEEDED", "name=bench", *_NONE)


def main(options: Options) -> None:
    """Leaves service.json and .md."""
    many, followers, submits = (2_000, 10, 100) if options.quick else (100_000, 200, 2_000)
    with tempfile.TemporaryDirectory(prefix="dptrain-bench-") as folder:
        store = _fill(Path(folder), many)
        measured = interleaved(
            {
                "submits": lambda repeat: _submits(store, submits),
                "list": lambda repeat: _list(store),
                "followers": lambda repeat: _followers(followers, 0.5 if options.quick else 5.0),
                "first step": lambda repeat: _first_step(),
            },
            options.repeats,
            "service",
        )
    content: dict[str, Any] = {}
    rows = []
    for key, (source, name) in NAMES.items():
        values = measured[source].values(key)
        if not values:
            content[key] = {"not_run": measured[source].reason}
            rows.append(report.not_run(name, measured[source].reason, 2))
            continue
        figures = spread(values)
        content[key] = {**figures, "runs": values}
        rows.append([name, f"{figures['median']:.3g} ({figures['lowest']:.3g} to {figures['highest']:.3g})"])
    settings = {"repeats": options.repeats, "jobs": many, "followers": followers, "submits": submits}
    title = f"The job service, {many} finished jobs in its store, {followers} followers"
    report.write(options.results, "service", title, settings, {"service": content}, report.table(["", ""], rows))


class _Served:
    """A server of its own in a folder, on some of the cores."""

    def __init__(self, folder: Path, cores: set[int] | None = None) -> None:
        self.folder = folder
        self.environ = {**os.environ, "XDG_CONFIG_HOME": str(folder / "config")}
        self.address = f"unix:{folder / 's'}"
        (folder / "job.toml").write_text(JOB)
        pinned = ["taskset", "-c", ",".join(map(str, sorted(cores)))] if cores else []
        self.process = subprocess.Popen(
            [
                *(*pinned, sys.executable, "-m", "dptrain", "serve", "--slots", "1"),
                *("--listen", self.address, "--data", str(folder / "data")),
            ],
            env=self.environ,
            stdout=subprocess.DEVNULL,
            stderr=(folder / "serve.log").open("wb"),
        )

    def client(self) -> Client:
        return Client(self.address, environ=self.environ)

    def up(self) -> None:
        until = time.monotonic() + spawn.TIMEOUT
        while True:
            with contextlib.suppress(DptrainError), self.client() as client:
                client.info()
                return
            if time.monotonic() > until or self.process.poll() is not None:
                raise NotRun((self.folder / "serve.log").read_text()[-300:])
            time.sleep(0.02)


@contextlib.contextmanager
def _served(cores: set[int] | None = None, store: Path | None = None) -> Iterator[_Served]:
    with tempfile.TemporaryDirectory(prefix="dptrain-bench-") as name:
        folder = Path(name)
        if store is not None:
            (folder / "data").mkdir(mode=0o700)
            shutil.copy(store, folder / "data" / STORE)
        served = _Served(folder, cores)
        try:
            served.up()
            yield served
        finally:
            served.process.terminate()
            served.process.wait()
            _end(folder / "data" / JOBS)


def _end(jobs: Path) -> None:
    """End what runs below a folder of jobs, whose server has ended."""
    runner = Runner(jobs, RunLimits(), os.environ)
    for folder in jobs.iterdir():
        sight = runner.look(folder.name, keeper.launches(folder))
        if isinstance(sight, Alive) and sight.handle >= 0:
            runner.ask(sight.pid, kill=True)
            select.select([sight.handle], [], [], spawn.TIMEOUT)
            os.close(sight.handle)


def _submits(store: Path, number: int) -> Found:
    with _served(store=store) as served:
        with served.client() as client:
            client.submit(served.folder / "job.toml")  # holds the slot
        job = load_job(served.folder / "job.toml")

        def submit(count: int) -> None:
            with served.client() as client:
                for _ in range(count):
                    client.submit(job)

        def rate(clients: int, count: int) -> float:
            begun = time.perf_counter()
            with ThreadPoolExecutor(clients) as pool:
                list(pool.map(submit, [count // clients] * clients))
            return count // clients * clients / (time.perf_counter() - begun)

        return {"one client": rate(1, number // 4), "submits": rate(SUBMITTERS, number)}


def _fill(folder: Path, number: int) -> Path:
    """A store with so many jobs that have ended."""
    path = folder / STORE
    store = Store(path)
    spec = Spec(job_toml=JOB, run_toml=JOB, name="bench", labels={"team": "bench"})
    done = Job(id="", owner="operator", spec=spec, state=State.SUCCEEDED, message="done", launch=1, exit_code=0)

    def create(part: int) -> None:
        for i in range(part, number, _FILLERS):
            at = 1.0e9 + i
            store.create(replace(done, id=f"{i:012d}", created=at, updated=at, finished=at + 9), "", "")

    # The store puts what waits together into one transaction.
    with ThreadPoolExecutor(_FILLERS) as pool:
        list(pool.map(create, range(_FILLERS)))
    store.close()
    return path


def _list(store: Path) -> Found:
    """The slowest of lists of many kinds, those too that nothing is in."""
    kinds = [
        *((text, order, 50) for text in _FILTERS for order in ("created desc", "priority desc", "updated asc")),
        ("", "created desc", 1000),
    ]
    medians: dict[tuple[str, str, int], float] = {}
    with _served(store=store) as served, served.client() as client:
        client.info()
        for kind in kinds:
            text, order, size = kind
            taken = []
            for _ in range(5):
                begun = time.perf_counter()
                found = next(iter(client.jobs(text, order_by=order, page_size=size)), None)
                taken.append(1000 * (time.perf_counter() - begun))
                assert (found is None) == (text in _NONE)
            medians[kind] = statistics.median(taken)
    return {"list": max(medians.values()), "usual list": medians["", "created desc", 50]}


def _followers(number: int, seconds: float) -> Found:
    """The job alone on one core, the server and all followers on another, in turns without and with them."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise NotRun("needs two cores")
    with _served({cores[1]}) as served, served.client() as client:
        job = client.submit(served.folder / "job.toml")
        folder = served.folder / "data" / "jobs" / job.id
        journal = folder / "run" / JOURNAL
        _wait_for_line(journal)
        for pid in session(keeper.begun(folder)[-1]["pid"]):
            with contextlib.suppress(ProcessLookupError, FileNotFoundError):
                for thread in os.listdir(f"/proc/{pid}/task"):
                    os.sched_setaffinity(int(thread), {cores[0]})
        rates: dict[bool, list[float]] = {False: [], True: []}
        for followed in (False, True, True, False) * 2:
            with _following(served, job.id, number if followed else 0, cores[1]):
                time.sleep(min(1.0, seconds / 5))
                rates[followed].append(_rate(journal, seconds))
    return {"followers": sum(rates[True]) / sum(rates[False])}


@contextlib.contextmanager
def _following(served: _Served, job: str, number: int, core: int) -> Iterator[None]:
    """So many followers, each with a connection of its own, in a process on one core."""
    if not number:
        yield
        return
    line = ["taskset", "-c", str(core), sys.executable, "-m", __name__, str(served.folder), job, str(number)]
    process = subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        if not process.stdout.readline():
            raise NotRun("the followers did not begin")
        yield
    finally:
        process.kill()
        process.communicate()


def _follow(folder: Path, job: str, number: int) -> None:
    environ = {**os.environ, "XDG_CONFIG_HOME": str(folder / "config")}
    address = parse(f"unix:{folder / 's'}")
    token = known.path_of(address, environ).read_text().strip()
    request = log_service_pb2.TailLogsRequest(job_id=job, follow=True, tail=1).SerializeToString()
    begun = threading.Semaphore(0)

    def follow() -> None:
        # As bytes: what a follower does with lines is its own affair.
        with connect(address, Calling(token)) as channel:
            for number, _ in enumerate(channel.unary_stream("/dptrain.v1.LogService/TailLogs")(request)):
                if not number:
                    begun.release()

    for _ in range(number):
        threading.Thread(target=follow, daemon=True).start()
    for _ in range(number):
        begun.acquire()
    print("followed", flush=True)
    sys.stdin.read()


def _rate(journal: Path, seconds: float) -> float:
    first, begun = _last_step(journal), time.perf_counter()
    time.sleep(seconds)
    return (_last_step(journal) - first) / (time.perf_counter() - begun)


def _last_step(journal: Path) -> int:
    with journal.open("rb") as file:
        file.seek(max(0, journal.stat().st_size - 8192))
        lines = file.read().splitlines(keepends=True)
    return int(json.loads(next(line for line in reversed(lines) if line.endswith(b"\n")))["step"])


def _first_step(pairs: int = 5) -> Found:
    """Medians of several, by the service and by hand in turns."""
    submitted, by_hand = [], []
    with _served() as served, served.client() as client:
        for pair in range(pairs):
            begun = time.perf_counter()
            job = client.submit(served.folder / "job.toml")
            _wait_for_line(served.folder / "data" / JOBS / job.id / RUN / JOURNAL)
            submitted.append(time.perf_counter() - begun)
            client.cancel(job.id, grace=timedelta())
            client.wait(job.id)
            by_hand.append(_by_hand(served.folder, served.folder / f"by-hand-{pair}"))
    ours, alone = statistics.median(submitted), statistics.median(by_hand)
    return {"first step": ours / alone, "submitted": ours, "by hand": alone}


def _by_hand(folder: Path, run_dir: Path) -> float:
    line = [sys.executable, "-P", "-m", "dptrain", "run", "job.toml", "-n", "1", "--run-dir", str(run_dir)]
    begun = time.perf_counter()
    # In a session of its own, as a terminal's and as the service's: the kernel shares the cores out among sessions.
    process = subprocess.Popen(
        line, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        _wait_for_line(run_dir / JOURNAL)
        return time.perf_counter() - begun
    finally:
        process.kill()
        process.wait()


def _wait_for_line(journal: Path) -> None:
    until = time.monotonic() + spawn.TIMEOUT
    while not (journal.exists() and b"\n" in journal.read_bytes()):
        if time.monotonic() > until:
            raise NotRun("no step in time")
        time.sleep(POLL)


if __name__ == "__main__":
    _follow(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
