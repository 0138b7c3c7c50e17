"""Parameter servers and workers in one process: the same code and the same wire, threads for processes."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dptrain import joined
from dptrain.exchange.parameter_server.hub import Hub
from dptrain.job.spec import Job
from dptrain.result import Result
from dptrain.serve import serve


class Cluster:
    """A server in the thread that calls ``train``, others beside it, and workers, which start when it listens.

    Nobody takes part before all of those do, or have ended: runs are short, and who comes late might find none.
    ``servers`` have a segment each; with ``standby`` there is one more without. With ``tcp`` the one that there is
    listens on a port of its own choice, and otherwise on Unix sockets.
    """

    def __init__(self, job: Job, folder: Path, servers: int = 1, *, standby: bool = False, tcp: bool = False) -> None:
        self.job = replace(job, exchange=replace(job.exchange, type="ps", deadline=60.0))
        self.folder = folder
        self.servers, self.standby = servers, standby
        self.addresses = [f"unix:{folder / f'server-{number}.sock'}" for number in range(servers + standby)]
        if tcp:
            self.addresses = ["127.0.0.1:0"]
        self.address = self.addresses[0]
        self.codes: list[int | BaseException] = []
        self.others: list[Result | BaseException] = []
        self._threads: list[threading.Thread] = []
        self._hub: Hub | None = None
        self._awaited = 0

    def worker(self, **options: Any) -> None:
        def work() -> None:
            try:
                self.codes.append(joined.work(self.addresses, seconds=30.0, **options))
            except BaseException as error:
                self.codes.append(error)
                if self._hub is not None:
                    self._hub.ring()

        self._awaited += 1
        self._start(work)

    def joined(self, workers: int) -> None:
        """Return when so many have ever taken part."""
        assert self._hub is not None
        with self._hub.changed:
            assert self._hub.changed.wait_for(lambda: self._came() >= workers, 240)

    def train(self, workers: int = 0, ready: Callable[[], None] = lambda: None, **options: Any) -> Result:
        def follow(number: int, address: str) -> None:
            place = number if number < self.servers else None
            kept = {"run_dir": self.folder / "run", "resume": options.get("resume", False)}
            try:
                self.others.append(
                    serve(self.job, address, servers=self.servers, place=place, chief=self.address, **kept)
                )
            except BaseException as error:
                self.others.append(error)

        def begin(address: str) -> None:
            self.addresses[0] = address
            for number, other in enumerate(self.addresses[1:], 1):
                self._start(lambda number=number, other=other: follow(number, other))  # type: ignore[misc]
            for _ in range(workers):
                self.worker()
            ready()

        place = {"servers": self.servers, "standby": self.standby}
        try:
            with self._together():
                return serve(self.job, self.address, ready=begin, run_dir=self.folder / "run", **place, **options)
        finally:
            for thread in self._threads:
                thread.join(240)
            assert not any(thread.is_alive() for thread in self._threads)
            assert not list(self.folder.glob("*.sock"))

    @contextmanager
    def _together(self) -> Iterator[None]:
        """Within it no worker is given anything until all that were started by then are there."""
        begun = False
        working = Hub.working

        def gated(hub: Hub) -> list[int]:
            nonlocal begun
            self._hub = hub
            begun = begun or self._came() + len(self.codes) >= self._awaited
            return working(hub) if begun else []

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Hub, "working", gated)
            yield

    def _came(self) -> int:
        """How many have ever taken part; called with the hub's lock held."""
        assert self._hub is not None
        return sum(member.working for member in self._hub.all)

    def _start(self, action: Callable[[], None]) -> None:
        thread = threading.Thread(target=action)
        self._threads.append(thread)
        thread.start()
