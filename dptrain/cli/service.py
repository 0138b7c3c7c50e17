"""``dptrain serve``, and the commands of its clients: submit, watch, end, and bring home.

Exit codes: 0 done, 1 the job failed or was cancelled, 2 usage or a bad job, 3 the server could not be reached, 130
detached from a job that goes on.
"""

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dptrain.cli import access
from dptrain.cli.access import Reach, asking
from dptrain.errors import DptrainError, UsageError
from dptrain.service.model import MOST_SECONDS

if TYPE_CHECKING:
    from dptrain.service.client import Client
    from dptrain.v1 import job_pb2, log_service_pb2

DETACHED = 130
_REFRESH = 1.0


class Output(StrEnum):
    """How things are printed."""

    table = "table"
    json = "json"


def complete_job(context: typer.Context, incomplete: str) -> list[tuple[str, str]]:
    """Jobs of the server that the line names which begin so, for a shell; none where there is no server."""
    from dptrain.service.client import Client
    from dptrain.wire.limits import Patience
    from dptrain.wire.security import ClientTls

    try:
        given = context.params
        token_file, tls_ca = given.get("token_file"), given.get("tls_ca")
        with Client(
            given.get("server"),
            token_file=token_file and Path(token_file),
            tls=ClientTls(Path(tls_ca)) if tls_ca else None,
            patience=Patience(call_seconds=2.0),
        ) as client:
            found = client.jobs(f"id={incomplete}" if incomplete.isalnum() else "", page_size=50)
            return [(job.id, job.spec.name) for job, _ in zip(found, range(50), strict=False)] + [("@latest", "")]
    except DptrainError:
        return []


Form = Annotated[Output, typer.Option("-o", "--output", help="A table, or JSON.")]
JobId = Annotated[
    str,
    typer.Argument(
        metavar="JOB", help="An ID, the beginning of one, or @latest.", autocompletion=complete_job, show_default=False
    ),
]


def serve(
    listen: Annotated[
        str, typer.Option("--listen", metavar="ADDRESS", help="HOST:PORT or unix:PATH; others than loopback need TLS.")
    ] = "127.0.0.1:7077",
    data: Annotated[
        Path, typer.Option("--data", metavar="DIR", help="Where jobs, runs, uploads and tokens are kept.")
    ] = Path("dptrain-server"),
    datasets: Annotated[
        Path | None, typer.Option("--datasets", metavar="DIR", help="Data that all jobs may read, besides uploads.")
    ] = None,
    slots: Annotated[
        int, typer.Option("--slots", metavar="N", min=0, help="Workers that run at a time. Default: one a core.")
    ] = 0,
    agents: Annotated[
        bool, typer.Option("--agents", help="Run jobs on the nodes of `dptrain agent`s, and none on this machine.")
    ] = False,
    tls_cert: access.TlsCert = None,
    tls_key: access.TlsKey = None,
    tls_clients: access.TlsClients = None,
    allow_code: Annotated[
        bool, typer.Option("--allow-code", help="Let jobs bring models in Python and environment variables.")
    ] = False,
    quota: Annotated[float, typer.Option("--quota", metavar="GB", min=0, help="Uploads of each owner.")] = 10.0,
    keep_days: Annotated[
        float, typer.Option("--keep-days", metavar="DAYS", min=0, help="Remove jobs that ended so long ago. 0: never.")
    ] = 0.0,
    keep_gb: Annotated[
        float, typer.Option("--keep-gb", metavar="GB", min=0, help="Remove the oldest beyond so much. 0: never.")
    ] = 0.0,
    resize_after: Annotated[
        float,
        typer.Option("--resize-after", metavar="SECONDS", min=0, help="Before a job has another number of workers."),
    ] = 30.0,
    job_memory: Annotated[
        float, typer.Option("--job-memory", metavar="GB", min=0, help="Of each process of a job. 0: no limit.")
    ] = 0.0,
    metrics: Annotated[
        str | None, typer.Option("--metrics", metavar="HOST:PORT", help="Answer Prometheus here (loopback only).")
    ] = None,
    page: Annotated[
        str | None, typer.Option("--page", metavar="HOST:PORT", help="Show jobs in a browser here (extra service).")
    ] = None,
) -> None:
    """Take jobs over gRPC, queue them, run them, and survive whatever happens. Jobs go on when this ends."""
    from dptrain.service import server
    from dptrain.service.runner import Limits
    from dptrain.wire import address

    options = server.Options(
        listen=address.parse(listen),
        data=data,
        slots=slots,
        agents=agents,
        shared=datasets,
        tls=access.server_tls(tls_cert, tls_key, tls_clients),
        allow_code=allow_code,
        quota=int(quota * 1e9),
        keep=(keep_days * 86400.0, int(keep_gb * 1e9)),
        settled=resize_after,
        metrics=None if metrics is None else address.parse(metrics),
        page=None if page is None else address.parse(page),
        job_limits=Limits(memory_bytes=int(job_memory * 1e9)),
    )
    from dptrain.cli.service_process import keep_serving

    keep_serving(options)


@asking
def submit(
    reach: Reach,
    job: Annotated[Path, typer.Argument(metavar="JOB.toml", help="The job file.", show_default=False)],
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Show its log until it ends.")] = False,
    workers: Annotated[
        str, typer.Option("-n", "--workers", metavar="N|A..B", help="How many workers, or a range.")
    ] = "1",
    name: Annotated[str, typer.Option("--name", help="Default: the job file's.")] = "",
    sets: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key of the job. Repeatable.")
    ] = None,
    label: Annotated[list[str] | None, typer.Option("--label", metavar="KEY=VALUE", help="Repeatable.")] = None,
    priority: Annotated[int, typer.Option("--priority", help="-100 to 100; higher comes first.")] = 0,
    retries: Annotated[
        int | None, typer.Option("--max-retries", min=0, help="Faults in a row without a newer checkpoint. Default: 3.")
    ] = None,
    seconds: Annotated[
        float, typer.Option("--max-seconds", min=0, max=MOST_SECONDS, help="End it after so much running. 0: never.")
    ] = 0,
    request_id: Annotated[
        str | None, typer.Option("--request-id", help="The same ID with the same job is one job, however often.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check all of it, submit nothing.")] = False,
    output: Form = Output.table,
) -> None:
    """Submit a job. When the command ends the job is on the server's disk."""
    from dptrain.cli.service_shown import as_json

    with reach.client() as client:
        found = client.submit(
            job,
            workers=workers,
            name=name,
            sets=sets or (),
            labels=_pairs(label or ()),
            priority=priority,
            max_retries=retries,
            max_duration=timedelta(seconds=seconds) if seconds else None,
            request_id=request_id,
            dry_run=dry_run,
        )
        if output is Output.json:
            print(as_json(found), flush=True)
        elif dry_run:
            print(f"{job}: fine, {found.spec.workers} workers")
        else:
            print(found.id, flush=True)
        if follow and not dry_run:
            raise typer.Exit(_follow(client, found.id, output))


@asking
def jobs(
    reach: Reach,
    everything: Annotated[bool, typer.Option("-a", "--all", help="Those that have ended too.")] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Show them again every second, until Ctrl-C.")] = False,
    filter_text: Annotated[
        str, typer.Option("--filter", metavar="TERMS", help="state=RUNNING name=TEXT label.KEY=VALUE owner=NAME")
    ] = "",
    order: Annotated[
        str, typer.Option("--order", metavar="KEY", help='created, updated or priority, with " asc" or " desc".')
    ] = "",
    limit: Annotated[int, typer.Option("--limit", metavar="N", min=1, help="At most so many.")] = 100,
    output: Form = Output.table,
) -> None:
    """List jobs, the newest first."""
    from itertools import islice

    from dptrain.cli.service_shown import all_as_json, jobs_table

    terms = filter_text if everything else f"active=true {filter_text}"
    with reach.client() as client:

        def shown() -> Any:
            pages = client.jobs(terms, order_by=order, page_size=min(limit, 1000), progress=True)
            found = list(islice(pages, limit))
            if output is Output.json:
                return all_as_json(found)
            return jobs_table(found, len({job.owner for job in found}) > 1)

        if watch and output is Output.table:
            _live(shown)
        elif output is Output.json:
            print(shown())
        else:
            console().print(shown())


@asking
def show(
    reach: Reach,
    job: JobId = "@latest",
    output: Form = Output.table,
) -> None:
    """Tell all of one job."""
    with reach.client() as client:
        _tell(client.job(job), output)


@asking
def logs(
    reach: Reach,
    job: JobId = "@latest",
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Until the job ends. Ctrl-C detaches.")] = False,
    rank: Annotated[int | None, typer.Option("--rank", min=0, help="Only this worker's lines.")] = None,
    since: Annotated[
        str, typer.Option("--since", metavar="10m|TIME", help="Only from then on: an age, or an ISO time.")
    ] = "",
    tail: Annotated[int, typer.Option("--tail", metavar="N", min=0, help="Only the last N lines. 0: all.")] = 0,
    output: Form = Output.table,
) -> None:
    """Show what a job printed. With -f the exit code is the job's: 0 done, 1 failed or cancelled."""
    with reach.client() as client:
        start = _moment(since) if since else None
        raise typer.Exit(_follow(client, job, output, follow=follow, rank=rank, since=start, tail=tail))


@asking
def wait(
    reach: Reach,
    job: JobId = "@latest",
    output: Form = Output.table,
) -> None:
    """Return when a job has ended, with its exit code: 0 done, 1 failed or cancelled."""
    with reach.client() as client:
        found = client.job(job)
        with _detachable(f"dptrain wait {found.id}"):
            found = client.wait(found.id)
        _tell(found, output, short=True)
        raise typer.Exit(_code(found.state))


@asking
def cancel(
    reach: Reach,
    job: JobId,
    grace: Annotated[
        float, typer.Option("--grace", metavar="SECONDS", min=0, max=MOST_SECONDS, help="For a last checkpoint.")
    ] = 30.0,
    output: Form = Output.table,
) -> None:
    """End a job; it writes a checkpoint within the grace."""
    with reach.client() as client:
        _tell(client.cancel(job, grace=timedelta(seconds=grace)), output, short=True)


@asking
def pause(
    reach: Reach,
    job: JobId,
    output: Form = Output.table,
) -> None:
    """Stop a job with a checkpoint, and give its slots to others."""
    with reach.client() as client:
        _tell(client.pause(job), output, short=True)


@asking
def resume(
    reach: Reach,
    job: JobId,
    output: Form = Output.table,
) -> None:
    """Queue a paused job again."""
    with reach.client() as client:
        _tell(client.resume(job), output, short=True)


@asking
def retry(
    reach: Reach,
    job: JobId,
    step: Annotated[
        int | None, typer.Option("--from-step", min=0, help="The checkpoint to go on from. Default: the newest.")
    ] = None,
    output: Form = Output.table,
) -> None:
    """Queue a failed or cancelled job again; it goes on from a checkpoint."""
    with reach.client() as client:
        _tell(client.retry(job, from_step=step), output, short=True)


@asking
def delete(
    reach: Reach,
    job: JobId,
    output: Form = Output.table,
) -> None:
    """Remove a job that has ended, with all of its files."""
    with reach.client() as client:
        found = client.job(job).id
        client.delete(found)
        if output is Output.json:
            print(json.dumps({"id": found}))


@asking
def metrics(
    reach: Reach,
    job: JobId = "@latest",
    names: Annotated[
        list[str] | None, typer.Option("--name", metavar="NAME", help='Such as loss or "metric.*". Repeatable.')
    ] = None,
    points: Annotated[int, typer.Option("--points", min=1, help="At most so many a curve.")] = 500,
    output: Form = Output.table,
) -> None:
    """Show a job's curves."""
    from dptrain.cli.service_shown import as_json, series_table

    with reach.client() as client:
        found = client.metrics(job, names or (), max_points=points)
        if output is Output.json:
            print(as_json(found))
        else:
            console().print(series_table(found))


@asking
def download(
    reach: Reach,
    job: JobId,
    to: Annotated[Path | None, typer.Argument(metavar="[DIR]", help="Default: ./JOB", show_default=False)] = None,
    path: Annotated[str, typer.Option("--path", help="One file of the run. Default: all but checkpoints.")] = "",
    checkpoints: Annotated[bool, typer.Option("--checkpoints", help="Checkpoints too.")] = False,
    output: Form = Output.table,
) -> None:
    """Bring a job's run home, for `dptrain eval`, `predict` and `export`. Every file is checked."""
    with reach.client() as client:
        found = client.job(job).id
        target = to or Path(found)
        if path:
            client.download(found, path, target / Path(path).name)
        else:
            client.download_run(found, target, checkpoints=checkpoints)
        print(json.dumps({"id": found, "path": str(target)}) if output is Output.json else target)


@asking
def upload(
    reach: Reach,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Data for jobs.", show_default=False)],
    name: Annotated[str, typer.Option("--name", help="What jobs call it in data.source. Default: the file's.")] = "",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace one of that name.")] = False,
    output: Form = Output.table,
) -> None:
    """Bring data to the server."""
    from dptrain.cli.service_shown import as_json

    with reach.client() as client:
        found = client.upload(file, name, overwrite=overwrite)
        print(as_json(found) if output is Output.json else f'{found.size} bytes: data.source = "{found.name}"')


@asking
def cluster(
    reach: Reach,
    output: Form = Output.table,
) -> None:
    """Say who the server is, and which machines it has."""
    from dptrain.cli.service_shown import all_as_json, nodes_table, pairs_table

    with reach.client() as client:
        info, nodes = client.info(), client.nodes()
        if output is Output.json:
            print(all_as_json([info, *nodes]))
            return
        counts = " ".join(f"{name.lower()}={count}" for name, count in sorted(info.jobs.items()))
        pairs = {"server": f"dptrain {info.version}", "you": f"{info.owner} ({info.role})", "jobs": counts}
        console().print(pairs_table(pairs), nodes_table(nodes), sep="\n\n")


COMMANDS: Sequence[tuple[Callable[..., None], str]] = (
    (serve, "dptrain serve --datasets /srv/data"),
    (submit, "dptrain submit job.toml -n 2..8 -f"),
    (jobs, "dptrain jobs -a --filter label.team=vision"),
    (show, "dptrain show @latest"),
    (logs, "dptrain logs -f 3k9"),
    (wait, "dptrain wait 3k9 && dptrain download 3k9"),
    (cancel, "dptrain cancel 3k9 --grace 10"),
    (pause, "dptrain pause 3k9"),
    (resume, "dptrain resume 3k9"),
    (retry, "dptrain retry 3k9 --from-step 400"),
    (delete, "dptrain delete 3k9"),
    (metrics, 'dptrain metrics 3k9 --name loss --name "metric.*"'),
    (download, "dptrain download 3k9 model && dptrain predict model --data x.npy --out y.npy"),
    (upload, "dptrain upload train.csv"),
    (cluster, "dptrain cluster"),
)


def register(app: typer.Typer) -> None:
    """Add the commands."""
    for command, example in COMMANDS:
        app.command(rich_help_panel="Service", epilog=f"Example: [bold]{example}[/]")(command)


def _follow(
    client: "Client",
    job: str,
    output: Output,
    *,
    follow: bool = True,
    rank: int | None = None,
    since: datetime | None = None,
    tail: int = 0,
) -> int:
    """Print a job's lines, and return the exit code that its end gives."""
    from dptrain.cli.service_shown import as_json, log_line
    from dptrain.v1 import log_service_pb2

    found = client.job(job).id
    code = 0
    with _detachable(f"dptrain logs -f {found}"):
        for item in client.logs(found, follow=follow, rank=rank, since=since, tail=tail):
            if output is Output.json:
                print(as_json(item), flush=True)
            elif isinstance(item, log_service_pb2.LogLine):
                stderr = item.stream == log_service_pb2.LOG_STREAM_STDERR
                print(log_line(item), file=sys.stderr if stderr else sys.stdout, flush=True)
            if isinstance(item, log_service_pb2.LogEnd) and follow:
                if output is Output.table:
                    print(f"dptrain: {_sentence(found, item)}", file=sys.stderr, flush=True)
                code = _code(item.state)
    return code


def _sentence(job: str, end: "log_service_pb2.LogEnd | job_pb2.Job") -> str:
    from dptrain.cli.service_shown import state, visible

    return f"job {job} {state(end)}: {visible(end.message)}"


def _code(state: "job_pb2.JobState.ValueType") -> int:
    from dptrain.v1 import job_pb2

    return int(state in (job_pb2.JOB_STATE_FAILED, job_pb2.JOB_STATE_CANCELLED))


@contextmanager
def _detachable(back: str) -> Iterator[None]:
    """Ctrl-C within it leaves the job alone, says how to come back, and ends this process.

    At once: an exception would be lost where it came in the middle of something that ignores exceptions.
    """

    def leave(number: int, frame: FrameType | None) -> None:
        os.write(2, f"\ndptrain: detached; the job goes on. To come back: {back}\n".encode())
        os._exit(DETACHED)

    before = signal.signal(signal.SIGINT, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _tell(job: "job_pb2.Job", output: Output, *, short: bool = False) -> None:
    from dptrain.cli.service_shown import as_json, details, pairs_table

    if output is Output.json:
        print(as_json(job))
    elif short:
        print(_sentence(job.id, job))
    else:
        console().print(pairs_table(details(job)))


def _live(shown: Callable[[], Any]) -> None:
    import threading

    from rich.live import Live

    try:
        with Live(shown(), console=console(), auto_refresh=False) as live:
            while True:
                threading.Event().wait(_REFRESH)
                live.update(shown(), refresh=True)
    except KeyboardInterrupt:
        raise typer.Exit(0) from None


def console() -> Any:
    """Where tables go."""
    from rich.console import Console

    # What is not shown on a terminal is for programs: a line must not be broken.
    width = None if sys.stdout.isatty() else 400
    return Console(highlight=False, width=width)


def _pairs(labels: Sequence[str]) -> dict[str, str]:
    found = {}
    for label in labels:
        key, equals, value = label.partition("=")
        if not equals or not key:
            raise UsageError(f"--label {label}", expected="key=value", found=repr(label), cure="such as team=vision")
        found[key] = value
    return found


def _moment(text: str) -> datetime:
    units = {"s": 1, "m": 60, "h": 3600, "d": 86400}
    try:
        if text[-1:] in units and text[:-1].replace(".", "", 1).isdigit():
            return datetime.now(UTC) - timedelta(seconds=float(text[:-1]) * units[text[-1]])
        return datetime.fromisoformat(text).astimezone(UTC)
    except (ValueError, OverflowError):
        raise UsageError(
            "--since", expected="an age such as 10m, or an ISO time", found=repr(text), cure="such as 2h"
        ) from None
