"""The composition root of the service: one process that takes jobs and runs them, from a folder that is its own."""

import fcntl
import json
import os
import socket
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import grpc

from dptrain import hosts
from dptrain.errors import LaunchError, StorageError
from dptrain.rsh import ACCESS, NODES
from dptrain.service import known, log
from dptrain.service.agent_service import AgentService
from dptrain.service.artifact_service import ArtifactService
from dptrain.service.books import Journals, Watched
from dptrain.service.cluster_service import ClusterService
from dptrain.service.conductor import Conductor
from dptrain.service.datasets import Datasets
from dptrain.service.desk import Desk
from dptrain.service.intake import Intake
from dptrain.service.job_service import JobService
from dptrain.service.loans import Loans
from dptrain.service.log_service import LogService
from dptrain.service.metric_service import MetricService
from dptrain.service.model import MOST_WORKERS
from dptrain.service.nodes import Here, Nodes, mpi
from dptrain.service.relay import Relay
from dptrain.service.runner import Limits as JobLimits
from dptrain.service.runner import Runner
from dptrain.service.scheduler import SETTLED
from dptrain.service.shipping import Offers
from dptrain.service.store import Store
from dptrain.v1 import (
    agent_service_pb2_grpc,
    artifact_service_pb2_grpc,
    cluster_service_pb2_grpc,
    job_service_pb2_grpc,
    log_service_pb2_grpc,
    metric_service_pb2_grpc,
)
from dptrain.wire.address import Address
from dptrain.wire.limits import Limits
from dptrain.wire.security import ServerTls, Serving
from dptrain.wire.server import Server, Service
from dptrain.wire.tokens import Role, TokenFile

STORE, JOBS, DATASETS, TOKENS, TOKEN, LOCK = "jobs.sqlite", "jobs", "datasets", "tokens.json", "token", "lock"
"""Of the server's folder: the store, the jobs' folders, uploads, hashed tokens, the operator's own token, the lock."""

OPERATOR = "operator"
"""Whose the token is that the first start makes."""

CALLS = 640
"""At a time, each with a thread: hundreds may follow one job's log."""

ROLES: Mapping[str, Mapping[str, Role]] = {
    "dptrain.v1.JobService": {
        "CreateJob": Role.submit,
        "GetJob": Role.read,
        "ListJobs": Role.read,
        "UpdateJob": Role.submit,
        "CancelJob": Role.submit,
        "PauseJob": Role.submit,
        "ResumeJob": Role.submit,
        "RetryJob": Role.submit,
        "DeleteJob": Role.submit,
        "WatchJob": Role.read,
    },
    "dptrain.v1.LogService": {"TailLogs": Role.read},
    "dptrain.v1.MetricService": {"QueryMetrics": Role.read, "StreamMetrics": Role.read},
    "dptrain.v1.ArtifactService": {
        "ListArtifacts": Role.read,
        "ListCheckpoints": Role.read,
        "DownloadArtifact": Role.read,
        "UploadDataset": Role.submit,
        "ListDatasets": Role.read,
        "DeleteDataset": Role.submit,
    },
    "dptrain.v1.ClusterService": {
        "GetServerInfo": Role.read,
        "ListNodes": Role.read,
        "DrainNode": Role.admin,
        "ResumeNode": Role.admin,
    },
    "dptrain.v1.AgentService": {"Serve": Role.worker, "FetchFile": Role.worker, "Carry": Role.worker},
}
"""What a token must be for, by method."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """How a server is run. ``keep`` = (seconds, bytes) bounds jobs that have ended; 0: no bound.

    With ``agents`` jobs run on the nodes of agents, and none on this machine. A job has its number of workers for
    ``settled`` seconds at least.
    """

    listen: Address
    data: Path
    slots: int = 0
    agents: bool = False
    shared: Path | None = None
    tls: ServerTls | None = None
    allow_code: bool = False
    quota: int = 10 << 30
    keep: tuple[float, int] = (0.0, 0)
    settled: float = SETTLED
    metrics: Address | None = None
    page: Address | None = None
    job_limits: JobLimits = field(default_factory=JobLimits)
    limits: Limits = field(default_factory=lambda: Limits(calls=CALLS))


class JobServer:
    """Answers and runs jobs from ``__enter__`` to ``__exit__``; the jobs go on after that.

    Raises LaunchError where another server has the folder or the address.
    """

    def __init__(self, options: Options, environ: Mapping[str, str]) -> None:
        self.options, self._environ = options, environ
        self._left = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as left:
            self._open(left)
            self._left = left.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._left.close()

    @property
    def address(self) -> Address:
        """Where it can be reached."""
        return self._server.address

    def _open(self, left: ExitStack) -> None:
        options, data = self.options, self.options.data
        _claim(data, left)
        tokens = TokenFile(data / TOKENS)
        _first_token(data, tokens)
        store = Store(data / STORE)
        left.callback(store.close)
        reach = _reach(data.resolve(), self._environ) if options.agents else None
        runner = Runner(data.resolve() / JOBS, options.job_limits, self._environ, reach)
        slots = options.slots or len(os.sched_getaffinity(0))
        here = Here(socket.gethostname(), mpi() if options.agents else None, sys.executable)
        self.offers = Offers()
        self.loans = Loans(self.offers)
        self.nodes = Nodes(here, self._look_again, log.tell)
        states = self.nodes.states if options.agents else None
        conductor = Conductor(store, runner, slots, log.tell, options.keep, states, options.settled)
        watched = Watched(store.bell.ring)
        left.callback(watched.close)
        self.desk = Desk(store, runner, conductor, Journals(), watched)
        datasets = Datasets(data.resolve() / DATASETS, options.shared and options.shared.resolve(), options.quota)
        intake = Intake(datasets, MOST_WORKERS if options.agents else slots, options.allow_code)
        serving = Serving(tokens, options.tls)
        self._server = Server(options.listen, self._services(intake, datasets), serving=serving, limits=options.limits)
        left.callback(self._server.stop, 1.0)
        if options.metrics is not None:
            from dptrain.service.exposition import Exposition

            self.exposition = Exposition(self.desk, options.metrics)
            left.callback(self.exposition.close)
        if options.page is not None:
            from dptrain.service.page.jobs import Jobs
            from dptrain.service.page.server import PageServer

            page = PageServer(Jobs(self.desk), options.page.host, options.page.port, door=tokens, tls=options.tls)
            left.callback(page.close)
            self.page = page.address
        if options.agents:
            known.write_private(data / ACCESS, json.dumps(_access(self.address, options.tls)))
            relay = Relay(data, self.nodes, self.offers, self.loans)
            left.callback(relay.close)
        conductor.start()
        left.callback(conductor.close)
        # First of all those who wait are let go, or the end would wait for them.
        left.callback(store.bell.close)
        left.callback(self.nodes.close)
        self._server.start()
        known.remember(self.address, data / TOKEN, self._environ)
        log.tell("serving", address=str(self.address), data=str(data), slots=conductor.slots, agents=options.agents)

    def _look_again(self) -> None:
        self.desk.conductor.look_again()

    def _services(self, intake: Intake, datasets: Datasets) -> list[Service]:
        desk, options = self.desk, self.options
        jobs, logs, metrics = JobService(desk, intake), LogService(desk), MetricService(desk)
        artifacts = ArtifactService(desk, datasets)
        cluster = ClusterService(desk, self.nodes, options.allow_code, options.limits)
        agents = AgentService(self.nodes, self.offers, self.loans)

        def add_jobs(server: grpc.Server) -> None:
            job_service_pb2_grpc.add_JobServiceServicer_to_server(jobs, server)

        def add_logs(server: grpc.Server) -> None:
            log_service_pb2_grpc.add_LogServiceServicer_to_server(logs, server)

        def add_metrics(server: grpc.Server) -> None:
            metric_service_pb2_grpc.add_MetricServiceServicer_to_server(metrics, server)

        def add_artifacts(server: grpc.Server) -> None:
            artifact_service_pb2_grpc.add_ArtifactServiceServicer_to_server(artifacts, server)

        def add_cluster(server: grpc.Server) -> None:
            cluster_service_pb2_grpc.add_ClusterServiceServicer_to_server(cluster, server)

        def add_agents(server: grpc.Server) -> None:
            agent_service_pb2_grpc.add_AgentServiceServicer_to_server(agents, server)

        add = (add_jobs, add_logs, add_metrics, add_artifacts, add_cluster, add_agents)
        return [Service(name, adder, roles) for adder, (name, roles) in zip(add, ROLES.items(), strict=True)]


def _reach(data: Path, environ: Mapping[str, str]) -> dict[str, str]:
    """What tells launchers to reach nodes through this server. Raises LaunchError where its program is missing."""
    program = Path(sys.executable).parent / "dptrain-rsh"
    if not os.access(program, os.X_OK):
        raise LaunchError(
            "--agents", expected=f"the program {program}", found="none", cure="install dptrain again with pip"
        )
    return {**dict.fromkeys(hosts.AGENTS, str(program)), NODES: str(data)}


def _access(address: Address, tls: ServerTls | None) -> dict[str, str]:
    """How a job's parameter server is to listen: as this server does, by another port."""
    return {
        "host": address.host or "127.0.0.1",
        "certificate": "" if tls is None or address.path else str(tls.certificate.resolve()),
        "key": "" if tls is None or address.path else str(tls.key.resolve()),
    }


def _claim(data: Path, left: ExitStack) -> None:
    """Make the folder this process's own for as long as ``left`` is open."""
    try:
        data.mkdir(mode=0o700, parents=True, exist_ok=True)
        (data / JOBS).mkdir(mode=0o700, exist_ok=True)
        lock = left.enter_context((data / LOCK).open("ab"))
    except OSError as error:
        raise StorageError(
            f"{data}",
            expected="a folder to keep jobs in",
            found=error.strerror or str(error),
            cure="choose another --data",
        ) from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise LaunchError(
            f"{data}", expected="a folder that no server uses", found="one that does", cure="choose another --data"
        ) from None


def _first_token(data: Path, tokens: TokenFile) -> None:
    """At the first start make the operator's token: there is no server without tokens."""
    if tokens.path.exists():
        return
    path = data / TOKEN
    token = tokens.create(OPERATOR, Role.admin)
    known.write_private(path, token + "\n")
