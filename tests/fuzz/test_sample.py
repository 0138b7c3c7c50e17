"""A seeded sample; the long campaigns are ``python -m tests.fuzz --runs 100000`` and ``python -m tests.fuzz.page``."""

from importlib import import_module
from pathlib import Path

import pytest

from tests.fuzz import page
from tests.fuzz.__main__ import TARGETS, campaign


@pytest.mark.parametrize("name", TARGETS)
def test_no_message_ends_a_server_or_meets_a_bug(name: str) -> None:
    tally = campaign(import_module(f"tests.fuzz.{name}"), runs=400, seed=6)
    assert tally.bad == []
    assert tally.messages >= 400
    assert 3 * tally.reached >= tally.messages


def test_no_request_breaks_the_page_or_is_told_too_much(tmp_path: Path) -> None:
    with page.page(tmp_path) as live:
        tally = page.campaign(live, 400, 6)
    assert tally.bad == []
    assert {path for path, _ in tally.answers} == {path for path, _ in page.routes()}
    assert 3 * tally.reached >= tally.requests


def test_an_answer_that_tells_too_much_is_seen() -> None:
    someone = page.Who("read", "x", "x")
    policy = {"content-security-policy": "x", "x-content-type-options": "nosniff"}
    asked = page.Request("/api/jobs/{job}/{verb}", "POST", someone, b"", True)
    assert page.judged(asked, "403", b"{}", policy) == ""
    assert "look on" in page.judged(asked, "200", b"{}", policy)
    assert "inside" in page.judged(asked, "400", b'Traceback: File "x"', policy)
    assert "policy" in page.judged(asked, "404", b"{}", {})
    assert "bug" in page.judged(asked, "500", b"{}", policy)
    stream = page.Request("/api/stream", "GET", someone, b"", True)
    assert "owner" in page.judged(stream, "200", page.SECRET.encode(), policy)
    assert "nobody" in page.judged(stream._replace(who=page.Who("", "", "")), "200", b"jobs", policy)
