"""``dptrain agent`` and ``dptrain nodes``: machines that take part in a server."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from dptrain.cli import access
from dptrain.cli.access import Reach, Server, TokenFile, asking
from dptrain.cli.service import Form, Output, console

nodes = typer.Typer(
    help="The machines of a server: list them, or have one take no new work.", invoke_without_command=True
)
Node = Annotated[str, typer.Argument(metavar="NODE", help="Its name.", show_default=False)]


def agent(
    server: Server = None,
    slots: Annotated[int, typer.Option("--slots", metavar="N", help="How many workers this machine takes.")] = 1,
    name: Annotated[str, typer.Option("--name", help="Of this node. Default: the host's.")] = "",
    by: Annotated[
        str,
        typer.Option(
            "--address",
            metavar="ADDRESS",
            help="Of this machine, in the network that MPI is to use. Default: by which it reaches the server.",
        ),
    ] = "",
    ready: Annotated[
        Path | None, typer.Option("--ready", metavar="FILE", help="Exists while it takes part: for health checks.")
    ] = None,
    token_file: TokenFile = None,
    tls_ca: access.TlsCa = None,
) -> None:
    """Take part in a server's cluster for this machine. It dials out to the server, and listens nowhere."""
    from dptrain.service import agent, known, log
    from dptrain.service.client import DEFAULT_SERVER
    from dptrain.wire import address
    from dptrain.wire.limits import Patience
    from dptrain.wire.security import Calling, ClientTls

    place = address.parse(server or DEFAULT_SERVER)
    if by:
        agent.use(by, os.environ)
    said = agent.registration(name, slots, place, by)
    tls = None if tls_ca is None else ClientTls(tls_ca)
    handler = log.begin(sys.stderr)
    try:
        calling = Calling(known.token(place, token_file, os.environ), tls)
        agent.Agent(said, place, calling, Patience(), ready).run()
    finally:
        handler.close()


def health(server: Server = None, token_file: TokenFile = None, tls_ca: access.TlsCa = None) -> None:
    """Ask a server whether it serves (grpc.health.v1): exit code 0 if so, 3 if not. Any token will do."""
    from dptrain.service import known
    from dptrain.service.client import DEFAULT_SERVER
    from dptrain.wire import address
    from dptrain.wire.health import ask
    from dptrain.wire.security import Calling, ClientTls

    place = address.parse(server or DEFAULT_SERVER)
    tls = None if tls_ca is None else ClientTls(tls_ca)
    ask(place, Calling(known.token(place, token_file, os.environ), tls))
    print(f"{place} serves")


@nodes.callback(epilog="Example: [bold]dptrain nodes drain node-3[/]")
@asking
def listed(
    reach: Reach,
    context: typer.Context,
    output: Form = Output.table,
) -> None:
    """List the machines of a server, their slots and states."""
    if context.invoked_subcommand is not None:
        return
    from dptrain.cli.service_shown import all_as_json, nodes_table

    with reach.client() as made:
        found = made.nodes()
    if output is Output.json:
        print(all_as_json(found))
    else:
        console().print(nodes_table(found))


@nodes.command("drain", epilog="Example: [bold]dptrain nodes drain node-3[/]")
@asking
def drain(reach: Reach, node: Node) -> None:
    """Have a node take no new work."""
    with reach.client() as made:
        print(_sentence(made.drain(node).name, "takes no new work"))


@nodes.command("resume", epilog="Example: [bold]dptrain nodes resume node-3[/]")
@asking
def resume(reach: Reach, node: Node) -> None:
    """Have a node take work again that was drained."""
    with reach.client() as made:
        print(_sentence(made.resume_node(node).name, "takes work"))


def _sentence(name: str, what: str) -> str:
    return f"node {name} {what}"


def register(app: typer.Typer) -> None:
    """Add the commands."""
    epilog = "Example: [bold]dptrain agent --server coordinator:7077 --slots 4[/]"
    app.command(rich_help_panel="Service", epilog=epilog)(agent)
    app.command(rich_help_panel="Service", epilog="Example: [bold]dptrain health && dptrain submit job.toml[/]")(health)
    app.add_typer(nodes, name="nodes", rich_help_panel="Service")
