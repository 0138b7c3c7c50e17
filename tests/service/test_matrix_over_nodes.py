"""What may become of nodes while jobs run on them: each a network namespace of its own, with nothing in common.

Two jobs run at a time, one by a parameter server and one over MPI, so that each fault meets both.
"""

from pathlib import Path

import pytest

from tests.faults.network import missing
from tests.service import over_nodes
from tests.service.jobs import solo_hash
from tests.service.over_nodes import WHAT, of_steps

MANY = {"ps": 6000, "node": 1500}
"""Steps of jobs to which others come."""

# What befalls a worker of MPI alone is test_lending's.
CASES = ["nothing", *(what for what in WHAT if what not in ("worker killed", "chief killed"))]

QUICK = ("agent killed",)
"""What waits for no deadline, of many that cost half a minute."""


@pytest.fixture(scope="module")
def truths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return over_nodes.truths(tmp_path_factory.mktemp("truth"))


@pytest.mark.skipif(missing() != "", reason=missing() or "nodes can be made")
@pytest.mark.parametrize(
    "what", [pytest.param(what, marks=() if what in QUICK else pytest.mark.long) for what in CASES]
)
def test_the_hash_is_solos(what: str, truths: dict[str, str], tmp_path: Path) -> None:
    with over_nodes.service(tmp_path / "place") as service:
        service.apart = True
        agents = {node: service.agent(node, slots=2) for node in (1, 2, 3)}
        service.seen("node joined", 3)
        jobs = service.submit_each()
        service.have_begun(jobs)
        if what != "nothing":
            WHAT[what](service, agents)
        service.end_as(jobs, truths)


@pytest.mark.skipif(missing() != "", reason=missing() or "nodes can be made")
@pytest.mark.long
@pytest.mark.parametrize("kind", ["node", "ps"])
def test_two_workers_become_four(kind: str, tmp_path: Path) -> None:
    text = of_steps(MANY[kind])
    with over_nodes.service(tmp_path / "place", "--resize-after", "1") as service:
        service.apart = True
        for node, slots in ((1, 1), (2, 1), (3, 2)):
            service.agent(node, slots=slots)
        service.seen("node joined", 3)
        service.said("nodes", "drain", "node-3")
        job = service.submit("-n", "1..4", text=f'{text}\n[exchange]\ntype = "{kind}"\n')
        service.reaches(job, 20)
        service.said("nodes", "resume", "node-3")
        result = service.result(job)
        assert (result["workers"], result["weights_sha256"]) == (4, solo_hash(tmp_path, text))
        service.whole(job, MANY[kind])
