"""The methods of a parameter server: from gRPC to its hub, and nothing else. One thread for each stream."""

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import grpc

from dptrain.errors import BusyError, DptrainError, RefusedError
from dptrain.exchange.parameter_server.codec import Piece, decode_push
from dptrain.exchange.parameter_server.hub import Hub, Member
from dptrain.exchange.parameter_server.peers import Peers
from dptrain.exchange.parameter_server.service import METHODS, SERVICE
from dptrain.v1 import parameter_server_pb2 as pb
from dptrain.wire.server import Service
from dptrain.wire.tokens import Role


class Servicer:
    """The methods. Who joins waits ``join_seconds`` for a server that is not ready; ``peers``: the other servers."""

    def __init__(self, hub: Hub, join_seconds: float, peers: Peers) -> None:
        self._hub, self._join_seconds, self._peers = hub, join_seconds, peers

    def service(self) -> Service:
        """What a server serves: all of it is for workers."""
        return Service(SERVICE, self._add, dict.fromkeys(METHODS, Role.worker))

    def _add(self, server: grpc.Server) -> None:
        unary, stream = grpc.unary_unary_rpc_method_handler, grpc.stream_stream_rpc_method_handler
        handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
            "GetJob": unary(self.get_job, pb.GetJobRequest.FromString, pb.GetJobResponse.SerializeToString),
            "Join": unary(self.join, pb.JoinRequest.FromString, pb.JoinResponse.SerializeToString),
            "Lend": unary(self.lend, pb.LendRequest.FromString, pb.LendResponse.SerializeToString),
            "Leave": unary(self.leave, pb.LeaveRequest.FromString, pb.LeaveResponse.SerializeToString),
            "Work": stream(self.work, pb.WorkRequest.FromString, pb.WorkResponse.SerializeToString),
            # Chunks are bytes already when they get here.
            "Push": stream(self.push, decode_push, pb.PushResponse.SerializeToString),
            "Pull": stream(self.pull, pb.PullRequest.FromString, None),
            "Follow": stream(self.follow, pb.FollowRequest.FromString, pb.FollowResponse.SerializeToString),
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))

    def get_job(self, request: pb.GetJobRequest, context: grpc.ServicerContext) -> pb.GetJobResponse:
        """See the proto."""
        hub = self._hub
        return pb.GetJobResponse(job=hub.job, job_number=hub.number, servers=hub.servers, number=hub.server)

    def join(self, request: pb.JoinRequest, context: grpc.ServicerContext) -> pb.JoinResponse:
        """See the proto."""
        return self._hub.join(request, self._join_seconds)

    def lend(self, request: pb.LendRequest, context: grpc.ServicerContext) -> pb.LendResponse:
        """See the proto. Who comes another way is on another machine, or may be."""
        if not context.peer().startswith("unix:"):
            return pb.LendResponse()
        return self._hub.lend(request)

    def leave(self, request: pb.LeaveRequest, context: grpc.ServicerContext) -> pb.LeaveResponse:
        """See the proto."""
        self._hub.leave(request.membership, context.time_remaining())
        return pb.LeaveResponse()

    def work(self, requests: Iterator[pb.WorkRequest], context: grpc.ServicerContext) -> Iterator[pb.WorkResponse]:
        """See the proto."""
        hub = self._hub
        member = self._first(requests)
        if member is None or member.working:
            raise _stranger()
        if not context.add_callback(lambda: hub.vanish(member)):
            hub.vanish(member)

        def hear() -> None:
            # The stream's end, however it comes about, is told to the callback; what is no message ends it here.
            try:
                for request in requests:
                    if not hub.hear(request):
                        break
            except (grpc.RpcError, StopIteration, ValueError):
                pass
            except DptrainError:
                hub.vanish(member)

        listener = threading.Thread(target=hear, name=f"dptrain-hear-{member.number}", daemon=True)
        listener.start()
        yield from hub.tasks(member)

    def push(self, requests: Iterator[Piece], context: grpc.ServicerContext) -> Iterator[pb.PushResponse]:
        """See the proto."""
        for piece in requests:
            for place, outcome, reason in self._hub.push(piece):
                if outcome == pb.OUTCOME_UNSPECIFIED:
                    continue
                answer = pb.PushResponse(lease=place.lease, outcome=outcome, reason=reason)
                if outcome == pb.OUTCOME_DAMAGED:
                    answer.lo, answer.hi, answer.offset = place.lo, place.hi, place.offset
                yield answer

    def pull(self, requests: Iterator[pb.PullRequest], context: grpc.ServicerContext) -> Iterator[bytes]:
        """See the proto."""
        first = next(requests, None)
        listening = None if first is None else self._hub.listen(first)
        if listening is None:
            raise _stranger()
        if context.add_callback(listening.stop):
            yield from listening
            if listening.outlet.changed:
                raise BusyError(
                    "the parameter servers",
                    expected="those that there were",
                    found="that one is gone, or has come",
                    cure="join again",
                )

    def follow(
        self, requests: Iterator[pb.FollowRequest], context: grpc.ServicerContext
    ) -> Iterator[pb.FollowResponse]:
        """See the proto."""
        peers = self._peers
        peers.refuse_needless()
        link = peers.accept(requests)
        if not context.add_callback(link.end):
            link.end()

        def hear() -> None:
            with contextlib.suppress(grpc.RpcError, DptrainError, ValueError):
                link.listen(requests, heard=1)
            link.end()

        threading.Thread(target=hear, name=f"dptrain-server-{link.peer}", daemon=True).start()
        yield from link

    def _first(self, requests: Iterator[pb.WorkRequest]) -> Member | None:
        """Whom a stream's first message is of; None where that is nobody, or there is no message."""
        for request in requests:
            return self._hub.member(request.membership)
        return None


def _stranger() -> DptrainError:
    return RefusedError(
        "a worker",
        expected="one that has joined and takes part",
        found="one that doesn't, or doesn't any more",
        cure="join again",
    )
