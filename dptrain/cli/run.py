"""``dptrain run``: here, among the workers of a launcher, or by starting one."""

import os
from pathlib import Path
from typing import Any, NamedTuple

from dptrain import launch
from dptrain.cli import terminal
from dptrain.cli.progress import Mode, observer


class Request(NamedTuple):
    """What the command line asks for."""

    job: Path | None = None
    sets: tuple[str, ...] = ()
    n: int | None = None
    run_dir: Path | None = None
    resume: bool = False
    progress: Mode = "auto"
    trace: Path | None = None

    def argv(self, place: bool = True) -> list[str]:
        """The arguments that ask for the same again, without ``-n``; ``place`` False leaves out what this run wrote."""
        argv = ["run"] + ([str(self.job)] if self.job is not None else [])
        for assignment in self.sets:
            argv += ["--set", assignment]
        if place and self.run_dir is not None:
            argv += ["--run-dir", str(self.run_dir)]
        if place and self.trace is not None:
            argv += ["--trace", str(self.trace)]
        return argv + (["--resume"] if place and self.resume else [])


def train(request: Request, place: launch.Announced, leader: Any) -> int:
    """Train as asked and return the exit code. Raises DptrainError."""
    if request.n is not None:
        launch.refuse_count(request.n, place)
    width = terminal.width(place)
    if request.n is not None and request.n > 1 and place.alone:
        return _start(request, width)
    if place.rank is None and request.n is None:
        launch.refuse_batch_shell(os.environ)
    from dptrain.job.load import load_job

    job = load_job(job_path(request.job), request.sets, os.environ)
    shown = observer(request.progress, width, _again(request, place))
    keywords = {"run_dir": request.run_dir, "resume": request.resume, "trace": request.trace, "observer": shown}
    try:
        if leader is None:
            from dptrain.ranks import alone

            alone(job, **keywords)
        else:
            leader.train(job, **keywords)
    finally:
        shown.close()
    return 0


def _start(request: Request, width: int | None) -> int:
    from dptrain.cli.mpirun import supervise
    from dptrain.job.load import load_job

    assert request.n is not None
    # A wrong key is told here, once, before anything is started.
    load_job(job_path(request.job), request.sets, os.environ)
    mode = request.progress if request.progress != "auto" else "plain" if width is None else "bar"
    argv, env = launch.command(request.n, request.argv(), os.environ)
    env["DPTRAIN_PROGRESS"] = mode
    return supervise(argv, env, launch.library())


def _again(request: Request, place: launch.Announced) -> list[str]:
    """The command line that began this run, without where it is kept."""
    started = place.size if place.rank is not None else None
    return ["dptrain", *request.argv(place=False), *(["-n", str(started)] if started else [])]


def job_path(path: Path | None) -> Path | None:
    """The job file that is meant where none is named: ./dptrain.toml if there is one, else the embedded job (None)."""
    here = Path("dptrain.toml")
    return here if path is None and here.exists() else path
