"""Other arithmetics of gradients over every exchange, held to solo's SHA-256. One mpirun of eight ranks runs all."""

import json
from typing import Any

import pytest

from tests.exchange.declared_suite import ROUNDS
from tests.exchange.jobs import DECLARED
from tests.exchange.test_exchange import Results, same, some
from tests.mpirun import ranks

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    folder = tmp_path_factory.mktemp("declared")
    done = ranks(8, "tests.exchange.declared_suite", str(folder))
    assert done.returncode == 0, done.stderr
    found: Results = json.loads((folder / "found.json").read_text())
    return found


@pytest.mark.parametrize(("name", "shards", "gradients"), DECLARED)
def test_every_number_of_workers_gives_the_bits_of_solo(
    results: Results, name: str, shards: int, gradients: str
) -> None:
    wanted: dict[str, Any] = {"job": name, "shards": shards, "gradients": gradients}
    (truth,) = some(results, case="solo", **wanted)
    others = some(results, case="node", **wanted)
    assert {result["size"] for result in others} == {size for sizes in ROUNDS for size in sizes}
    if gradients != "top_k":
        others += some(results, case="segments", **wanted) + some(results, case="machines", **wanted)
    for result in others:
        same(result, truth)
        assert result["arithmetic"]["gradients"] == gradients
    (plain,) = some(results, case="plain", **wanted)
    for key in ("weights_sha256", "job_sha256", "fingerprint"):
        assert truth[key] != plain[key], key


def test_residuals_go_on_under_other_workers(results: Results) -> None:
    (straight,) = some(results, case="straight")
    by_size = {result["size"]: result for result in some(results, case="resumed")}
    assert [by_size[size]["attempt"] for size in (3, 5, 1)] == [1, 2, 3]
    assert by_size[1]["weights_sha256"] == straight["weights_sha256"]


def test_where_the_arithmetic_can_not_be_kept_it_is_refused(results: Results) -> None:
    for kind, gradients in (("allreduce", "bfloat16"), ("allreduce", "top_k"), ("segments", "top_k")):
        (refused,) = some(results, case="refused", kind=kind, gradients=gradients)
        assert gradients in refused["error"]
