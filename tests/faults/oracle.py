"""What every fault is judged by: the hash of an undisturbed run, deadlines, and what is left behind."""

import contextlib
import functools
import json
import os
import re
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from dptrain import checkpoint, launch, rundir, supervision
from tests.faults.fault import GOOD, Outcome

MARKER = "FAULT_MARK"
"""The variable in whose environment-wide value all processes of one fault are found."""

PROGRAM = [sys.executable, "-P", "-m", "dptrain"]
SHARED = Path("/dev/shm")
DEADLINE = 120.0
"""Seconds that an undisturbed job may take."""

_GRACE = 5.0
"""Seconds in which what has been told to end may do so."""


@dataclass(frozen=True)
class Ended:
    """How a command ended; ``code`` is None where it outlasted its deadline and was killed."""

    code: int | None
    out: str
    err: str
    seconds: float

    @property
    def said(self) -> str:
        """The end of what it wrote, for a note."""
        return f"exit code {self.code} after {self.seconds:.1f} s\n{self.out[-1500:]}\n{self.err[-3000:]}"


class Surroundings:
    """Where the commands of one fault run: marked processes, and a temporary folder of their own.

    ``environ`` is their environment. Nothing of it is cleaned up: what is left is what the fault is judged by.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.temporary = folder / "tmp"
        self.temporary.mkdir(parents=True)
        self.mark = uuid.uuid4().hex
        kept = {"DPTRAIN_CACHE", "DPTRAIN_FT"}
        own = {name: value for name, value in os.environ.items() if not name.startswith("DPTRAIN_") or name in kept}
        self.environ = launch.without_launcher(own) | {MARKER: self.mark, "TMPDIR": str(self.temporary)}
        self._shared = _shared()
        self._started: list[int] = []

    def start(self, line: Sequence[str], **environ: str) -> "Command":
        """Start a command in the folder, in a session of its own."""
        command = Command(line, self.folder, f"{len(self._started) + 1}", self.environ | environ)
        self._started.append(command.process.pid)
        return command

    def run(self, line: Sequence[str], deadline: float, **environ: str) -> Ended:
        """Run a command to its end; when the deadline passes, all processes of this fault are killed."""
        return self.ended(self.start(line, **environ), deadline)

    def ended(self, command: "Command", deadline: float) -> Ended:
        """Wait for the end of a command that was started here."""
        ended = command.wait(deadline)
        if ended is None:
            self.kill()
            ended = command.wait(_GRACE)
            assert ended is not None, f"{command.line} outlived SIGKILL"
            return Ended(None, ended.out, ended.err, ended.seconds)
        return ended

    def processes(self) -> list[int]:
        """The living processes of this fault, wherever they have got to."""
        return marked(self.mark)

    def kill(self) -> None:
        """End every process of this fault."""
        deadline = time.monotonic() + _GRACE
        while (pids := self.processes()) and time.monotonic() < deadline:
            for pid in pids:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            _gone(pids, 0.2)

    def leftovers(self) -> list[str]:
        """What is there after all should be over: processes, temporary files, shared memory. Processes are killed."""
        pids = _gone(self.processes(), _GRACE)
        found = [f"process {pid}: {_command_of(pid)}" for pid in pids]
        if pids:
            self.kill()
        found += [f"temporary {path.name}" for path in self.temporary.iterdir()]
        return found + [f"shared memory {name}" for name in self._forsaken()]

    def _forsaken(self) -> list[str]:
        """What has come to lie in shared memory and is nobody's."""
        # Other jobs of this machine come and go: theirs either has somebody who uses it, or goes with its job.
        deadline = time.monotonic() + _GRACE
        while suspects := sorted(name for name in _shared() - self._shared if not self._is_anothers(name)):
            used = _used()
            suspects = [name for name in suspects if str(SHARED / name) not in used and (SHARED / name).exists()]
            if not suspects or time.monotonic() > deadline:
                return suspects
            threading.Event().wait(0.1)
        return []

    def _is_anothers(self, name: str) -> bool:
        """Whether it is the folder of a supervisor that was not started here; those that are killed leave theirs."""
        try:
            return int((SHARED / name / supervision.SUPERVISOR).read_text()) not in self._started
        except (OSError, ValueError):
            return False


class Command:
    """A command under way; what it writes goes to files, which nobody can hold open as he could a pipe."""

    def __init__(self, line: Sequence[str], folder: Path, name: str, environ: dict[str, str]) -> None:
        self.line = list(line)
        self._out, self._err = (folder / f"{name}.{end}" for end in ("out", "err"))
        self._started = time.monotonic()
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self.process = subprocess.Popen(
                self.line,
                cwd=folder,
                env=environ,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,
            )

    @property
    def running(self) -> bool:
        """Whether it has not ended yet."""
        return self.process.poll() is None

    @property
    def out(self) -> str:
        """What it wrote to stdout so far."""
        return self._out.read_text(errors="replace")

    @property
    def err(self) -> str:
        """What it wrote to stderr so far."""
        return self._err.read_text(errors="replace")

    def paused(self, seconds: float) -> bool:
        """Whether it is stopped by a signal within a time, rather than ended."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            # It stays to be waited for.
            wanted = os.WSTOPPED | os.WEXITED | os.WNOWAIT | os.WNOHANG
            if found := os.waitid(os.P_PID, self.process.pid, wanted):
                return found.si_code == os.CLD_STOPPED
            threading.Event().wait(0.005)
        return False

    def wait(self, deadline: float) -> Ended | None:
        """How it ended; None where it still runs after ``deadline`` seconds from its start."""
        try:
            code = self.process.wait(max(0.0, self._started + deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            return None
        return Ended(code, self.out, self.err, time.monotonic() - self._started)


@dataclass(frozen=True)
class Truth:
    """What a run came to. The weights alone say little where the best are kept: those may be of long before a fault.

    ``state`` is all that the last checkpoint holds, by its checksums; None where there is none of the last step.
    """

    weights_sha256: str
    loss: float | None
    metrics: Mapping[str, Mapping[str, float]]
    state: Mapping[str, str] | None

    @classmethod
    def of(cls, run_dir: Path, result: Mapping[str, Any]) -> "Truth":
        """What a run directory holds."""
        last = run_dir / rundir.CHECKPOINTS / f"step-{result['steps']:010d}"
        state = checkpoint.read(last).manifest["tensors"] if last.exists() else None
        return cls(result["weights_sha256"], result["loss"], result["metrics"], state)

    def differs(self, other: "Truth") -> str:
        """In what another run came to something else; "" where in nothing."""
        if self.state is None or other.state is None:
            other = replace(other, state=self.state)
        pairs = ((field.name, getattr(self, field.name), getattr(other, field.name)) for field in fields(self))
        return "; ".join(f"{name} {found} instead of {truth}" for name, truth, found in pairs if truth != found)


def judge(
    place: Surroundings,
    ended: Ended,
    run_dir: Path,
    truth: Truth | None,
    *,
    phase: str,
    refusal: str = "",
    code: int = 2,
    said: str = "",
    must_fail: bool = False,
    recovery_seconds: float | None = None,
) -> Outcome:
    """The oracle: the run ended in time, left nothing behind, and came to ``truth``, if it is to come to one.

    With ``refusal``, a pattern, it may also have ended with ``code`` and such a message, and must if ``must_fail``.
    A run that went on must have said what the pattern ``said`` finds.
    """

    def outcome(verdict: str, why: str = "") -> Outcome:
        return Outcome(verdict, phase, recovery_seconds, "" if verdict in GOOD else f"{why}\n{ended.said}")

    left = place.leftovers()
    if ended.code is None:
        return outcome("hung", "outlasted its deadline")
    if left:
        return outcome("leftover", "; ".join(left))
    result = result_of(run_dir)
    if ended.code == 0:
        if must_fail:
            return outcome("wrong code", f"expected {code}")
        if result is None or result["state"] != "done":
            return outcome("wrong code", f"0 without a result that says done: {result}")
        if truth is not None and (other := truth.differs(Truth.of(run_dir, result))):
            return outcome("wrong hash", other)
        if not re.search(said, ended.out + ended.err):
            return outcome("wrong error", f"nothing like {said!r} was said")
        unfinished = [str(path) for path in run_dir.rglob(".writing-*")]
        if unfinished:
            return outcome("leftover", "; ".join(unfinished))
        return outcome("restarted" if result["attempt"] > 1 else "survived")
    if not refusal:
        return outcome("wrong code", "expected 0")
    if ended.code != code:
        return outcome("wrong code", f"expected {code}")
    told = " ".join(ended.err.split())
    if not re.search(refusal, told):
        return outcome("wrong error", f"expected {refusal!r}")
    if "Traceback" in told:
        return outcome("wrong error", "a traceback")
    if result is not None and result["state"] == "done" and must_fail:
        return outcome("wrong error", "a result of a run that failed")
    return outcome("refused")


def result_of(run_dir: Path) -> dict[str, Any] | None:
    """What result.json holds; None where there is none."""
    path = run_dir / rundir.RESULT
    return json.loads(path.read_text()) if path.exists() else None


@functools.cache
def undisturbed(job: str, prepare: Callable[[Path], None] | None = None) -> Truth:
    """What a job, given as the text of its file, comes to when one process computes it alone.

    ``prepare`` puts beside that file what the job reads.
    """
    with tempfile.TemporaryDirectory(prefix="undisturbed-") as name:
        folder = Path(name)
        (folder / "job.toml").write_text(job)
        if prepare is not None:
            prepare(folder)
        place = Surroundings(folder)
        ended = place.run([*PROGRAM, "run", "job.toml", "--run-dir", "run", "--progress", "none"], DEADLINE)
        result = result_of(folder / "run")
        if ended.code != 0 or result is None or result["state"] != "done":
            raise RuntimeError(f"an undisturbed job failed: {ended.said}")
        return Truth.of(folder / "run", result)


def marked(mark: str) -> list[int]:
    """The living processes whose environment holds the marker with this value."""
    wanted = f"{MARKER}={mark}".encode()
    found = []
    for pid in _pids():
        with contextlib.suppress(OSError):
            if wanted in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                found.append(pid)
    return found


def _gone(pids: Iterable[int], seconds: float) -> list[int]:
    """Wait for processes to end; those that have not."""
    deadline = time.monotonic() + seconds
    left = []
    for pid in pids:
        try:
            handle = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        try:
            ends = select.poll()
            ends.register(handle, select.POLLIN)
            if not ends.poll(max(0.0, deadline - time.monotonic()) * 1000):
                left.append(pid)
        finally:
            os.close(handle)
    return left


def _command_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return "ended"


def _shared() -> set[str]:
    return set(os.listdir(SHARED)) if SHARED.is_dir() else set()


def _used() -> set[str]:
    """What of shared memory any process has mapped, open, or in its environment."""
    found: set[str] = set()
    name = re.compile(rf"{SHARED}/[^/\0\n]+")
    for pid in _pids():
        with contextlib.suppress(OSError):
            for source in ("maps", "environ"):
                found.update(name.findall(Path(f"/proc/{pid}/{source}").read_bytes().decode(errors="replace")))
            for handle in os.listdir(f"/proc/{pid}/fd"):
                found.update(name.findall(os.readlink(f"/proc/{pid}/fd/{handle}")))
    return found


def _pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]
