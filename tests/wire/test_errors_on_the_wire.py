import logging

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from dptrain import errors
from dptrain.errors import DptrainError, JobError, PeerFailed, ResidualsLost, WorkerCrashed
from dptrain.wire import statuses
from dptrain.wire.channel import connect
from dptrain.wire.security import Calling
from dptrain.wire.server import Server
from dptrain.wire.statuses import told
from tests.wire.echo import KINDS, Echo, call


def family(kind: type[DptrainError] = DptrainError) -> list[type[DptrainError]]:
    return [kind, *(below for child in kind.__subclasses__() for below in family(child))]


def test_every_error_has_a_code() -> None:
    own = [kind for kind in family() if kind.__module__ == "dptrain.errors"]
    assert {kind.__name__ for kind in own} - {kind.__name__ for kind in statuses.CODES} == {
        "DptrainError",
        PeerFailed.__name__,  # said by another worker itself
        ResidualsLost.__name__,  # never leaves a run
    }


@pytest.mark.parametrize("kind", statuses.CODES, ids=lambda kind: kind.__name__)
def test_an_error_comes_back_as_it_was(kind: type[DptrainError]) -> None:
    class Ended(grpc.RpcError, grpc.Call):  # type: ignore[misc]
        """What a client's call is after it ended with a status; only what the mapping asks it for."""

        def __init__(self, status: grpc.Status) -> None:
            self.status = status

        def code(self) -> grpc.StatusCode:
            return self.status.code

        def details(self) -> str:
            return self.status.details

        def trailing_metadata(self) -> object:
            return self.status.trailing_metadata

    Ended.__abstractmethods__ = frozenset()
    error = kind("über: here", expected="a", found="b" * 5000, cure="c\nd")
    back = statuses.to_error(Ended(statuses.to_status(error)), "x")
    assert type(back) is kind
    assert (back.where, back.expected, back.cure) == (error.where, error.expected, error.cure)
    assert len(back.found) == statuses.LONGEST_PART
    assert errors.exit_code(back) == errors.exit_code(error)


@pytest.mark.parametrize("method", KINDS)
def test_what_a_method_raises_the_client_raises(
    guarded: Server, tokens: dict[str, str], method: str, caplog: pytest.LogCaptureFixture
) -> None:
    with connect(guarded.address, Calling(tokens["submit"])) as channel:
        with pytest.raises(JobError, match="found 'många'; write 3"), told(guarded.address):
            call(channel, method, b"job")
        with pytest.raises(grpc.RpcError) as bare:
            call(channel, method, b"job")
        with caplog.at_level(logging.ERROR, "dptrain.wire"), pytest.raises(WorkerCrashed) as bug, told("x"):
            call(channel, method, b"bug")
        with pytest.raises(grpc.RpcError) as own:
            call(channel, method, b"abort")
    assert bare.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    details = rpc_status.from_call(bare.value).details
    request = error_details_pb2.BadRequest()
    assert details[1].Unpack(request)
    assert request.field_violations[0].field == "job.toml: train.epochs"
    assert "secret" not in str(bug.value)
    assert "secret of the server" in caplog.text
    assert (own.value.code(), own.value.details()) == (grpc.StatusCode.NOT_FOUND, "as the method says")


def test_a_server_goes_on_after_all_of_it(guarded: Server, echo: Echo, tokens: dict[str, str]) -> None:
    with connect(guarded.address, Calling(tokens["submit"])) as channel:
        for value in (b"job", b"bug", b"abort"):
            for method in KINDS:
                with pytest.raises(grpc.RpcError):
                    call(channel, method, value)
        assert all(call(channel, method) for method in KINDS)
