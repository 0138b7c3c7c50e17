import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from dptrain.processes import children
from dptrain.service.client import Client
from dptrain.service.server import TOKENS, JobServer, Options
from dptrain.wire.address import parse
from dptrain.wire.limits import Patience
from dptrain.wire.tokens import Role, TokenFile

LOOPBACK = parse("127.0.0.1:0")


@pytest.fixture(autouse=True)
def childless() -> Iterator[None]:
    """No test leaves a process of this one's behind, not even one that has ended and was not waited for."""
    before = set(children(os.getpid()))
    yield
    assert set(children(os.getpid())) <= before


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    """This process's, without anybody's own tokens and servers."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("DPTRAIN_")}
    return {**kept, "XDG_CONFIG_HOME": str(tmp_path / "config")}


@pytest.fixture
def serve(tmp_path: Path, environ: dict[str, str]) -> Iterator[Callable[..., JobServer]]:
    """Starts servers in the folder "data", with what is given instead of the defaults; whatever they run is ended."""
    with ExitStack() as left:

        def start(**given: object) -> JobServer:
            options = {"listen": LOOPBACK, "data": tmp_path / "data", "slots": 2, **given}
            return left.enter_context(JobServer(Options(**options), environ))  # type: ignore[arg-type]

        yield start
    end_all(tmp_path / "data" / "jobs")


@pytest.fixture
def server(serve: Callable[..., JobServer]) -> JobServer:
    return serve()


@pytest.fixture
def client(server: JobServer, environ: dict[str, str]) -> Iterator[Client]:
    with Client(str(server.address), environ=environ) as made:
        yield made


@pytest.fixture
def as_owner(server: JobServer, environ: dict[str, str], tmp_path: Path) -> Iterator[Callable[..., Client]]:
    """Clients with tokens of their own, by owner and role."""
    with ExitStack() as left:

        def connect(name: str, role: Role = Role.submit) -> Client:
            token = TokenFile(tmp_path / "data" / TOKENS).create(name, role)
            patience = Patience(connect_seconds=5.0)
            return left.enter_context(Client(str(server.address), token=token, environ=environ, patience=patience))

        yield connect


def end_all(jobs: Path) -> None:
    """End every keeper that is left below a folder of jobs, and wait for it."""
    from dptrain.service import keeper
    from dptrain.service.runner import Alive, Limits, Runner, reap

    runner = Runner(jobs, Limits(), os.environ)
    for folder in jobs.glob("*"):
        sight = runner.look(folder.name, keeper.launches(folder))
        if isinstance(sight, Alive) and sight.handle >= 0:
            import select

            runner.ask(sight.pid, kill=True)
            select.select([sight.handle], [], [], 30)
            os.close(sight.handle)
    reap(wait=True)
