"""What a person sees of a run: a bar on a terminal, plain ``key=value`` lines elsewhere, and the closing lines.

Everything goes to stdout; warnings go to stderr where there is no bar.
"""

import io
import os
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TextIO, cast

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID

Mode = Literal["auto", "bar", "plain", "none"]

MODES: tuple[Mode, ...] = ("auto", "bar", "plain", "none")


def number(value: Any) -> str:
    """A value for a line: floats with four significant digits, large ones without a fraction."""
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def pairs(values: Mapping[str, Any]) -> str:
    """``key=value key=value``, leaving out what is None."""
    return " ".join(f"{key}={number(value)}" for key, value in values.items() if value is not None)


class Silent:
    """Shows the closing lines alone."""

    def __init__(self, out: TextIO, resume: Sequence[str]) -> None:
        self.out = out
        self.resume = resume
        self.run_dir = self.trace = ""

    def started(self, info: Mapping[str, Any]) -> None:
        """The run begins; see ``dptrain.train.Observer`` for the keys."""
        self.run_dir, self.trace = str(info.get("run_dir") or ""), str(info.get("trace") or "")

    def progressed(self, line: Mapping[str, Any]) -> None:
        """A line was written to the journal."""

    def warned(self, text: str) -> None:
        """Something a person should know, which does not end the run."""
        print(f"dptrain: {text}", file=sys.stderr, flush=True)

    def recovered(self, recovery: Mapping[str, Any]) -> None:
        """Workers died, and the others go on."""
        self.warned(survived(recovery))

    def finished(self, result: Mapping[str, Any]) -> None:
        """The run has ended, at its goal or because it was asked to."""
        print("\n".join(closing(result, self.run_dir, self.resume, self.trace)), file=self.out, flush=True)

    def close(self) -> None:
        """Leave the terminal as it was found; also after an error."""


class Plain(Silent):
    """One ``key=value`` line at the start, at most one a second, and one for every evaluation."""

    def __init__(
        self, out: TextIO, resume: Sequence[str], clock: Callable[[], float] = time.monotonic, every: float = 1.0
    ) -> None:
        super().__init__(out, resume)
        self.clock = clock
        self.every = every
        self._next = clock()

    def started(self, info: Mapping[str, Any]) -> None:
        """See Silent."""
        super().started(info)
        if info.get("succeeds"):
            return
        print(pairs(_heading(info)), file=self.out, flush=True)
        for note in info.get("notes") or ():
            self.warned(note)

    def progressed(self, line: Mapping[str, Any]) -> None:
        """See Silent."""
        now = self.clock()
        if now < self._next and not line.get("metrics"):
            return
        self._next = now + self.every
        shown = {"step": line.get("step"), "epoch": line.get("epoch"), "loss": line.get("loss")}
        shown |= {"lr": line.get("lr"), "samples/s": line.get("samples_per_second")}
        if "workers" in line:
            shown["workers"] = line["workers"]
        print(pairs(shown | evaluated(line)), file=self.out, flush=True)


class Bar(Silent):
    """One line of a terminal, drawn anew at most ten times a second, by the caller's own thread."""

    def __init__(
        self, out: TextIO, resume: Sequence[str], width: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        super().__init__(out, resume)
        self.width = width
        self.clock = clock
        self._next = clock()
        self._evaluated: dict[str, Any] = {}
        self._console: Console | None = None
        self._progress: Progress | None = None
        self._task: TaskID | None = None

    def started(self, info: Mapping[str, Any]) -> None:
        """See Silent."""
        from rich.console import Console

        super().started(info)
        # One column less: a full line would wrap on some terminals.
        self._console = Console(
            file=self.out, force_terminal=True, width=max(10, self.width - 1), highlight=False, soft_wrap=False
        )
        if not info.get("succeeds"):
            self._console.print(f"[bold]{info.get('name', 'job')}[/]  {pairs(_heading(info, name=False))}", markup=True)
            for note in info.get("notes") or ():
                self.warned(note)
        self._progress = _bar(self._console, self.width)
        self._task = self._progress.add_task(
            "", total=info.get("total_steps"), completed=int(info.get("step") or 0), epoch="", figures=""
        )
        self._progress.start()

    def progressed(self, line: Mapping[str, Any]) -> None:
        """See Silent."""
        self._evaluated = evaluated(line) or self._evaluated
        now = self.clock()
        if self._progress is None or self._task is None or now < self._next:
            return
        self._next = now + 0.1
        figures: dict[str, Any] = {"loss": line.get("loss")}
        if self.width >= 80:
            figures |= {key.replace("validation", "val"): value for key, value in self._evaluated.items()}
            figures.pop("val.loss", None)
        if self.width >= 100:
            figures["samples/s"] = line.get("samples_per_second")
        self._progress.update(
            self._task, completed=int(line["step"]), epoch=f"epoch {number(line.get('epoch'))}", figures=pairs(figures)
        )
        self._progress.refresh()

    def warned(self, text: str) -> None:
        """See Silent."""
        if self._console is None:
            super().warned(text)
        else:
            self._console.print(f"dptrain: {text}", style="yellow", markup=False)

    def finished(self, result: Mapping[str, Any]) -> None:
        """See Silent."""
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=int(result.get("steps") or 0))
        self.close()
        super().finished(result)

    def close(self) -> None:
        """See Silent."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


def _bar(console: "Console", width: int) -> "Progress":
    from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
    from rich.table import Column

    whole = Column(no_wrap=True)
    columns: list[ProgressColumn] = [
        BarColumn(bar_width=max(4, min(40, width // 4)), table_column=whole),
        TextColumn("{task.completed:.0f}/{task.total:.0f}", table_column=whole),
    ]
    if width >= 60:
        columns = [
            TextColumn("{task.fields[epoch]}", table_column=whole),
            *columns,
            TimeRemainingColumn(compact=True, table_column=whole),
        ]
    if width >= 40:
        rest = Column(no_wrap=True, overflow="ellipsis", ratio=1)
        columns.append(TextColumn("{task.fields[figures]}", table_column=rest))
    # Drawn by refresh() alone: a drawing thread would fight with the training for the interpreter.
    return Progress(
        *columns, console=console, auto_refresh=False, expand=True, redirect_stdout=False, redirect_stderr=False
    )


def _heading(info: Mapping[str, Any], name: bool = True) -> dict[str, Any]:
    keys = ("name",) * name + ("workers", "shards", "spares", "exchange", "parameters", "train_rows", "total_steps")
    shown = {key: info.get(key) for key in keys if key != "spares" or info.get(key)}
    if info.get("step"):
        shown["resumed_at"] = info["step"]
    return shown


def evaluated(line: Mapping[str, Any]) -> dict[str, Any]:
    """The figures of an evaluation in a journal line, under the names they are shown by."""
    return {f"validation.{key}": value for key, value in (line.get("metrics") or {}).items()}


def survived(recovery: Mapping[str, Any]) -> str:
    """One line on a recovery: who died, where, at which step, how long it took."""
    dead = []
    for entry in recovery["died"]:
        where = "" if entry.get("phase") is None else f" at step {entry['step']} in {entry['phase']}"
        dead.append(f"rank {entry['rank']} ({entry['host']}) {'hung' if entry.get('hung') else 'died'}{where}")
    left = "1 worker goes on" if recovery["workers"] == 1 else f"{recovery['workers']} workers go on"
    again = "; ".join(dead) or "the workers met anew"
    return f"{again}: {left} from step {recovery['step']} after {1000 * recovery['seconds']:.0f} ms"


def closing(result: Mapping[str, Any], run_dir: str, resume: Sequence[str], trace: str = "") -> list[str]:
    """The last lines of a run: what came out, and what to do with it.

    ``resume`` is the command line that began it, without ``--run-dir`` and ``--resume``.
    """
    metrics = result.get("metrics") or {}
    measured = metrics.get("test") or metrics.get("validation") or {}
    figures = {"steps": result.get("steps"), "epochs": result.get("epochs"), "loss": result.get("loss")}
    figures |= {key: value for key, value in measured.items() if key not in figures}
    figures["samples/s"] = result.get("samples_per_second")
    weights = str(result.get("weights_sha256", "")).removeprefix("sha256:")
    lines = [f"{pairs(figures)} weights sha256:{weights}"]
    if late := result.get("staleness"):
        bound = "" if late.get("bound") is None else f" of at most {late['bound']}"
        lines.append(f"staleness: mean {number(late['mean'])}, max {number(late['max'])}{bound} steps")
    if slow := result.get("slowest"):
        lines.append(
            f"slowest worker: rank {slow['rank']} ({slow['host']}), {slow['phase']} took {number(slow['times'])} times "
            "the workers' median"
        )
    if trace:
        lines.append(f"trace {shlex.quote(_short(trace))}; open it in ui.perfetto.dev")
    shown = shlex.quote(_short(run_dir)) if run_dir else ""
    if result.get("state") == "stopped":
        lines.append(
            f"stopped at step {result.get('steps')}; to resume: "
            + shlex.join([*resume, "--run-dir", _short(run_dir), "--resume"])
        )
    elif shown:
        again = f" or dptrain replay {shown}" if result.get("staleness") else ""
        lines.append(f"run {shown}; try: dptrain eval {shown}{again}")
    return lines


def _short(path: str) -> str:
    relative = os.path.relpath(path)
    return relative if not relative.startswith("..") else str(Path(path))


class Lasting(io.TextIOBase):
    """A stream whose reader may leave: a run goes on unseen when `| head` has read enough."""

    def __init__(self, out: TextIO) -> None:
        self.out = out

    def write(self, text: str) -> int:
        """See TextIOBase."""
        try:
            return self.out.write(text)
        except BrokenPipeError:
            self._lost()
            return len(text)

    def flush(self) -> None:
        """See TextIOBase."""
        try:
            self.out.flush()
        except BrokenPipeError:
            self._lost()

    def _lost(self) -> None:
        # What is buffered still goes out at the end of the process; it must find somebody.
        nobody = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nobody, self.out.fileno())
        os.close(nobody)


def observer(mode: Mode, width: int | None, resume: Sequence[str]) -> Silent:
    """The observer for a mode; ``width`` None means that stdout is no terminal."""
    out = cast(TextIO, Lasting(sys.stdout))
    if mode == "none":
        return Silent(out, resume)
    if mode == "bar" or (mode == "auto" and width is not None):
        return Bar(out, resume, width or 80)
    return Plain(out, resume)
