"""Figures of the service for Prometheus, read when they are asked for: nothing is counted twice or forgotten."""

import time
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from dptrain.errors import LaunchError
from dptrain.service.desk import Desk
from dptrain.service.model import State
from dptrain.wire.address import Address


class Figures(Collector):
    """Jobs by state, slots, and how far what runs has come."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        self._began = time.time()

    def collect(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
        """As prometheus-client calls it."""
        counts = self._desk.store.counts(None)
        jobs = GaugeMetricFamily("dptrain_jobs", "Jobs that the server keeps, by state.", labels=["state"])
        for state in State:
            jobs.add_metric([state.name.lower()], counts.get(state, 0))
        yield jobs
        conductor = self._desk.conductor
        yield GaugeMetricFamily("dptrain_slots", "Workers that can run at a time.", value=conductor.slots)
        yield GaugeMetricFamily("dptrain_slots_free", "Slots that no job holds.", value=max(0, conductor.free))
        started, events = self._desk.store.totals()
        yield CounterMetricFamily("dptrain_jobs_accepted", "Jobs accepted, ever.", value=started)
        yield CounterMetricFamily("dptrain_job_events", "Changes of jobs' states, ever.", value=events)
        yield GaugeMetricFamily("dptrain_start_time_seconds", "When the server began.", value=self._began)
        steps = GaugeMetricFamily("dptrain_job_step", "Steps done by jobs that run.", labels=["job"])
        speed = GaugeMetricFamily("dptrain_job_samples_per_second", "Their speed.", labels=["job"])
        for job_id in self._desk.conductor.running():
            progress = self._desk.journals.progress(self._desk.journal(job_id))
            steps.add_metric([job_id], progress.step)
            speed.add_metric([job_id], progress.samples_per_second)
        yield steps
        yield speed


class Exposition:
    """Answers http://ADDRESS/metrics from construction on until ``close``. Loopback only: there are no tokens here."""

    def __init__(self, desk: Desk, address: Address) -> None:
        if not address.loopback or address.path:
            raise LaunchError(
                f"metrics on {address}",
                expected="a loopback address: Prometheus' figures go out without a token",
                found="another",
                cure="such as 127.0.0.1:9464, with a proxy before it that asks who comes",
            )
        registry = CollectorRegistry()
        registry.register(Figures(desk))
        try:
            self._server, self._thread = start_http_server(address.port, address.host, registry)
        except OSError as error:
            raise LaunchError(
                f"metrics on {address}",
                expected="an address that no server has",
                found=error.strerror or str(error),
                cure="choose another",
            ) from None
        self.address = address.at(self._server.server_port)

    def close(self) -> None:
        """Answer no more."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
