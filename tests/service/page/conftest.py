"""The page over a real socket, with real runs."""

import hmac
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

import dptrain
from dptrain.errors import RefusedTransition
from dptrain.service.page.reading import JobView, Who
from dptrain.service.page.runs import Runs
from dptrain.service.page.server import PageServer
from tests.softmax import LAYERS, job

TOKENS = {"t-admin": "admin", "t-submit": "submit", "t-read": "read"}


@dataclass(frozen=True)
class Someone:
    name: str
    role: str


class Tokens:
    """Three people, one of each role."""

    def __init__(self) -> None:
        self.known = dict(TOKENS)

    def identify(self, token: str) -> Who | None:
        found = None
        for known, role in self.known.items():
            if hmac.compare_digest(known.encode(), token.encode()):
                found = Someone(role, role)
        return found


class Steered(Runs):
    """Runs that can be asked for something: what was asked is their state."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.asked: list[tuple[str, str, str]] = []

    def _view(self, path: Path, until: float = math.inf) -> JobView:
        view = super()._view(path, until)
        verbs = [verb for who, job_id, verb in self.asked if job_id == path.name]
        if not verbs:
            return replace(view, verbs=("pause", "cancel"))
        return replace(view, state="PAUSED" if verbs[-1] == "pause" else "CANCELLED", verbs=("resume",))

    def act(self, who: Who, job_id: str, verb: str) -> JobView:
        path = self._path(job_id)
        if verb not in self._view(path).verbs:
            raise RefusedTransition(f"job {job_id}", expected="another state", found="this one", cure="wait")
        self.asked.append((who.name, job_id, verb))
        return self._view(path)


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two finished runs."""
    folder = tmp_path_factory.mktemp("page") / "runs"
    for name, lr in (("one", 0.5), ("two", 0.2)):
        content: dict[str, Any] = {**job(LAYERS, optimizer={"lr": lr}), "name": f'job <{name}> & "more"'}
        dptrain.train(content, run_dir=folder / name)
    return folder


Served = Callable[..., PageServer]


@pytest.fixture
def served() -> Iterator[Served]:
    """Starts servers, and ends them."""
    servers: list[PageServer] = []

    def start(*arguments: Any, **more: Any) -> PageServer:
        servers.append(PageServer(*arguments, **more))
        return servers[-1]

    yield start
    for server in servers:
        server.close()
