"""``dptrain run``: here, among the workers of a launcher, or by starting one."""

import contextlib
import os
import shlex
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from dptrain import afar, launch, wanted
from dptrain.cli import terminal
from dptrain.cli.progress import Mode, observer
from dptrain.errors import LaunchError, UnreachableError, UsageError
from dptrain.hosts import Host, read, share, silent, spread
from dptrain.job.spec import Job, rebuild
from dptrain.lending import Loan
from dptrain.rsh import NODES


class Request(NamedTuple):
    """What the command line asks for."""

    job: Path | None = None
    sets: tuple[str, ...] = ()
    n: int | None = None
    run_dir: Path | None = None
    resume: bool = False
    progress: Mode = "auto"
    trace: Path | None = None
    max_restarts: int | None = None
    hostfile: Path | None = None
    workers_file: Path | None = None

    def argv(self, place: bool = True) -> list[str]:
        """The arguments that ask a worker for the same again; ``place`` False leaves out what this run wrote."""
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
    hosts: tuple[Host, ...] = ()
    if request.hostfile is not None:
        request, hosts = _placed(request, place)
    if request.workers_file is not None:
        request = _wanted(request, place)
    if request.n is not None:
        launch.refuse_count(request.n, place)
    if request.max_restarts is not None and (request.n is None or place.rank is not None):
        raise UsageError(
            "--max-restarts",
            expected="-n N outside of a launcher: whoever starts the workers supervises them",
            found="a launcher" if place.rank is not None else "no -n",
            cure="say `dptrain run -n N`, or leave it out and go on with --resume",
        )
    width = terminal.width(place)
    if request.n is not None and (request.n > 1 or hosts) and place.alone:
        return _start(request, width, hosts)
    if place.rank is None and _wants_server(request):
        return _start(request._replace(n=request.n or 1), width, hosts)
    if place.rank is None and request.n is None:
        launch.refuse_batch_shell(os.environ)
    if afar.reached():
        job = rebuild(Job, afar.launch()["job"])
    else:
        from dptrain.job.load import load_job

        job = load_job(job_path(request.job), request.sets, os.environ)
    again = _again(request, place)
    shown = observer(request.progress, width, again)
    keywords = {"run_dir": request.run_dir, "resume": request.resume, "trace": request.trace, "observer": shown}
    try:
        if leader is None:
            from dptrain.ranks import alone

            alone(job, **keywords)
        else:
            leader.train(job, **keywords, shown={"mode": request.progress, "width": width, "resume": again})
    finally:
        shown.close()
    return 0


def _placed(request: Request, place: launch.Announced) -> tuple[Request, tuple[Host, ...]]:
    """The request with a number of workers, and the hosts that are to have them. Raises UsageError."""
    assert request.hostfile is not None
    if place.rank is not None:
        raise UsageError(
            "--hostfile", expected="no launcher", found=place.launcher, cure="give the hosts to that launcher"
        )
    hosts = read(request.hostfile)
    slots = sum(host.slots for host in hosts)
    if request.n is not None and request.n > slots:
        raise UsageError(
            "-n", expected=f"at most {slots}, the slots in {request.hostfile}", found=str(request.n), cure="add slots"
        )
    return request._replace(n=slots if request.n is None else request.n), hosts


def _wanted(request: Request, place: launch.Announced) -> Request:
    """The request with the number of workers of its file, or the file with that of the request. Raises UsageError."""
    path = request.workers_file
    assert path is not None
    other = ""
    if request.hostfile is not None:
        other = "--hostfile"
    elif place.rank is not None:
        other = "a launcher"
    elif not _wants_server(request):
        other = "another"
    if other:
        raise UsageError(
            "--workers-file",
            expected='exchange.type = "ps" on this machine, whose workers come and go',
            found=other,
            cure="leave it out; a job over MPI takes another -n with --resume",
        )
    if request.n is None:
        found = wanted.read(path)
        if wanted.HERE not in found:
            raise UsageError(str(path), expected="a number of workers", found="nodes", cure="write one")
        return request._replace(n=found[wanted.HERE])
    try:
        path.write_text(wanted.text_of({wanted.HERE: request.n}))
    except OSError as error:
        raise UsageError(
            "--workers-file",
            expected="a file that can be written",
            found=f"{path}: {error.strerror}",
            cure="name another",
        ) from None
    return request


def _answering(
    hosts: tuple[Host, ...],
    environ: Mapping[str, str],
    first: bool,
    tell: Callable[[str], None],
    lend: Callable[[], Loan],
) -> tuple[list[Host], Loan | None]:
    """The hosts that can have workers: at first all must, after a fault those that are left. Raises LaunchError.

    Nodes of a server's may go at any time, and come again: UnreachableError where none is left of them. They need not
    see this folder: where one doesn't, what the workers need of it is lent to all.
    """
    served = NODES in environ
    apart: set[str] | None = set() if served else None
    wrong = silent(hosts, environ, Path.cwd(), apart=apart)
    loan = None
    if apart:
        loan = lend()
        wrong |= loan.bring([host for host in hosts if host.name not in wrong])
    left = [host for host in hosts if host.name not in wrong]
    if served and not left:
        if loan is not None:
            loan.close()
        raise UnreachableError(
            "; ".join(f"node {name}" for name in wrong),
            expected="to take workers",
            found="; ".join(wrong.values()),
            cure="remove the cause there; see whether `dptrain agent` runs",
        )
    first = first and not served
    if wrong and (first or not left):
        raise LaunchError(
            "; ".join(f"host {name}" for name in wrong),
            expected="an answer by the launch agent",
            found="; ".join(wrong.values()),
            cure="see whether it is up, its name is right, and it can be logged in to without a password",
        )
    for name, why in wrong.items():
        tell(f"host {name} is left out: {why}")
    return left, loan


def _start(request: Request, width: int | None, hosts: tuple[Host, ...]) -> int:
    from dptrain.job.load import NOT_KEYS, load_job
    from dptrain.launcher import Start
    from dptrain.supervise import MAX_RESTARTS, supervise

    n, environ = request.n, dict(os.environ)
    assert n is not None
    # A wrong key is told here, once, before anything is started.
    job = load_job(job_path(request.job), request.sets, environ)
    exchange = job.exchange
    standbys = int(exchange.standby)
    servers = 0 if exchange.type != "ps" else exchange.servers + standbys
    if servers and hosts and (NODES not in environ or servers > 1):
        several = NODES in environ
        raise UsageError(
            "--hostfile",
            expected="one parameter server" if several else "an exchange over MPI",
            found=f"{servers}" if several else 'exchange.type = "ps", which no launch agent starts',
            cure="leave exchange.servers and .standby out: where the server dies the job goes on from its checkpoint"
            if several
            else "start `dptrain param-server` and, on each host, `dptrain worker --server ADDRESS`",
        )
    source = Path(job.directory, job.data.source).resolve()
    data = str(source) if source.exists() else ""
    mode = request.progress if request.progress != "auto" else "plain" if width is None else "bar"
    environ["DPTRAIN_PROGRESS"] = mode
    if request.hostfile is not None:
        # For the line that tells how to go on.
        environ["DPTRAIN_HOSTFILE"] = str(request.hostfile)
    keyless = {
        name: value
        for name, value in environ.items()
        if not name.startswith("DPTRAIN_") or name.removeprefix("DPTRAIN_") in NOT_KEYS
    }
    ours = request.run_dir is not None and not _taken(request.run_dir)
    started = False

    def start(run_dir: Path | None) -> Start:
        nonlocal started
        again = request
        if run_dir is not None:
            # What was edited meanwhile must not change the job.
            again = request._replace(job=run_dir / "job.toml", sets=(), run_dir=run_dir, resume=True)
        elif started and ours:
            # What is in there by now is this run's, whether or not a worker lived to say so.
            again = request._replace(resume=True)
        first, started = not started, True
        said = environ if run_dir is None else keyless
        if servers and hosts:
            assert request.hostfile is not None
            # It may name others by now.
            there = hosts if first else read(request.hostfile)
            count = n if first else sum(host.slots for host in there)
            watched = request.hostfile.resolve()
            return Start(launch.crew_over_nodes(spread(count, there), data, again.argv()[1:], watched), said, servers)
        if servers:
            # One worker alone has nothing to be late with.
            together = exchange.host_sum and exchange.in_step
            file = None if request.workers_file is None else request.workers_file.resolve()
            line = launch.crew(n, exchange.servers, standbys, again.argv()[1:], together=together, watched=file)
            return Start(line, said, servers)
        if not hosts:
            return Start(*launch.command(n, again.argv(), said, live=mode == "bar"), n)

        def lend() -> Loan:
            nonlocal again
            if request.trace is not None:
                raise UsageError(
                    "--trace", expected="nodes that see this folder", found="some that don't", cure="leave it out"
                )
            lent = job if run_dir is None else load_job(run_dir / "job.toml", (), keyless)
            again = Request(run_dir=again.run_dir or _run_dir(lent, request.resume), resume=again.resume)
            assert again.run_dir is not None
            return Loan(lent, again.run_dir, environ)

        left, loan = _answering(hosts, environ, first, tell, lend)
        workers = share(n, left)
        if workers < n:
            tell(f"going on with {workers} of {n} workers")
        apart = loan is not None
        line, env = launch.command(workers, again.argv(), said, live=mode == "bar", hosts=left, apart=apart)
        return Start(line, env, workers, far=True, loan=loan)

    def by_hand(run_dir: Path | None) -> str:
        again = request if run_dir is None else request._replace(run_dir=run_dir, resume=True)
        where = [] if request.hostfile is None else ["--hostfile", str(request.hostfile)]
        return shlex.join(["dptrain", *again.argv(), "-n", str(n), *where])

    def tell(text: str) -> None:
        if mode == "bar":
            _mend_terminal()
        print(f"dptrain: {text}", file=sys.stderr, flush=True)

    restarts = MAX_RESTARTS if request.max_restarts is None else request.max_restarts
    code = 1
    try:
        code = supervise(start, by_hand, tell, restarts, Path.cwd() if hosts and not servers else None)
    finally:
        if code and mode == "bar":
            _mend_terminal()
    return code


def _run_dir(job: Job, resume: bool) -> Path:
    """Where a run is kept that workers elsewhere write."""
    from dptrain import arithmetic

    # numpy would start threads, and this process forks.
    arithmetic.choose("native", 1)
    from dptrain import beginning

    return beginning.directory(job, None, resume=resume)


def _wants_server(request: Request) -> bool:
    """Whether the job, which is read here only where it could be, is one for a parameter server."""
    if request == Request(progress=request.progress) and not Path("dptrain.toml").exists():
        return os.environ.get("DPTRAIN_EXCHANGE__TYPE") == "ps"
    from dptrain.job.load import load_job

    return load_job(job_path(request.job), request.sets, os.environ).exchange.type == "ps"


def _taken(path: Path) -> bool:
    """Whether something is there before this run; it is a worker's to judge what."""
    try:
        return any(path.iterdir())
    except FileNotFoundError:
        return False
    except OSError:
        return True


def _mend_terminal() -> None:
    """Put a terminal in order on which a worker drew a bar when it died."""
    with contextlib.suppress(OSError):
        sys.stdout.write("\n\x1b[?25h")
        sys.stdout.flush()


def _again(request: Request, place: launch.Announced) -> list[str]:
    """The command line that began this run, without where it is kept."""
    started = place.size if place.rank is not None else None
    hostfile = os.environ.get("DPTRAIN_HOSTFILE") if started else None
    where = ["--hostfile", hostfile] if hostfile else []
    return ["dptrain", *request.argv(place=False), *(["-n", str(started)] if started else []), *where]


def job_path(path: Path | None) -> Path | None:
    """The job file that is meant where none is named: ./dptrain.toml if there is one, else the embedded job (None)."""
    here = Path("dptrain.toml")
    return here if path is None and here.exists() else path
