"""A seeded sample of the campaign; the long one is ``python -m tests.faults``."""

import functools
from itertools import islice
from pathlib import Path

import pytest

from dptrain.launch import library
from tests.faults import data, hang, network, process, series, servers, stale, storage
from tests.faults.fault import Fault, perform

SEED = 4
SURVIVES = library() == "Open MPI"
KINDS = {
    "storage": (storage.faults, 20),
    "data": (data.faults, 12),
    "process": (process.faults, 11 if SURVIVES else 2),
    "series": (series.faults, 1 if SURVIVES else 0),
    "hang": (hang.faults, 3 if SURVIVES else 1),
    "servers": (servers.faults, 0 if SURVIVES else 2),
    "stale": (stale.faults, 0 if SURVIVES else 2),
    "network": (network.faults, len(network.WHAT) if SURVIVES else 1),
}
"""So many of each kind as take some three minutes together, a sixth of them wherever tests are run; where deaths are
not survived, each is a restart. Servers need no MPI: one of both is enough."""


@functools.cache
def sample(kind: str) -> list[Fault]:
    faults, count = KINDS[kind]
    return list(islice(faults(SEED), count))


CASES = [
    pytest.param(kind, number, marks=() if 6 * number < count else pytest.mark.long)
    for kind, (_, count) in KINDS.items()
    for number in range(count)
]


@pytest.mark.parametrize(("kind", "number"), CASES)
def test_a_fault_ends_as_it_should(kind: str, number: int, tmp_path: Path) -> None:
    if kind == "network" and network.missing():
        pytest.skip(network.missing())
    fault = sample(kind)[number]
    outcome = perform(fault, tmp_path / "fault")
    assert outcome.good, f"{outcome.verdict}: {fault.name} [{outcome.phase}]: {outcome.note}"


@pytest.mark.skipif(storage.strace_missing() != "", reason=storage.strace_missing())
def test_crashes_are_among_the_faults() -> None:
    names = [fault.name for fault in islice(storage.faults(SEED), 1000)]
    assert sum(name.startswith("crash before call") for name in names) > 80
