"""A parameter server and its workers in one process: the same code and the same wire, threads for processes."""

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
    """A server in the thread that calls ``train``, and workers that are started when it listens, or by hand."""

    def __init__(self, job: Job, folder: Path) -> None:
        self.job = replace(job, exchange=replace(job.exchange, type="ps", deadline=60.0))
        self.folder = folder
        self.address = f"unix:{folder / 'server.sock'}"
        self.codes: list[int | BaseException] = []
        self._threads: list[threading.Thread] = []

    def worker(self, **options: Any) -> None:
        def work() -> None:
            try:
                self.codes.append(joined.work([self.address], seconds=30.0, **options))
            except BaseException as error:
                self.codes.append(error)

        thread = threading.Thread(target=work)
        self._threads.append(thread)
        thread.start()

    def train(self, workers: int = 0, ready: Callable[[], None] = lambda: None, **options: Any) -> Result:
        def begin(address: str) -> None:
            for _ in range(workers):
                self.worker()
            ready()

        try:
            return serve(self.job, self.address, ready=begin, run_dir=self.folder / "run", **options)
        finally:
            for thread in self._threads:
                thread.join(60)
            assert not any(thread.is_alive() for thread in self._threads)
            assert not (self.folder / "server.sock").exists()
