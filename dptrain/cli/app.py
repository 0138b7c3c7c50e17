"""The commands: parse, call one function, print, set the exit code."""

import os
import shlex
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from dptrain import launch
from dptrain.cli import access, nodes, service
from dptrain.cli.access import Reach, asking

app = typer.Typer(
    name="dptrain",
    help="Distributed data-parallel training: the same bits for any number of workers.\n\n"
    "Plain [bold]dptrain[/] is [bold]dptrain run[/] of ./dptrain.toml if there is one, else of the embedded job.",
    epilog="Example: [bold]mpirun -n 8 dptrain[/]  trains the embedded job with eight workers.",
    rich_markup_mode="rich",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


certs = typer.Typer(help="Certificates for TLS.", no_args_is_help=True)
token = typer.Typer(help="Who may call a server: the tokens that it knows.", no_args_is_help=True)
app.add_typer(certs, name="certs")
app.add_typer(token, name="token")


class Kind(StrEnum):
    """What a model can be exported as."""

    safetensors = "safetensors"
    onnx = "onnx"


class Context(NamedTuple):
    """What the entry point found out: the launcher's word, and the way to the other workers if there are any."""

    place: launch.Announced
    leader: Any


class Watch(StrEnum):
    """How progress is shown."""

    auto = "auto"
    bar = "bar"
    plain = "plain"
    none = "none"


JobFile = Annotated[
    Path | None,
    typer.Argument(metavar="[JOB.toml]", help="Default: ./dptrain.toml if there is one, else the embedded job."),
]
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a key, such as optimizer.lr=0.05. Repeatable."),
]
KeptIn = Annotated[
    Path | None,
    typer.Option("--run-dir", metavar="DIR", help="Where the run is kept. Default: a new one in runs/."),
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the newest good checkpoint in --run-dir.")]
Progress = Annotated[
    Watch, typer.Option("--progress", envvar="DPTRAIN_PROGRESS", help="A bar, plain lines, or the end alone.")
]
RunOrJob = Annotated[
    str,
    typer.Argument(
        metavar="RUN|JOB",
        help="The directory of a run, or a job of a server.",
        autocompletion=service.complete_job,
        show_default=False,
    ),
]
RunDir = Annotated[Path, typer.Argument(metavar="RUN", help="The directory of a run.", show_default=False)]


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        print(f"dptrain {version('dptrain')}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


@app.command(
    epilog="Examples: [bold]dptrain run job.toml -n 8[/]  ·  "
    "[bold]mpirun -n 8 dptrain run job.toml --set optimizer.lr=0.05[/]  ·  "
    "[bold]dptrain run job.toml --run-dir runs/a --resume[/]"
)
def run(
    context: typer.Context,
    job: JobFile = None,
    sets: Sets = None,
    n: Annotated[
        int | None,
        typer.Option("-n", metavar="N", help="Start N workers on this machine. Default: this process alone."),
    ] = None,
    workers_file: Annotated[
        Path | None,
        typer.Option(
            "--workers-file",
            metavar="FILE",
            help="With exchange ps: holds the number of workers; write another, and they come or leave at a step.",
        ),
    ] = None,
    hostfile: Annotated[
        Path | None,
        typer.Option(
            "--hostfile",
            metavar="FILE",
            help="Start them on these hosts, each a line: `host slots=N` or `host:N`. -n is all slots by default.",
        ),
    ] = None,
    run_dir: KeptIn = None,
    resume: Resume = False,
    progress: Progress = Watch.auto,
    trace: Annotated[
        Path | None,
        typer.Option("--trace", metavar="FILE", help="Write where every worker's time goes, for ui.perfetto.dev."),
    ] = None,
    max_restarts: Annotated[
        int | None,
        typer.Option(
            "--max-restarts",
            metavar="K",
            min=0,
            help="With -n: start again from the newest checkpoint after the whole job's death, at most K times in a "
            "row without a newer one. Default: 3.",
        ),
    ] = None,
    exchange: Annotated[
        str | None,
        typer.Option(
            "--exchange", metavar="TYPE", help="The same as --set exchange.type=TYPE. ps: a parameter server, no MPI."
        ),
    ] = None,
    servers: Annotated[
        int | None,
        typer.Option("--servers", metavar="N", min=1, help="With --exchange ps: each adds up a segment. Default: 1."),
    ] = None,
    mode: Annotated[
        str | None,
        typer.Option(
            "--mode",
            metavar="MODE",
            help="With --exchange ps: sync, or async or ssp, which don't wait for the slowest.",
        ),
    ] = None,
    standby: Annotated[
        bool, typer.Option("--standby", help="With --exchange ps: one more server, for when another dies.")
    ] = False,
) -> None:
    """Train a job. Under mpirun this is one worker; with -n it starts mpirun itself; with neither it is alone."""
    from dptrain.cli.run import Request, train

    assignments = (
        *(sets or ()),
        *([f"exchange.type={exchange}"] if exchange is not None else []),
        *([f"exchange.mode={mode}"] if mode is not None else []),
        *([f"exchange.servers={servers}"] if servers is not None else []),
        *(["exchange.standby=true"] if standby else []),
    )
    asked = Request(job, assignments, n, run_dir, resume, progress.value, trace, max_restarts, hostfile, workers_file)
    raise typer.Exit(train(asked, context.obj.place, context.obj.leader))


@app.command("param-server", epilog="Example: [bold]dptrain param-server job.toml --listen unix:/tmp/ps.sock[/]")
def param_server(
    listen: Annotated[
        str,
        typer.Option("--listen", metavar="ADDR", help="unix:PATH or HOST:PORT; beyond loopback with tokens and TLS."),
    ],
    job: JobFile = None,
    sets: Sets = None,
    run_dir: KeptIn = None,
    resume: Resume = False,
    progress: Progress = Watch.auto,
    trace: Annotated[
        Path | None, typer.Option("--trace", metavar="FILE", help="Write where the server's time goes.")
    ] = None,
    segment: Annotated[
        str,
        typer.Option(
            "--segment", metavar="I/N", help="One of N servers with a segment each; 1/N waits for the others."
        ),
    ] = "",
    chief: Annotated[
        str, typer.Option("--chief", metavar="ADDR", help="With --segment 2/N to N/N: where the first one is.")
    ] = "",
    standby: Annotated[bool, typer.Option("--standby", help="Wait for one more server, without a segment.")] = False,
    standby_of: Annotated[
        str, typer.Option("--standby-of", metavar="ADDR", help="Be that of the first server, there.")
    ] = "",
    tokens: access.Tokens = None,
    tls_cert: access.TlsCert = None,
    tls_key: access.TlsKey = None,
    tls_clients: access.TlsClients = None,
    token_file: access.Token = None,
    tls_ca: access.TlsCa = None,
) -> None:
    """Train a job with the workers that join: its parameter server. Others show themselves to it as workers do."""
    from dptrain.cli.parameter_server import serve
    from dptrain.cli.run import Request

    asked = Request(job, tuple(sets or ()), None, run_dir, resume, progress.value, trace)
    kept = access.serving(tokens, tls_cert, tls_key, tls_clients)
    calling = access.calling(token_file, tls_ca)
    serve(
        asked,
        listen,
        segment=segment,
        chief=chief,
        standby=standby,
        standby_of=standby_of,
        serving=kept,
        calling=calling,
    )


@app.command(epilog="Example: [bold]dptrain worker --server unix:/tmp/ps.sock[/]")
def worker(
    server: Annotated[
        str, typer.Option("--server", metavar="ADDR[,ADDR...]", help="Where the parameter server listens.")
    ],
    data: Annotated[
        Path | None,
        typer.Option("--data", metavar="PATH", help="The job's data on this machine. Default: where the job says."),
    ] = None,
    processes: Annotated[
        int,
        typer.Option("--processes", metavar="N", help="Compute with N processes of this machine, summing here.", min=1),
    ] = 1,
    token_file: access.Token = None,
    tls_ca: access.TlsCa = None,
) -> None:
    """Compute for a parameter server, which says what."""
    from dptrain.joined import work

    calling = access.calling(token_file, tls_ca)
    raise typer.Exit(work(server.split(","), data=data, processes=processes, calling=calling))


@app.command(epilog="Example: [bold]dptrain check job.toml --set train.shards=4 -n 8[/]")
def check(
    context: typer.Context,
    job: JobFile = None,
    sets: Sets = None,
    n: Annotated[int | None, typer.Option("-n", metavar="N", help="Plan for N workers.", min=1)] = None,
) -> None:
    """Say what a job would do, without training: keys, layers, memory, and what its shards cost in speed."""
    from dptrain.cli.check import show
    from dptrain.cli.run import job_path
    from dptrain.job.load import load_job

    show(load_job(job_path(job), sets or (), os.environ), n or context.obj.place.size or 1)


@app.command(epilog="Example: [bold]dptrain plan job.toml --nodes 2..1024 --link 100Gbit,2us --rows 128[/]")
def plan(
    job: JobFile = None,
    sets: Sets = None,
    counts: Annotated[
        str, typer.Option("--nodes", metavar="A..B|A,B,…", help="Numbers of nodes; A..B doubles.")
    ] = "1..16",
    link: Annotated[
        str, typer.Option("--link", metavar="RATE,LATENCY", help="A node's link, each way, as 100Gbit,2us.")
    ] = "10Gbit,20us",
    workers: Annotated[int, typer.Option("--workers", metavar="N", help="Workers on each node.", min=1)] = 1,
    cores: Annotated[
        float,
        typer.Option(
            "--cores", metavar="N", help="Cores of each node, for workers and TCP. Default: as here.", min=0.0
        ),
    ] = 0.0,
    byte: Annotated[
        float, typer.Option("--byte", metavar="NS", help="What a byte costs a core there. Default: as here.", min=0.0)
    ] = 0.0,
    rows: Annotated[
        int, typer.Option("--rows", metavar="N", help="A batch of N rows for each worker. Default: the job's.", min=0)
    ] = 0,
    hours: Annotated[
        float, typer.Option("--mtbf", metavar="HOURS", help="Between two failures of one node.", min=1.0)
    ] = 50_000.0,
    as_json: Annotated[bool, typer.Option("--json", help="A line of JSON for each number of nodes.")] = False,
) -> None:
    """Predict step time, efficiency, traffic and memory on more nodes than there are here."""
    from dptrain import arithmetic
    from dptrain.cli.run import job_path
    from dptrain.job.load import load_job

    loaded = load_job(job_path(job), sets or (), os.environ)
    # Before numpy is loaded, which what follows does.
    arithmetic.choose(loaded.arithmetic.kernels, loaded.arithmetic.threads)
    from dptrain.cli import plan as prediction

    several, over = prediction.machines(counts), prediction.link(link)
    prediction.show(
        loaded, several, over, workers=workers, cores=cores, byte=byte, rows=rows, hours=hours, as_json=as_json
    )


@app.command(epilog="Example: [bold]dptrain init && dptrain check[/]")
def init(
    path: Annotated[Path, typer.Argument(metavar="[PATH]", help="The file to write.")] = Path("dptrain.toml"),
    force: Annotated[bool, typer.Option("--force", help="Overwrite a file that is there.")] = False,
) -> None:
    """Write a commented job file: the embedded job, with every key, its default and its meaning."""
    from dptrain.cli.job_file import write

    write(path, force)
    print(f"wrote {path}; try: dptrain check {shlex.quote(str(path))}")


@app.command("eval", epilog="Example: [bold]dptrain eval runs/digits --data more.npz --json[/]")
def evaluate(
    run: RunDir,
    data: Annotated[
        Path | None, typer.Option("--data", metavar="PATH", help="Rows like the job's. Default: the job's test part.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure a run's weights on its test part, or on other data."""
    from dptrain.cli.inference import evaluate

    evaluate(run, data, as_json)


@app.command(epilog="Example: [bold]dptrain predict runs/digits --data x.npy --out y.npy --classes[/]")
def predict(
    run: RunDir,
    data: Annotated[Path, typer.Option("--data", metavar="X.npy", help="Rows of raw features, as the job's.")],
    out: Annotated[Path, typer.Option("--out", metavar="Y.npy", help="Where the outputs go, one row each.")],
    classes: Annotated[
        bool, typer.Option("--classes", help="Write the most likely class of each row, not the model's outputs.")
    ] = False,
) -> None:
    """Apply a run's weights to rows of features."""
    from dptrain.cli.inference import predict

    predict(run, data, out, classes)


@app.command(epilog="Example: [bold]dptrain export runs/digits --format onnx --out digits.onnx[/]")
@asking
def export(
    reach: Reach,
    run: RunOrJob,
    kind: Annotated[Kind, typer.Option("--format", help="onnx needs the extra of that name.")],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", metavar="FILE", help="Default: model.safetensors or model.onnx in the run; for a job here."
        ),
    ] = None,
) -> None:
    """Write a run's model to one file that other programs read: from raw features to outputs."""
    from dptrain.cli import brought
    from dptrain.export import SUFFIXES, export

    with brought.runs([run], reach, brought.model) as [home]:
        here = None if home == Path(run) else Path(f"model{SUFFIXES[kind]}")
        print(export(home, kind.value, out or here))


@app.command(
    epilog="Example: [bold]dptrain compare runs/a runs/b --json[/]",
)
@asking
def compare(
    reach: Reach,
    runs: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN RUN...",
            help="Directories of runs, or jobs of a server.",
            autocompletion=service.complete_job,
            show_default=False,
        ),
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    output: service.Form = service.Output.table,
) -> None:
    """Say in what runs differ: the job's keys, figures, bits, speed; and draw their curves."""
    from dptrain.cli import brought
    from dptrain.cli.compare import show

    with brought.runs(runs, reach, brought.story) as homes:
        names = [run if home == Path(run) else home.name for run, home in zip(runs, homes, strict=True)]
        show(homes, as_json or output is service.Output.json, names)


@app.command(epilog="Example: [bold]dptrain replay runs/job-20260101-120000[/]")
def replay(run: RunDir, as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Do a run with exchange.mode async or ssp again, alone, in the order of arrival: to the same weights."""
    from dptrain.cli.replay import show

    show(run, as_json)


@app.command(epilog="Example: [bold]dptrain page runs --listen 127.0.0.1:8470[/]")
def page(
    runs: Annotated[Path, typer.Argument(metavar="[RUNS]", help="A folder of runs, or one run.")] = Path("runs"),
    listen: Annotated[
        str, typer.Option("--listen", metavar="HOST:PORT", help="A loopback address; port 0: any that is free.")
    ] = "127.0.0.1:8470",
) -> None:
    """Show runs and their live curves in a browser, without a service (extra service)."""
    from dptrain.cli.page import serve

    serve(runs, listen)


@app.command(epilog="Example: [bold]dptrain doctor --json[/]")
def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Look at MPI, cores, limits, memory and versions; tell each problem with its cure. Exits 1 if one stops a run."""
    from dptrain.cli.doctor import examine, show

    findings = examine(os.environ)
    show(findings, as_json)
    raise typer.Exit(int(any(finding.stops for finding in findings)))


class Role(StrEnum):
    """What a token is for."""

    read = "read"
    submit = "submit"
    admin = "admin"
    worker = "worker"


Tokens = Annotated[Path, typer.Option("--tokens", metavar="FILE", help="The server's file of tokens.")]
Name = Annotated[str, typer.Argument(metavar="NAME", help="Whose token it is.", show_default=False)]


@certs.command("init", epilog="Example: [bold]dptrain certs init certs --host trainer.lan --host 10.0.0.5[/]")
def certs_init(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where the files go.", show_default=False)],
    hosts: Annotated[
        list[str] | None,
        typer.Option("--host", metavar="HOST", help="A name or address that the server is called by. Repeatable."),
    ] = None,
    days: Annotated[int, typer.Option("--days", min=1, max=3650, help="How long they are good for.")] = 825,
) -> None:
    """Make a CA, and certificates of it for a server and a client."""
    from dptrain.wire.certificates import init

    for path in init(folder, hosts or (), days):
        print(path)


@token.command("create", epilog="Example: [bold]dptrain token create ada --role worker --tokens tokens.json[/]")
def token_create(
    name: Name,
    tokens: Tokens,
    role: Annotated[Role, typer.Option("--role", help="What it is for.")],
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE", help="Write it there, for --token-file, instead of printing it."),
    ] = None,
) -> None:
    """Make a token. It is shown this once; the server keeps its hash alone."""
    from dptrain.wire.tokens import Role as Wanted
    from dptrain.wire.tokens import TokenFile, keep

    held = TokenFile(tokens)
    if out is None:
        print(held.create(name, Wanted(role.value)))
    else:
        keep(out, lambda: held.create(name, Wanted(role.value)))


@token.command("revoke", epilog="Example: [bold]dptrain token revoke ada --tokens tokens.json[/]")
def token_revoke(name: Name, tokens: Tokens) -> None:
    """Take a token out. The server refuses it from its next call on."""
    from dptrain.wire.tokens import TokenFile

    TokenFile(tokens).revoke(name)


@token.command("list", epilog="Example: [bold]dptrain token list --tokens tokens.json[/]")
def token_list(tokens: Tokens) -> None:
    """Say whose tokens there are, what for, and since when."""
    from dptrain.wire.tokens import TokenFile

    for entry in TokenFile(tokens).entries():
        print(f"{entry.name}\t{entry.role}\t{entry.created}")


service.register(app)
nodes.register(app)
