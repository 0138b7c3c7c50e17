from collections.abc import Iterator
from pathlib import Path

import pytest

from dptrain.wire import certificates
from dptrain.wire.address import parse
from dptrain.wire.security import Serving
from dptrain.wire.server import Server
from dptrain.wire.tokens import Role, TokenFile
from tests.wire.echo import Echo

HERE = parse("127.0.0.1:0")


@pytest.fixture(scope="session")
def certs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("certs")
    certificates.init(folder)
    return folder


@pytest.fixture
def tokens(tmp_path: Path) -> dict[str, str]:
    """A token of every role, by role; the file is tokens.json."""
    file = TokenFile(tmp_path / "tokens.json")
    return {role.value: file.create(f"the {role}", role) for role in Role if role is not Role.any}


@pytest.fixture
def echo() -> Echo:
    return Echo()


@pytest.fixture
def guarded(echo: Echo, tokens: dict[str, str], tmp_path: Path) -> Iterator[Server]:
    with Server(HERE, [echo.service()], serving=Serving(keys=TokenFile(tmp_path / "tokens.json"))) as server:
        yield server
