"""Starts keepers, finds them again, and looks at how they ended. The only place that touches a job's processes.

A job's folder holds all that is its own: the job file, the keeper's files, and ``run``, the run directory.
"""

import contextlib
import os
import shutil
import signal
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from dptrain import hosts, rundir, wanted
from dptrain.errors import StorageError, UsageError
from dptrain.processes import end_session, opened, process
from dptrain.service import books, keeper
from dptrain.service.model import Job

RUN, JOB_FILE, MODEL, HOSTS, WORKERS = "run", "job.toml", "model.py", "hosts", "workers"
_SPAWNED: set[int] = set()
"""Keepers that are children of this process, whichever Runner started them: they outlive it, and must be waited for."""

_GONE = 10.0
"""Seconds in which processes that were killed must be gone."""

_NEVER = (
    "OMPI_",
    "PMIX_",
    "PMI_",
    "PRTE_",
    "MPICH_",
    "MPIR_",
    "HYDRA_",
    "LD_",
    "PYTHON",
    "DPTRAIN_",
    "GRPC_",
    "SLURM_",
)
"""Beginnings of environment variables that never come from a job."""

_KEPT = frozenset({"DPTRAIN_CACHE", "DPTRAIN_FT"})
"""Of the server's own, what steers dptrain and is handed on: neither keys of a job nor tokens are."""


class Alive(NamedTuple):
    """The keeper of a launch is there. ``handle`` becomes readable when it ends; -1 where it can't be found yet."""

    pid: int
    handle: int


class Ended(NamedTuple):
    """A launch has ended with this code (-N by signal N), after so many requests to stop."""

    code: int
    requests: int


class Lost(NamedTuple):
    """The keeper of a launch died; what it kept is gone too."""


class NeverBegun(NamedTuple):
    """No keeper has taken up this launch, and none will."""


Sight = Alive | Ended | Lost | NeverBegun


def permitted(name: str) -> bool:
    """Whether an environment variable may come from a job."""
    return name.isidentifier() and name.isascii() and not name.upper().startswith(_NEVER) and name != "PATH"


class Limits(NamedTuple):
    """What every job is held to. 0 means no limit."""

    log_bytes: int = 256 << 20
    memory_bytes: int = 0


def swift(job: Job) -> bool:
    """Whether a job's workers come and leave at a step: it is one for a parameter server."""
    with contextlib.suppress(ValueError, AttributeError):
        return bool(tomllib.loads(job.spec.run_toml).get("exchange", {}).get("type") == "ps")
    return False


class Runner:
    """The processes of all jobs below ``root``. Call it from one thread.

    ``reach`` are environment variables that say how launchers reach nodes, where there are any.
    """

    def __init__(
        self, root: Path, limits: Limits, environ: Mapping[str, str], reach: Mapping[str, str] | None = None
    ) -> None:
        self.root, self.limits = root, limits
        ours = {name: value for name, value in environ.items() if not name.startswith("DPTRAIN_") or name in _KEPT}
        self._environment = {**ours, "DPTRAIN_PROGRESS": "plain", **(reach or {})}

    def folder(self, job_id: str) -> Path:
        """The folder of a job."""
        return self.root / job_id

    def run_dir(self, job_id: str) -> Path:
        """The run directory of a job."""
        return self.root / job_id / RUN

    def start(self, job: Job, launch: int, workers: int, placed: Mapping[str, int] | None = None) -> Sight:
        """Start a launch, unless one is there; ``placed`` on nodes, or here. Raises StorageError."""
        folder = self.folder(job.id)
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            rundir.write_text(folder / JOB_FILE, job.spec.run_toml)
            if job.spec.model_source:
                rundir.write_text(folder / MODEL, job.spec.model_source)
            lock = keeper.lock(folder)
            if lock is None:
                return self.look(job.id, launch)
            with lock:
                argv = ["run", JOB_FILE, "-n", str(workers), "--run-dir", RUN]
                argv += ["--resume"] if launch > 1 else []
                if placed is not None:
                    lines = [f"{name} slots={slots}\n" for name, slots in placed.items()]
                    rundir.write_text(folder / HOSTS, "".join(lines))
                    wanted.forget(folder / HOSTS)
                    argv += ["--hostfile", HOSTS]
                elif swift(job):
                    (folder / HOSTS).unlink(missing_ok=True)
                    rundir.write_text(folder / WORKERS, wanted.text_of({wanted.HERE: workers}))
                    wanted.forget(folder / WORKERS)
                    argv += ["--workers-file", WORKERS]
                order = keeper.Order(
                    launch,
                    argv,
                    self.limits.log_bytes,
                    self.limits.memory_bytes,
                )
                keeper.write(folder / keeper.ORDER, order._asdict())
                pid = self._spawn(folder, lock.fileno(), job.spec.environment)
        except OSError as error:
            raise StorageError(
                f"job {job.id}",
                expected="to be started",
                found=error.strerror or str(error),
                cure="make room, or raise the server's limits",
            ) from None
        return Alive(pid, os.pidfd_open(pid))

    def look(self, job_id: str, launch: int) -> Sight:
        """What has become of a launch. A handle that it gives is the caller's to close."""
        folder = self.folder(job_id)
        reap()
        newest = _newest(folder)
        if not folder.is_dir():
            return NeverBegun()
        lock = keeper.lock(folder)
        if lock is None:
            pid, born = (newest["pid"], newest["born"]) if newest and newest["launch"] == launch else (0, 0)
            handle = _handle(pid, born)
            return Alive(pid if handle >= 0 else 0, handle)
        with lock:
            # Now nobody begins any more: what is not written down did not happen.
            newest = _newest(folder)
            with contextlib.suppress(StorageError):
                end = rundir.read_json(folder / keeper.EXIT)
                if end["launch"] == launch:
                    return Ended(end["code"], end["requests"])
            if newest is None or newest["launch"] < launch:
                return NeverBegun()
            self._bury(newest["pid"], newest["born"])
            return Lost()

    def ask(self, pid: int, *, kill: bool) -> None:
        """Ask a keeper to stop its run with a checkpoint, or to kill it. Nothing happens where it is gone."""
        handle = opened(pid)
        if handle >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(handle, keeper.KILL if kill else signal.SIGTERM)
            os.close(handle)

    def placed(self, job_id: str) -> dict[str, int]:
        """On which nodes the newest launch of a job has its workers; none where it has them here."""
        try:
            return {host.name: host.slots for host in hosts.read(self.folder(job_id) / HOSTS)}
        except UsageError:
            return {}

    def reshape(self, job_id: str, workers: wanted.Workers) -> None:
        """Have a swift job's workers be so many from some step on, on nodes or HERE. Raises StorageError."""
        name = WORKERS if wanted.HERE in workers else HOSTS
        rundir.write_text(self.folder(job_id) / name, wanted.text_of(workers))

    def asked(self, job_id: str) -> wanted.Workers | None:
        """The workers that a swift job is to have; None where that is not known."""
        for name in (HOSTS, WORKERS):
            path = self.folder(job_id) / name
            if path.exists():
                with contextlib.suppress(UsageError):
                    return wanted.read(path)
        return None

    def there(self, job_id: str) -> wanted.Workers | None:
        """The workers that a swift job has come to have since it was asked to; None while some come or leave."""
        asked = self.asked(job_id)
        name = WORKERS if asked is not None and wanted.HERE in asked else HOSTS
        found = wanted.found(self.folder(job_id) / name)
        return None if found is None or dict(found.asked) != dict(asked or {}) else found.there

    def began(self, job_id: str, launch: int) -> float:
        """When a launch began; 0 where it has not."""
        newest = _newest(self.folder(job_id))
        return float(newest["time"]) if newest and newest["launch"] == launch else 0.0

    def trains(self, job_id: str, launch: int) -> bool:
        """Whether a launch has come so far as to train: it has read its data and opened its run directory."""
        began = self.began(job_id, launch)
        with contextlib.suppress(OSError):
            return began > 0 and (self.run_dir(job_id) / rundir.ENCODING).stat().st_mtime >= began
        return False

    def restart(self, job_id: str, launch: int) -> str | None:
        """Why a launch's supervisor starts its workers again, and from where; None where they train."""
        run = self.run_dir(job_id)
        with contextlib.suppress(OSError):
            since = (run / rundir.RESTARTS).stat().st_mtime
            if since > (run / rundir.ENCODING).stat().st_mtime and since >= self.began(job_id, launch):
                found = books.restarts(run)
                return f"{found[-1]['cause']}; goes on from step {found[-1]['step']}" if found else "a fault"
        return None

    def done(self, job_id: str) -> bool:
        """Whether a job's run has come to its end by its own rule."""
        with contextlib.suppress(StorageError):
            return bool(rundir.read_json(self.run_dir(job_id) / rundir.RESULT)["state"] == "done")
        return False

    def newest_step(self, job_id: str) -> int:
        """The step of a job's newest checkpoint, by its name; 0 where there is none."""
        return max((step for step, _ in checkpoints(self.run_dir(job_id))), default=0)

    def remove(self, job_id: str) -> None:
        """Remove all files of a job. Raises StorageError."""
        try:
            shutil.rmtree(self.folder(job_id))
        except FileNotFoundError:
            pass
        except OSError as error:
            raise StorageError(
                f"job {job_id}",
                expected="its files to be removed",
                found=error.strerror or str(error),
                cure="see the folder's permissions",
            ) from None

    def _spawn(self, folder: Path, lock: int, environment: Mapping[str, str]) -> int:
        """A keeper of its own session, which has the lock as descriptor 3 and inherits nothing else."""
        # Not subprocess: a keeper outlives this process, and grpc does not bear a fork.
        null = [(os.POSIX_SPAWN_OPEN, handle, os.devnull, os.O_RDWR, 0) for handle in range(3)]
        pid = os.posix_spawn(
            sys.executable,
            [sys.executable, "-P", "-m", keeper.__name__, str(folder), "3"],
            {**self._environment, **environment},
            file_actions=[*null, (os.POSIX_SPAWN_DUP2, lock, 3)],
            setsid=True,
            setsigmask=(),
            setsigdef=(signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE),
        )
        _SPAWNED.add(pid)
        return pid

    def _bury(self, pid: int, born: int) -> None:
        """End what is left of a session whose keeper died, and wait for it to be gone."""
        leader = process(pid)
        if leader is not None and leader.born != born:
            return
        end_session(pid, _GONE)


def reap(*, wait: bool = False) -> None:
    """Let go the keepers of this process that have ended; with ``wait`` all, when they have."""
    for pid in list(_SPAWNED):
        with contextlib.suppress(ChildProcessError):
            if os.waitpid(pid, 0 if wait else os.WNOHANG) == (0, 0):
                continue
        _SPAWNED.discard(pid)


def checkpoints(run_dir: Path) -> list[tuple[int, Path]]:
    """The whole checkpoints of a run by step, oldest first, as (step, folder)."""
    found = []
    with contextlib.suppress(OSError):
        for name in os.listdir(run_dir / rundir.CHECKPOINTS):
            kind, _, number = name.partition("-")
            folder = run_dir / rundir.CHECKPOINTS / name
            if kind == "step" and number.isdigit() and os.path.exists(folder / "manifest.json"):
                found.append((int(number), folder))
    return sorted(found)


def _newest(folder: Path) -> dict[str, Any] | None:
    return max(keeper.begun(folder), key=lambda line: line["launch"], default=None)


def _handle(pid: int, born: int) -> int:
    """A descriptor of the process that has this id and was born then; -1 where there is none."""
    handle = opened(pid)
    found = process(pid) if handle >= 0 else None
    if handle >= 0 and (found is None or found.born != born):
        os.close(handle)
        return -1
    return handle
