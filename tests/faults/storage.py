"""Disks that fail, fill up or lie, and checkpoints that are cut off, changed or half written."""

import errno
import functools
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np

from dptrain import checkpoint, rundir
from dptrain.checkpoint import MANIFEST, STATE, Snapshot
from dptrain.errors import CheckpointError
from dptrain.journal import read_steps
from dptrain.layout import Layout
from dptrain.state import State
from tests.faults import jobs
from tests.faults.fault import Fault, Outcome
from tests.faults.oracle import PROGRAM, Surroundings, judge, undisturbed

KIND = "storage"
ROOT = Path(__file__).resolve().parent.parent.parent

DEADLINE = 240.0
REFUSED = "expected to be written"
PASSED_OVER = "passed over: checkpoint"

LAYOUT = Layout([("a.W", (150, 100)), ("a.b", (100,)), ("b.W", (100, 7))], [("mean", (100,), 0.1)])
_STRETCH = 64
"""Bytes of which each bit is flipped in one fault."""


def faults(seed: int) -> Iterator[Fault]:
    """Without end: the enumerated ones in turn, one by one, between those that are drawn."""
    rng = random.Random(seed)
    enumerated = _enumerated()
    drawn = [
        partial(_fault, name, act)
        for name, act in (
            ("a damaged newest checkpoint", damaged),
            ("all checkpoints damaged", all_damaged),
            ("a crash at a call of a run", crash_in_a_run),
            ("a failing call", failing_call),
            ("a flush that the system refuses", failing_flush),
            ("a small disk", small_disk),
            ("a slow disk", slow_disk),
            ("checkpoints taken away", taken_away),
        )
        if act is not failing_flush or not strace_missing()
    ]
    while True:
        for make in drawn:
            some = next(enumerated, None)
            if some is not None:
                yield some
            yield make(rng.randrange(1 << 31))


def _fault(name: str, act: Callable[[Path, int], Outcome], seed: int) -> Fault:
    return Fault(KIND, f"{name}, seed {seed}", lambda folder: act(folder, seed))


def _enumerated() -> Iterator[Fault]:
    """Truncations, flipped bits and crashes of a save, each once, then from the beginning."""
    round_ = 0
    while True:
        again = f", round {round_}" if round_ else ""
        once = [*_truncations(), *_flips(), *_crashes()]
        # So that a short campaign sees some of each.
        random.Random(round_).shuffle(once)
        for name, act in once:
            yield Fault(KIND, name + again, act)
        round_ += 1


# Checkpoints that are damaged, read in this process: there are thousands of ways.

Act = tuple[str, Callable[[Path], Outcome]]


def snapshot(step: int) -> Snapshot:
    """A small state with everything in it, a function of ``step`` alone."""
    rng = np.random.default_rng(step)
    weights, momentum = (rng.standard_normal(n).astype(np.float32) for n in (LAYOUT.size, LAYOUT.parameters))
    return Snapshot.of(State(step, step, weights, (momentum,), 0), weights * 2, ("momentum",), {"note": "ä"})


@functools.cache
def _sizes() -> dict[str, int]:
    """The bytes of each file of a generation, and of the header of its tensors."""
    with tempfile.TemporaryDirectory() as folder:
        made = checkpoint.save(Path(folder), snapshot(2), LAYOUT)
        header = checkpoint.read_manifest(made)["header_bytes"]
        return {name: (made / name).stat().st_size for name in (STATE, MANIFEST)} | {"header": header}


def _truncations() -> Iterator[Act]:
    for name in (STATE, MANIFEST):
        yield f"{name} cut off at every 512 bytes", partial(truncated, name=name)


def _flips() -> Iterator[Act]:
    sizes = _sizes()
    for name, size in ((MANIFEST, sizes[MANIFEST]), (STATE, sizes["header"])):
        for lo in range(0, size, _STRETCH):
            hi = min(size, lo + _STRETCH)
            act = partial(flipped, name=name, lo=lo, hi=hi)
            yield f"each bit of bytes {lo} to {hi} of {name} flipped, one at a time", act


def truncated(folder: Path, *, name: str) -> Outcome:
    """The newest generation's file cut off at every 512 bytes: always the older one is gone on from."""

    def cuts(content: bytes) -> Iterator[tuple[str, bytes]]:
        yield from ((f"cut at {length}", content[:length]) for length in range(0, len(content), 512))

    return _read_damaged(folder, name, cuts, f"truncated {name}")


def flipped(folder: Path, *, name: str, lo: int, hi: int) -> Outcome:
    """The newest generation's file with one bit flipped: never is anything else than what was saved gone on from."""

    def flips(content: bytes) -> Iterator[tuple[str, bytes]]:
        for i in range(lo, hi):
            for bit in range(8):
                changed = bytearray(content)
                changed[i] ^= 1 << bit
                yield f"bit {bit} of byte {i}", bytes(changed)

    return _read_damaged(folder, name, flips, f"flipped bits in {name}")


def _read_damaged(folder: Path, name: str, ways: Callable[[bytes], Iterator[tuple[str, bytes]]], phase: str) -> Outcome:
    checkpoint.save(folder, snapshot(1), LAYOUT)
    newest = checkpoint.save(folder, snapshot(2), LAYOUT)
    whole = (newest / name).read_bytes()
    for what, content in ways(whole):
        (newest / name).write_bytes(content)
        said: list[str] = []
        try:
            found = checkpoint.newest(folder, lambda path: checkpoint.read(path, LAYOUT), said.append)
        except Exception as error:
            return Outcome("wrong error", phase, note=f"{what}: {type(error).__name__}: {error}")
        step = None if found is None else found.manifest.get("step")
        if found is None or step not in (1, 2) or not same(found, snapshot(step)):
            return Outcome("wrong hash", phase, note=f"{what}: {found}")
        if step == 1:
            if len(said) != 1 or str(newest) not in said[0]:
                return Outcome("wrong error", phase, note=f"{what}: said {said}")
            newest.with_name(f"broken-{newest.name}").rename(newest)
        elif said:
            return Outcome("wrong error", phase, note=f"{what}: said {said} of a whole one")
    (newest / name).write_bytes(whole)
    if not same(checkpoint.read(newest, LAYOUT), snapshot(2)):
        return Outcome("wrong hash", phase, note="the whole one")
    return Outcome("survived", phase)


def same(read: Snapshot, saved: Snapshot) -> bool:
    """The same bits, and all of what was saved in the manifest that was read."""
    bits = {name: (vector.dtype, vector.tobytes()) for name, vector in read.groups.items()}
    truth = {name: (vector.dtype, vector.tobytes()) for name, vector in saved.groups.items()}
    return bits == truth and saved.manifest.items() <= read.manifest.items()


# Crashes of a save: a process that is killed before one of its system calls.

SAVER = """
import sys
from pathlib import Path
from tests.faults.storage import LAYOUT, checkpoint, snapshot
folder, step = Path(sys.argv[1]), int(sys.argv[2])
state = snapshot(step)
checkpoint.save(folder, state, LAYOUT)
checkpoint.prune(folder, 3)
"""
_CALLS = "%file,%desc"
_STEPS = {"a new generation": 4, "a generation that is there": 3}


@functools.cache
def strace_missing() -> str:
    """Why strace can't be used here; "" where it can."""
    if shutil.which("strace") is None:
        return "strace is not installed"
    tried = subprocess.run(["strace", "-qq", "-o", "/dev/null", "true"], capture_output=True, text=True, check=False)
    return "" if tried.returncode == 0 else f"strace is not allowed here: {tried.stderr.strip()}"


def _saver(folder: Path, step: int, log: Path, *more: str) -> "subprocess.CompletedProcess[str]":
    line = ["strace", "-qq", "-o", str(log), "-e", f"trace={_CALLS}", *more, sys.executable, "-B", "-c", SAVER]
    # The same calls each time: nothing that the order of a set, or a thread, could change.
    fixed = {"PYTHONHASHSEED": "0", "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [*line, str(folder), str(step)],
        env=os.environ | fixed,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
    )


def _filled(folder: Path) -> Path:
    """A folder with the generations 1, 2 and 3, always with a name of the same length."""
    made = folder / "checkpoints"
    for step in (1, 2, 3):
        checkpoint.save(made, snapshot(step), LAYOUT)
    return made


@functools.cache
def calls(step: int) -> list[tuple[str, int]]:
    """The system calls on files that saving ``step`` makes, each with its number among those of its name."""
    with tempfile.TemporaryDirectory(prefix="calls-") as name:
        folder = Path(name)
        done = _saver(_filled(folder), step, folder / "log")
        if done.returncode:
            raise RuntimeError(done.stderr)
        lines = (folder / "log").read_text().splitlines()
    counts: dict[str, int] = {}
    found: list[tuple[str, int]] = []
    last = max(i for i, line in enumerate(lines) if str(folder) in line)
    for line in lines[: last + 2]:
        call = line.partition("(")[0]
        counts[call] = counts.get(call, 0) + 1
        if found or ".writing-" in line:
            found.append((call, counts[call]))
    return found


def _crashes() -> Iterator[Act]:
    missing = strace_missing()
    if missing:
        print(f"no crashes between the calls of a save, no flushes refused by the system: {missing}", file=sys.stderr)
        return
    for what, step in _STEPS.items():
        for i in range(len(calls(step))):
            yield f"crash before call {i} of saving {what}", partial(crashed, step=step, index=i)


def crashed(folder: Path, *, step: int, index: int) -> Outcome:
    """A save that is killed before one of its calls leaves whole generations only, and none less."""
    phase = "crash in a save"
    call, number = calls(step)[index]
    made = _filled(folder)
    done = _saver(made, step, folder / "log", "-e", f"inject={call}:signal=KILL:when={number}")
    where = f"{call} number {number}"
    if done.returncode != -signal.SIGKILL:
        return Outcome("no verdict", phase, note=f"{where} was not reached: {done.returncode} {done.stderr}")
    said: list[str] = []
    try:
        found = checkpoint.newest(made, lambda path: checkpoint.read(path, LAYOUT), said.append)
    except CheckpointError as error:
        return Outcome("wrong error", phase, note=f"{where}: {error}")
    if said:
        return Outcome("wrong error", phase, note=f"{where}: {said}")
    if found is None or found.manifest["step"] < 3 or not same(found, snapshot(found.manifest["step"])):
        return Outcome("wrong hash", phase, note=f"{where}: {found}")
    checkpoint.clean(made)
    after = {path.name for path in made.iterdir()}
    steps = sorted(int(name[5:]) for name in after if re.fullmatch(r"step-\d{10}", name))
    if len(steps) != len(after) or steps not in ([1, 2, 3], [1, 2, 3, 4], [2, 3, 4]):
        return Outcome("leftover", phase, note=f"{where}: {sorted(after)}")
    checkpoint.save(made, snapshot(5), LAYOUT)
    checkpoint.prune(made, 3)
    whole = [checkpoint.read(path, LAYOUT).manifest["step"] for path in checkpoint.generations(made)]
    if len(whole) != 3 or whole[0] != 5 or len(list(made.iterdir())) != 3:
        return Outcome("leftover", phase, note=f"{where}: {whole}")
    return Outcome("survived", phase)


# Whole jobs.


class Run:
    """A job in a folder of its own, run by one process or several, again and again."""

    def __init__(self, folder: Path, job: jobs.FaultJob, workers: int = 0) -> None:
        self.place = Surroundings(folder)
        self.job, self.workers = job, workers
        self.run_dir = folder / "run"
        self.checkpoints = self.run_dir / rundir.CHECKPOINTS
        (folder / "job.toml").write_text(job.text)

    def line(self, *more: str, resume: bool = False) -> list[str]:
        """The arguments of dptrain."""
        n = ["-n", str(self.workers)] if self.workers > 1 else []
        again = ["--resume"] if resume else []
        return ["run", "job.toml", "--run-dir", str(self.run_dir), "--progress", "none", *n, *again, *more]

    def until(self, step: int) -> None:
        """Train the first steps."""
        ended = self.place.run([*PROGRAM, *self.line("--set", f"train.steps={step}")], DEADLINE)
        if ended.code != 0:
            raise RuntimeError(f"an undisturbed part of a job failed: {ended.said}")
        # As if it had been stopped there.
        (self.run_dir / rundir.RESULT).unlink()

    def resumed(self, phase: str, said: str = "") -> Outcome:
        """Go on undisturbed to the end, and be judged by it."""
        ended = self.place.run([*PROGRAM, *self.line(resume=True)], DEADLINE)
        return judge(self.place, ended, self.run_dir, undisturbed(self.job.text), phase=phase, said=said)


Damage = Callable[[Path, random.Random], str]


def _cut(generation: Path, rng: random.Random) -> str:
    path = generation / rng.choice((STATE, MANIFEST))
    length = rng.randrange(0, path.stat().st_size)
    os.truncate(path, length)
    return f"{path.name} cut at {length}"


def _flip(generation: Path, rng: random.Random) -> str:
    path = generation / rng.choice((STATE, STATE, MANIFEST))
    content = bytearray(path.read_bytes())
    # The space before a value may become nothing else, but a letter of a number may change its case.
    at = rng.choice([i for i, byte in enumerate(content) if path.name == STATE or byte not in b"eE"])
    content[at] ^= 1 << rng.randrange(8)
    path.write_bytes(content)
    return f"a bit of byte {at} of {path.name}"


def _zero(generation: Path, rng: random.Random) -> str:
    """A page of zeros, as a disk leaves that was told of a file's length and not yet of its content."""
    path = generation / STATE
    content = bytearray(path.read_bytes())
    at = rng.randrange(0, len(content), 4096)
    content[at : at + 4096] = bytes(len(content[at : at + 4096]))
    path.write_bytes(content)
    return f"zeros from byte {at}"


def _append(generation: Path, rng: random.Random) -> str:
    path = generation / rng.choice((STATE, MANIFEST))
    with path.open("ab") as file:
        file.write(b"x" * rng.randrange(1, 2000))
    return f"more at the end of {path.name}"


def _remove(generation: Path, rng: random.Random) -> str:
    path = generation / rng.choice((STATE, MANIFEST))
    path.unlink()
    return f"no {path.name}"


def _folder(generation: Path, rng: random.Random) -> str:
    path = generation / rng.choice((STATE, MANIFEST))
    path.unlink()
    path.mkdir()
    return f"a folder called {path.name}"


def _swap(generation: Path, rng: random.Random) -> str:
    """The tensors of another generation: a manifest and a state that are both whole."""
    other = checkpoint.generations(generation.parent)[-1]
    shutil.copyfile(other / STATE, generation / STATE)
    return f"the tensors of {other.name}"


def _empty(generation: Path, rng: random.Random) -> str:
    shutil.rmtree(generation)
    generation.mkdir()
    return "an empty folder"


DAMAGES: tuple[Damage, ...] = (_cut, _flip, _zero, _append, _remove, _folder, _swap, _empty)


def damaged(folder: Path, seed: int) -> Outcome:
    """The newest generations are damaged between two parts of a run: an older one is gone on from, aloud."""
    rng = random.Random(seed)
    run = Run(folder, jobs.choose(rng), rng.choice((0, 0, 0, 2)))
    run.until(rng.randrange(20, run.job.steps - 1))
    some = checkpoint.generations(run.checkpoints)[: rng.choice((1, 2))]
    what = [rng.choice(DAMAGES)(generation, rng) for generation in some]
    outcome = run.resumed("damaged checkpoint", PASSED_OVER)
    return Outcome(outcome.verdict, outcome.phase, note=f"{what}\n{outcome.note}" if outcome.note else "")


def all_damaged(folder: Path, seed: int) -> Outcome:
    """All generations are damaged: the run says so and leaves them alone; with one of them back it goes on."""
    rng = random.Random(seed)
    run = Run(folder, jobs.choose(rng))
    run.until(rng.randrange(20, run.job.steps - 1))
    kept = folder / "kept"
    shutil.copytree(run.checkpoints, kept)
    for generation in checkpoint.generations(run.checkpoints):
        # A copy of another's tensors can't be damaged in turn.
        rng.choice([damage for damage in DAMAGES if damage is not _swap])(generation, rng)
    ended = run.place.run([*PROGRAM, *run.line(resume=True)], DEADLINE)
    phase = "all checkpoints damaged"
    refusal = r"expected one that can be read, found 3 broken ones"
    truth = undisturbed(run.job.text)
    outcome = judge(run.place, ended, run.run_dir, truth, phase=phase, refusal=refusal, must_fail=True)
    if not outcome.good:
        return outcome
    shutil.rmtree(run.checkpoints)
    shutil.copytree(kept, run.checkpoints)
    after = run.resumed(phase)
    return outcome if after.good else after


# Runs whose calls on files fail. The faulty call stands in for the system's in one process, counted over all threads.

FAILING = """
import os, shutil, signal, sys
name, code, first, last = sys.argv[1], *map(int, sys.argv[2:5])
sys.argv[1:5] = []
real, count, refused = getattr(os, name), 0, set()

def failing(*arguments, **keywords):
    global count
    handle, within = arguments[0], keywords.get("dir_fd")
    path = os.readlink(f"/proc/self/fd/{handle}") if isinstance(handle, int) else os.fspath(handle)
    if within is not None:
        path = os.path.join(os.readlink(f"/proc/self/fd/{within}"), path)
    if "/run/" not in os.path.abspath(path) + "/":
        return real(*arguments, **keywords)
    count += 1
    if name == "fsync" and path in refused and not os.path.isdir(path):
        print(f"fsync again: {path}", file=sys.stderr, flush=True)
    if first <= count <= last:
        refused.add(path)
        if not code:
            os.kill(os.getpid(), signal.SIGKILL)
        raise OSError(code, os.strerror(code))
    return real(*arguments, **keywords)

setattr(os, name, failing)
from dptrain.cli.main import main
main()
"""
_FOREVER = 10**9


def _failing(name: str, code: int, first: int, last: int) -> list[str]:
    """A dptrain in which calls of the function ``name`` of os fail with ``code``, or kill it where that is 0."""
    return [sys.executable, "-P", "-c", FAILING, name, str(code), str(first), str(last)]


_PER_CHECKPOINT = {
    "fsync": 4, "posix_fallocate": 2, "write": 15, "rename": 2, "mkdir": 1, "preadv": 3, "unlink": 2, "rmdir": 1,
    "replace": 0,
}  # fmt: skip
"""About how often a run calls them; journal lines are written too. The run's own few files are replaced."""


def _some_calls(rng: random.Random, name: str, job: jobs.FaultJob) -> tuple[int, int]:
    """The first and the last of the calls that fail: one, some, or all from then on."""
    few = _PER_CHECKPOINT[name] == 0 or rng.random() < 0.2
    first = rng.randrange(1, 5 if few else job.steps // 10 * _PER_CHECKPOINT[name])
    return first, rng.choice((first, first, first + rng.randrange(1, 20), _FOREVER))


def failing_call(folder: Path, seed: int) -> Outcome:
    """A call fails once, for some time, or from then on: the run goes on, or refuses; then it can be resumed."""
    rng = random.Random(seed)
    run = Run(folder, jobs.choose(rng))
    name, code = rng.choice(
        (
            ("fsync", errno.EIO),
            ("fsync", errno.EIO),
            ("fsync", errno.ENOSPC),
            ("posix_fallocate", errno.ENOSPC),
            ("write", errno.ENOSPC),
            ("write", errno.EIO),
            ("rename", errno.EIO),
            ("replace", errno.EIO),
            ("mkdir", errno.ENOSPC),
            ("preadv", errno.EIO),
        )
    )
    first, last = _some_calls(rng, name, run.job)
    ended = run.place.run([*_failing(name, code, first, last), *run.line()], DEADLINE)
    truth = undisturbed(run.job.text)
    outcome = judge(run.place, ended, run.run_dir, truth, phase=f"{errno.errorcode[code]} of {name}", refusal=REFUSED)
    what = f"{name} {first} to {last}"
    if outcome.good and "fsync again" in ended.err:
        outcome = Outcome("wrong error", outcome.phase, note=ended.said)
    if outcome.verdict == "refused":
        after = run.resumed(outcome.phase)
        outcome = outcome if after.good else after
    return Outcome(outcome.verdict, outcome.phase, note=f"{what}\n{outcome.note}" if not outcome.good else "")


def failing_flush(folder: Path, seed: int) -> Outcome:
    """As a failing call of fsync, but refused by the system itself, at the same place of every checkpoint."""
    rng = random.Random(seed)
    run = Run(folder, jobs.choose(rng))
    phase = "EIO of fsync, by strace"
    # Each thread has its own count, and each checkpoint its own thread.
    inject = f"inject=fsync:error=EIO:when={rng.choice(('1', '2', '3', '4', '4+', '5', '6', '7', '9'))}"
    log = folder / "log"
    strace = ["strace", "-f", "-qq", "-y", "-o", str(log), "-e", "trace=fsync", "-e", inject]
    ended = run.place.run([*strace, *PROGRAM, *run.line()], DEADLINE)
    outcome = judge(run.place, ended, run.run_dir, undisturbed(run.job.text), phase=phase, refusal=REFUSED)
    flushes = re.findall(r"fsync\(\d+<(.*?)>\) += (-?\d+)", log.read_text())
    refused = {path for path, result in flushes if result != "0"}
    again = [path for path in refused if [one for one, _ in flushes].count(path) > 1 and not _is_folder(path)]
    if outcome.good and again:
        return Outcome("wrong error", phase, note=f"{inject}: flushed again: {again}")
    if outcome.good and not refused:
        return Outcome("no verdict", phase, note=f"{inject}: nothing was refused")
    if outcome.verdict == "refused":
        after = run.resumed(phase)
        outcome = outcome if after.good else after
    return Outcome(outcome.verdict, phase, note=f"{inject}\n{outcome.note}" if not outcome.good else "")


def _is_folder(path: str) -> bool:
    """Of files that may be gone: a new one is flushed under the name of a file within, a folder under its own."""
    return Path(path).name not in (STATE, MANIFEST) and not re.match(
        r"\.writing-.*\.(json|toml|safetensors)-", Path(path).name
    )


def crash_in_a_run(folder: Path, seed: int) -> Outcome:
    """A run is killed at one of its calls on files, and goes on from what it left."""
    rng = random.Random(seed)
    run = Run(folder, jobs.choose(rng))
    name = rng.choice(("fsync", "posix_fallocate", "write", "rename", "replace", "unlink", "rmdir"))
    first, _ = _some_calls(rng, name, run.job)
    started = run.place.run([*_failing(name, 0, first, _FOREVER), *run.line()], DEADLINE)
    phase = f"crash at {name}"
    if started.code not in (0, -signal.SIGKILL):
        return Outcome("wrong code", phase, note=started.said)
    outcome = run.resumed(phase)
    return Outcome(outcome.verdict, phase, note=f"{name} {first}\n{outcome.note}" if not outcome.good else "")


SMALL = """
mount -t tmpfs -o size=$1k none run && shift || exit 77
"$@"
code=$?
mkdir seen && cp -a run/. seen/ && exit $code
"""


def unshare() -> list[str]:
    """The command that gives a process mounts of its own; empty where that is not allowed."""
    for line in (["unshare", "-m"], ["unshare", "-Urm"]):
        if shutil.which("unshare") is None:
            break
        tried = subprocess.run([*line, "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True, check=False)
        if tried.returncode == 0:
            return line
    return []


def small_disk(folder: Path, seed: int) -> Outcome:
    """The run directory lies on a disk that is too small at some point; with more room the run goes on."""
    rng = random.Random(seed)
    run = Run(folder, jobs.choose(rng))
    phase = "full disk"
    private = unshare()
    if not private:
        # The same by way of what the calls say.
        ended = run.place.run(
            [*_failing("posix_fallocate", errno.ENOSPC, rng.randrange(1, 130), _FOREVER), *run.line()], DEADLINE
        )
        outcome = judge(run.place, ended, run.run_dir, undisturbed(run.job.text), phase=phase, refusal=REFUSED)
        return outcome if outcome.verdict != "refused" or (after := run.resumed(phase)).good else after
    run.run_dir.mkdir()
    # From less than the first files to as much as all of it needs.
    kilobytes = rng.choice((8, 16, 200, 300, 400, 500, 600, 700, 800, 900, 1200)) + rng.randrange(0, 100, 4)
    line = [*private, "sh", "-c", SMALL, "sh", str(kilobytes), *PROGRAM, *run.line()]
    ended = run.place.run(line, DEADLINE)
    seen = folder / "seen"
    if ended.code == 77 or not seen.is_dir():
        return Outcome("no verdict", phase, note=ended.said)
    # What was on the small disk is now on a larger one.
    run.run_dir.rmdir()
    seen.rename(run.run_dir)
    truth = undisturbed(run.job.text)
    outcome = judge(run.place, ended, run.run_dir, truth, phase=phase, refusal=f"{REFUSED}|No space left")
    if outcome.verdict == "refused":
        after = run.resumed(phase)
        outcome = outcome if after.good else after
    return Outcome(outcome.verdict, phase, note=f"{kilobytes} KiB\n{outcome.note}" if not outcome.good else "")


SLOW = """
import os, sys, threading
seconds = float(sys.argv.pop(1))
real = os.fsync

def slow(handle):
    threading.Event().wait(seconds)
    real(handle)

os.fsync = slow
from dptrain.cli.main import main
main()
"""


def slow_disk(folder: Path, seed: int) -> Outcome:
    """A disk that takes its time, with checkpoints by the clock: steps don't wait for it, and the hash is the same."""
    rng = random.Random(seed)
    run = Run(folder, jobs.choose(rng))
    seconds = rng.choice((0.01, 0.05, 0.3))
    by_time = ["--set", "output.checkpoint_steps=0", "--set", "output.checkpoint_seconds=0.02"]
    ended = run.place.run([sys.executable, "-P", "-c", SLOW, str(seconds), *run.line(*by_time)], DEADLINE)
    outcome = judge(run.place, ended, run.run_dir, undisturbed(run.job.text), phase="slow disk")
    lines = read_steps(run.run_dir / rundir.JOURNAL)
    waited = max((line["phases"].get("checkpoint", [0.0])[0] for line in lines), default=0.0)
    if outcome.good and seconds > 0.1 and waited > seconds / 2:
        return Outcome("wrong error", outcome.phase, note=f"a step waited {waited} s for a disk of {seconds} s a flush")
    return outcome


def taken_away(folder: Path, seed: int) -> Outcome:
    """Something else stands where checkpoints go: training goes on, says so, and the run can be resumed."""
    rng = random.Random(seed)
    run = Run(folder, jobs.choose(rng))
    phase = "checkpoints taken away"
    truth = undisturbed(run.job.text)
    run.until(rng.randrange(20, run.job.steps - 20))
    aside = folder / "aside"
    if rng.random() < 0.5:
        # No checkpoints: from the beginning.
        run.checkpoints.rename(aside)
        return run.resumed(phase)
    run.checkpoints.rename(aside)
    run.checkpoints.write_text("in the way")
    ended = run.place.run([*PROGRAM, *run.line(resume=True)], DEADLINE)
    said = "training goes on without a new checkpoint"
    outcome = judge(run.place, ended, run.run_dir, truth, phase=phase, refusal=REFUSED, said=said)
    if outcome.verdict != "refused":
        return outcome
    run.checkpoints.unlink()
    aside.rename(run.checkpoints)
    after = run.resumed(phase)
    return outcome if after.good else after
