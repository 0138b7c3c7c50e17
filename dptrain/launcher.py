"""One launcher after the other: each with its workers from its start until none of its processes is left.

Whatever dies, nothing stays behind: the launcher ends with this process, its workers with the launcher
(:func:`dptrain.supervision.die_with_launcher`), orphans become this process's children and are ended, and all files
are in folders of its own.
"""

import contextlib
import ctypes
import json
import os
import select
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

from dptrain import scratch, supervision
from dptrain.launch import announced
from dptrain.lending import Loan
from dptrain.processes import children, process

REAPED = 10.0
"""Seconds after which an orphan that was killed must be gone."""

BEGUN = 120.0
"""Seconds in which a worker must be followed by the next, until all have begun."""

GRACE = 10.0
"""Seconds after which a launcher must have ended that has lost a worker before training, or all of its workers."""

_LOOK = 1.0
"""Seconds between looks at workers that have not begun."""

RECENT = 30.0
"""Seconds before the end of a launcher within which the end of a worker may be its cause."""

_REQUESTS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_PR_SET_CHILD_SUBREAPER = 36


class Start(NamedTuple):
    """The command line and environment of a launcher, and how many workers it starts on this machine.

    ``far``: they are on several hosts, so that nothing is known of them but what they tell; ``loan`` is what is lent
    them where those see no folder of this machine. It ends with the launch.
    """

    line: Sequence[str]
    env: Mapping[str, str]
    workers: int
    far: bool = False
    loan: Loan | None = None


class Outcome(NamedTuple):
    """What became of one launch: the launcher's code (-N where signal N ended it), and what its workers told.

    ``first`` are the ranks that ended first of those that ended shortly before the launcher. ``stuck`` says why it had
    to be ended, if so.
    """

    code: int
    first: Sequence[int]
    stuck: str
    run: Mapping[str, Any] | None
    failure: Mapping[str, Any] | None
    ended: Sequence[Mapping[str, Any]]

    @property
    def succeeded(self) -> bool:
        """Whether this launch, and no earlier one, wrote a result."""
        if self.run is None:
            return False
        path = Path(self.run["run_dir"]) / supervision.RESULT
        result = _json(path)
        states = ("done", "stopped")
        return supervision.identity(path) != self.run["result"] and result is not None and result["state"] in states


class Launcher:
    """Starts launchers for as long as it is entered; call it from the main thread.

    The first SIGINT, SIGTERM or SIGHUP asks the workers to finish their step and write a checkpoint, a second one
    ends them; ``requests`` counts them. ``tell`` shows a line to a person. ``shared`` is a folder that all hosts of the
    workers see, where those are several.
    """

    def __init__(self, tell: Callable[[str], None], shared: Path | None = None) -> None:
        self._tell, self._shared = tell, shared
        self._requests = _Requests()
        self._left = ExitStack()

    @property
    def requests(self) -> int:
        """How often this process was asked to stop."""
        return self._requests.count

    def __enter__(self) -> "Launcher":
        with ExitStack() as left:
            left.enter_context(self._requests.listening())
            self._folder, self._memory = left.enter_context(scratch.folders(self._shared))
            left.enter_context(_adopting_orphans())
            self._spared = frozenset(children(os.getpid()))
            left.callback(self._bury)
            self._left = left.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._left.close()

    def launch(self, start: Start) -> Outcome:
        """Start a launcher and wait for its end; afterwards no process of it is left."""
        with contextlib.nullcontext() if start.loan is None else contextlib.closing(start.loan):
            return self._launch(start)

    def _launch(self, start: Start) -> Outcome:
        for name in (supervision.RUN, supervision.FAILURE, supervision.ENDED, supervision.LOST, supervision.PRESENT):
            (self._folder / name).unlink(missing_ok=True)
        env = {**self._places(), **start.env, supervision.FOLDER: str(self._folder)}
        if start.far:
            # The launcher's own; each host's daemon keeps its files where that host does.
            env["TMPDIR"] = str(self._folder)
        if start.loan is not None:
            env |= start.loan.begin(self._folder)
        ours, told = os.getpid(), _Told(self._folder / supervision.ENDED)
        # A process group of its own: Ctrl-C in a terminal reaches mpirun once, through here.
        with subprocess.Popen(
            start.line,
            env=env,
            stdin=subprocess.DEVNULL,
            process_group=0,
            preexec_fn=lambda: supervision.die_with(ours),
        ) as process:
            self._requests.pass_to(process)
            try:
                first: Sequence[int] = ()
                if start.far:
                    stuck = self._wait_far(process, told)
                else:
                    with contextlib.closing(_Workers(self._folder, start.workers, process)) as workers:
                        first, stuck = workers.wait()
                code = process.wait()
            finally:
                self._requests.pass_to(None)
                process.kill()
        self._bury()
        scratch.sweep(self._folder)
        return Outcome(
            code,
            first,
            stuck,
            _json(self._folder / supervision.RUN),
            _json(self._folder / supervision.FAILURE),
            told.look() if start.far else _lines(self._folder / supervision.ENDED),
        )

    def _wait_far(self, process: "subprocess.Popen[bytes]", told: "_Told") -> str:
        """Return when a launcher over several hosts has ended, why it had to be where it had to."""
        until: float | None = time.monotonic() + BEGUN
        stuck = f"no worker began to train within {BEGUN:g} s"
        while until is None or time.monotonic() < until:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_LOOK)
                lost = _json(self._folder / supervision.LOST)
                return "" if lost is None else str(lost["error"])
            told.look()
            if (lost := _json(self._folder / supervision.LOST)) is not None:
                # The daemon of a host that nobody reaches is waited for by the launcher, and by nobody else.
                until, stuck = until or time.monotonic() + GRACE, str(lost["error"])
            elif (self._folder / supervision.RUN).exists():
                until = None
        process.kill()
        return stuck

    def pause(self, seconds: float) -> None:
        """Return after some time, or at once when this process is asked to stop."""
        self._requests.pause(seconds)

    def _places(self) -> dict[str, str]:
        """Where Open MPI keeps its files, which a launcher that is killed leaves behind."""
        if self._shared is not None:
            return {}
        places = {"PRTE_MCA_prte_tmpdir_base": str(self._folder), "PMIX_MCA_pmix_tmpdir_base": str(self._folder)}
        if self._memory is not None:
            places["OMPI_MCA_btl_sm_backing_directory"] = str(self._memory)
        return places

    def _bury(self) -> None:
        """End what became this process's child, and what becomes one by that."""
        until = time.monotonic() + REAPED
        while orphans := [pid for pid in children(os.getpid()) if pid not in self._spared]:
            for pid in orphans:
                with contextlib.suppress(PermissionError):
                    os.kill(pid, signal.SIGKILL)
            for pid in orphans:
                handle = os.pidfd_open(pid)
                try:
                    select.select([handle], [], [], max(0.0, until - time.monotonic()))
                finally:
                    os.close(handle)
                if os.waitpid(pid, os.WNOHANG) == (0, 0):
                    self._tell(f"process {pid} can't be ended and is left behind")
                    self._spared |= {pid}


class _Told:
    """A file of lines from several hosts, whose clocks may differ by hours: each has the time at which it came here."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._came: list[float] = []

    def look(self) -> list[dict[str, Any]]:
        """All that has come."""
        lines = _lines(self._path)
        self._came += [time.time()] * (len(lines) - len(self._came))
        return [{**line, "time": came} for line, came in zip(lines, self._came, strict=True)]


class _Workers:
    """Sees a launcher's workers begin and end, and ends a launcher that waits for nothing.

    With fault tolerance Open MPI's does that: where a worker dies within MPI_Init the others never come out of it.
    """

    def __init__(self, folder: Path, workers: int, process: "subprocess.Popen[bytes]") -> None:
        self._folder, self._workers, self._process = folder, workers, process
        self._pipe = os.open(folder / supervision.WORKERS, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        self._launcher = os.pidfd_open(process.pid)
        self._poll = select.poll()
        self._poll.register(self._pipe, select.POLLIN)
        self._poll.register(self._launcher, select.POLLIN)
        self._living: dict[int, int] = {}
        self._pids: set[int] = set()
        self._parent = 0
        self._ends: list[tuple[float, list[int]]] = []
        self._until: float | None = time.monotonic() + BEGUN

    def close(self) -> None:
        """Look no more."""
        for handle in (self._pipe, self._launcher, *self._living):
            os.close(handle)

    def wait(self) -> tuple[Sequence[int], str]:
        """Return when the launcher has ended: Outcome's ``first`` and ``stuck``."""
        stuck = ""
        while True:
            ready = [handle for handle, _ in self._poll.poll(self._patience())]
            if not ready and self._until is not None:
                if self._begun < self._workers:
                    self._look_for_unseen()
                if time.monotonic() >= self._until:
                    self._until = None
                    stuck = self._stuck()
                    if stuck:
                        self._process.kill()
            self._end([handle for handle in ready if handle in self._living])
            if self._pipe in ready:
                self._begin()
            if self._launcher in ready:
                recently = time.monotonic() - RECENT
                return next((ranks for at, ranks in self._ends if at > recently), ()), stuck

    def _patience(self) -> float | None:
        """Milliseconds until something has to be looked at."""
        if self._until is None:
            return None
        left = max(0.0, self._until - time.monotonic())
        return 1000 * (min(left, _LOOK) if self._begun < self._workers else left)

    def _begin(self) -> None:
        for pid in map(int, os.read(self._pipe, select.PIPE_BUF).split()):
            rank = _rank(pid)
            self._pids.add(pid)
            with contextlib.suppress(OSError):
                handle = os.pidfd_open(pid)
                found = process(pid)
                self._parent = 0 if found is None else found.parent
                self._living[handle] = rank
                self._poll.register(handle, select.POLLIN)
        if self._begun < self._workers:
            self._until = time.monotonic() + BEGUN
        else:
            # One may have ended before it was seen.
            self._until = None if len(self._living) == self._workers else time.monotonic() + GRACE

    def _look_for_unseen(self) -> None:
        """Where one of the workers ended before it could be seen, there is less to wait for."""
        if self._parent and self._until is not None:
            young = [pid for pid in children(self._parent) if pid not in self._pids and _runs(pid)]
            if self._begun + len(young) < self._workers:
                self._until = min(self._until, time.monotonic() + GRACE)

    @property
    def _begun(self) -> int:
        return len(self._pids)

    def _end(self, handles: Sequence[int]) -> None:
        if not handles:
            return
        self._ends.append((time.monotonic(), sorted(self._living[handle] for handle in handles)))
        for handle in handles:
            self._poll.unregister(handle)
            os.close(handle)
            del self._living[handle]
        if not self._opened or not self._left:
            self._until = time.monotonic() + GRACE

    @property
    def _left(self) -> list[int]:
        """The ranks of those that live, but for those that a watchdog killed and that don't end."""
        condemned = {line["rank"] for line in _lines(self._folder / supervision.ENDED)}
        return [rank for rank in self._living.values() if rank not in condemned]

    @property
    def _opened(self) -> bool:
        return (self._folder / supervision.RUN).exists()

    def _stuck(self) -> str:
        if self._begun < self._workers:
            return f"only {self._begun} of {self._workers} workers began, and waited for the others"
        if not self._left:
            kept = sorted(self._living.values())
            return f"{_named(kept)} can't be ended" if kept else "all workers had ended, and mpirun had not"
        if not self._opened:
            ranks = [rank for _, ranks in self._ends for rank in ranks]
            return f"{_named(ranks)} ended before training, and the others waited"
        return ""


class _Requests:
    """Counts the requests to stop, and passes them on to the launcher."""

    def __init__(self) -> None:
        self.count = 0
        self._process: subprocess.Popen[bytes] | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Within it, requests end nothing but what they are passed to."""
        self._wakes, self._wake = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        # Under nohup the end of the terminal is no request.
        numbers = [n for n in _REQUESTS if n is not signal.SIGHUP or signal.getsignal(n) is not signal.SIG_IGN]
        before = {number: signal.signal(number, self._note) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            os.close(self._wakes)
            os.close(self._wake)

    def pass_to(self, process: "subprocess.Popen[bytes] | None") -> None:
        """Requests are for this process from now on."""
        self._process = process
        if process is not None and self.count:
            process.kill()

    def pause(self, seconds: float) -> None:
        """Return after some time, or at once when there is a request."""
        select.select([self._wakes], [], [], seconds)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.count += 1
        with contextlib.suppress(BlockingIOError):
            os.write(self._wake, b"!")
        if self._process is not None:
            # Open MPI's mpirun kills its workers a quarter of a second after SIGINT or SIGTERM, but passes SIGUSR1
            # on, as Hydra does.
            self._process.send_signal(signal.SIGUSR1 if self.count == 1 else signal.SIGKILL)


@contextmanager
def _adopting_orphans() -> Iterator[None]:
    """Within it, processes whose parents end below this one become its children."""
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        yield
    finally:
        prctl(_PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


def _runs(pid: int) -> bool:
    found = process(pid)
    return found is not None and found.state not in "ZX"


def _rank(pid: int) -> int:
    """A worker's rank, as its launcher said it; -1 where that can't be known."""
    try:
        lines = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return -1
    rank = announced({name: value for name, _, value in (line.partition("=") for line in lines)}).rank
    return -1 if rank is None else rank


def _named(ranks: Sequence[int]) -> str:
    known = [str(rank) for rank in ranks if rank >= 0]
    return "a worker" if not known else f"rank {known[0]}" if len(known) == 1 else f"ranks {', '.join(known)}"


def _json(path: Path) -> Mapping[str, Any] | None:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def _lines(path: Path) -> list[Mapping[str, Any]]:
    """Those that are whole; the last may be on its way."""
    with contextlib.suppress(OSError):
        return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]
    return []
