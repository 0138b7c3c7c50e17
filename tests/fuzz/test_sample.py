"""A seeded sample; the long campaign is ``python -m tests.fuzz --runs 100000``."""

from importlib import import_module

import pytest

from tests.fuzz.__main__ import TARGETS, campaign


@pytest.mark.parametrize("name", TARGETS)
def test_no_message_ends_a_server_or_meets_a_bug(name: str) -> None:
    tally = campaign(import_module(f"tests.fuzz.{name}"), runs=400, seed=6)
    assert tally.bad == []
    assert tally.messages >= 400
    assert 3 * tally.reached >= tally.messages
