import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from dptrain.exchange.communicator import Alone, Message, Posted
from dptrain.exchange.traffic import AT_ONCE, Departures, piece_length
from dptrain.layout import BLOCK
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


class Slow(Alone):
    """Nothing that it is given is done before it is told so."""

    def __init__(self) -> None:
        super().__init__()
        self.under_way: list[Message] = []

    def post(self, sends: Sequence[Message], receives: Sequence[Message], phase: str) -> Posted:
        (message,) = sends
        self.under_way.append(message)
        slow = self

        class Sent:
            def wait(self) -> None:
                raise AssertionError

            def done(self) -> bool:
                return message not in slow.under_way

        return Sent()

    def arrive(self) -> list[tuple[int, int]]:
        """The oldest message to each peer, as (peer, tag)."""
        oldest = {message.peer: message for message in reversed(self.under_way)}
        self.under_way = [message for message in self.under_way if oldest[message.peer] is not message]
        return sorted((message.peer, message.tag) for message in oldest.values())


def messages(peers: Sequence[int], tag: int) -> list[Message]:
    return [Message(peer, np.zeros(1), tag) for peer in peers]


def test_few_are_under_way_to_a_peer_and_partials_go_first() -> None:
    slow = Slow()
    departures = Departures(slow)
    assert departures.gone()
    departures.add(messages([1, 2], 0), sums=True)
    assert departures.look()
    for tag in range(1, AT_ONCE + 1):
        departures.add(messages([1, 2], tag), sums=True)
        departures.add(messages([1], 100 + tag), sums=False)
        departures.look()
    assert not departures.look()
    assert [sum(message.peer == peer for message in slow.under_way) for peer in (1, 2)] == [AT_ONCE, AT_ONCE]
    came = []
    while not departures.gone():
        came += slow.arrive()
        departures.look()
    assert [tag for peer, tag in came if peer == 2] == list(range(AT_ONCE + 1))
    # Those that went before there were others are sums, then partials overtook what still waited.
    tags = [tag for peer, tag in came if peer == 1]
    assert len(tags) == 2 * AT_ONCE + 1
    waited = tags[AT_ONCE:]
    assert waited == sorted(waited, key=lambda tag: (tag < 100, tag))
    assert waited[0] > 100


def test_small_segments_are_cut_into_small_pieces() -> None:
    elements = [1, 10 * BLOCK, 32 * BLOCK, 33 * BLOCK, 48 * BLOCK + 1, 1000 * BLOCK]
    assert [piece_length(some) // BLOCK for some in elements] == [2, 2, 2, 3, 4, 4]
    assert all(piece_length(some) % BLOCK == 0 for some in elements)
