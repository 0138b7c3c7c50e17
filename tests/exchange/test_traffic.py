import json
from typing import Any

import pytest

from tests.mpirun import ranks

Results = list[dict[str, Any]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    folder = tmp_path_factory.mktemp("traffic")
    done = ranks(4, "tests.exchange.traffic_suite", str(folder))
    assert done.returncode == 0, done.stderr
    found: Results = json.loads((folder / "found.json").read_text())
    return found


def test_parts_that_leave_during_backward_have_the_bits_of_solo(results: Results) -> None:
    some = [result for result in results if result["case"] == "nothing"]
    assert len(some) == 6
    for result in some:
        assert result["weights_sha256"] == result["solo"], result["shape"]
        assert sum(result["left"]) >= 2 * result["steps"], "nothing left early"


def test_a_step_that_is_passed_over_takes_back_what_has_left(results: Results) -> None:
    truth = {r["gradients"]: r["weights_sha256"] for r in results if r["case"] == "nothing"}
    some = [result for result in results if result["case"] == "nan"]
    assert len(some) == 6
    for result in some:
        assert result["weights_sha256"] == result["solo"], result["shape"]
        assert result["weights_sha256"] != truth[result["gradients"]]


def test_nobody_waits_for_parts_of_one_that_fails(results: Results) -> None:
    some = [result for result in results if result["case"] == "crash"]
    assert len(some) == 6
    for result in some:
        assert "rank 2 at step 4" in result["error"], result
