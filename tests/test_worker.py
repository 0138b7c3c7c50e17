import signal
import threading
from typing import Any

import pytest

from dptrain.errors import DataError, PeerFailed, WorkerCrashed
from dptrain.exchange.communicator import Alone
from dptrain.worker import STOP_SIGNALS, StopRequest, named, together


class Among(Alone):
    """One of several workers, the others of which report given codes."""

    def __init__(self, rank: int, codes: list[int]) -> None:
        self.rank, self.size, self.codes = rank, len(codes), codes
        self.members = tuple(range(self.size))
        self.sent: list[Any] = []

    def allgather_json(self, content: Any, phase: str) -> list[Any]:
        self.sent.append(content)
        return [content if rank == self.rank else code for rank, code in enumerate(self.codes)]


BAD = DataError("x.csv row 3", expected="a number", found="'a'", cure="mend it")


def bad() -> None:
    raise BAD


def crash() -> None:
    raise ValueError("no\nway")


def leave() -> None:
    raise SystemExit(7)


def test_where_all_succeed_all_go_on() -> None:
    among = Among(1, [0, 0, 0])
    assert together(among, "reading", lambda: 5) == 5
    assert among.sent == [0]
    assert not among.agreed


@pytest.mark.parametrize(("action", "code"), [(bad, 2), (crash, 1), (leave, 1)])
def test_the_one_that_fails_raises_its_own(action: Any, code: int) -> None:
    among = Among(1, [0, 0, 2])
    with pytest.raises((DataError, WorkerCrashed)) as caught:
        together(among, "reading", action)
    assert among.sent == [code]
    assert among.agreed
    assert caught.value.exit_code == code
    if action is bad:
        assert caught.value is BAD
    else:
        assert caught.value.where == "rank 1 at step 0 in reading"
        assert caught.value.__cause__ is not None


@pytest.mark.parametrize("action", [bad, lambda: 5])
def test_the_others_leave_quietly_with_the_same_code(action: Any) -> None:
    among = Among(2, [0, 3, 0])
    with pytest.raises(PeerFailed) as caught:
        together(among, "reading", action)
    assert (caught.value.rank, caught.value.exit_code) == (1, 3)
    assert among.agreed


def test_a_failure_is_named_once() -> None:
    assert named(BAD, 3, 4, "somewhere") is BAD
    assert str(named(ValueError(), 3, 4, "evaluation")).startswith("rank 3 at step 4 in evaluation: ")
    assert named(ValueError("why"), 0, 0, "x").found == "ValueError: why"
    assert named(KeyError(), 0, 0, "x").found == "KeyError"


def test_the_first_signal_is_remembered_and_handlers_are_put_back() -> None:
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    stop = StopRequest()
    with stop.listening():
        assert stop.signal == 0
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        assert stop.signal == signal.SIGTERM
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before


def test_in_another_thread_no_handler_is_set() -> None:
    found = []

    def listen() -> None:
        with StopRequest().listening():
            found.append([signal.getsignal(number) for number in STOP_SIGNALS])

    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert found == [[signal.getsignal(number) for number in STOP_SIGNALS]]
