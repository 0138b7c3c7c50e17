"""Parameter servers and workers in one process: the same code and the same wire, threads for processes."""

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from dptrain import joined
from dptrain.job.spec import Job
from dptrain.result import Result
from dptrain.serve import serve


class Cluster:
    """A server in the thread that calls ``train``, others beside it, and workers, which start when it listens.

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

    def worker(self, **options: Any) -> None:
        def work() -> None:
            try:
                self.codes.append(joined.work(self.addresses, seconds=30.0, **options))
            except BaseException as error:
                self.codes.append(error)

        self._start(work)

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
            return serve(self.job, self.address, ready=begin, run_dir=self.folder / "run", **place, **options)
        finally:
            for thread in self._threads:
                thread.join(60)
            assert not any(thread.is_alive() for thread in self._threads)
            assert not list(self.folder.glob("*.sock"))

    def _start(self, action: Callable[[], None]) -> None:
        thread = threading.Thread(target=action)
        self._threads.append(thread)
        thread.start()
