"""A short sample of ``python -m tests.service.kills``."""

from pathlib import Path

import pytest

from tests.service.kills import KINDS, campaign


@pytest.mark.timeout(600)
def test_a_server_that_is_killed_loses_nothing_and_runs_nothing_twice(tmp_path: Path) -> None:
    verdict = campaign(tmp_path, len(KINDS), 5)
    assert verdict.good, verdict
    assert verdict.jobs >= len(KINDS)
    assert set(verdict.kills) == set(KINDS)
