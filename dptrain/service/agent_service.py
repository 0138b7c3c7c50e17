"""AgentService: one stream for each agent."""

import json
import queue
import threading
from collections.abc import Iterator

import grpc

from dptrain.errors import UnreachableError, UsageError
from dptrain.service.loans import Loans
from dptrain.service.nodes import HEALTH_SECONDS, SILENT_SECONDS, Node, Nodes
from dptrain.service.shipping import Offers
from dptrain.v1 import agent_service_pb2 as pb
from dptrain.v1 import agent_service_pb2_grpc


class AgentService(agent_service_pb2_grpc.AgentServiceServicer):
    """See agent_service.proto."""

    def __init__(self, nodes: Nodes, offers: Offers, loans: Loans) -> None:
        self.nodes, self.offers, self.loans = nodes, offers, loans

    def Serve(
        self, request_iterator: Iterator[pb.ServeRequest], context: grpc.ServicerContext
    ) -> Iterator[pb.ServeResponse]:
        """A node from its registration to its end."""
        first = next(request_iterator, None)
        if first is None or first.WhichOneof("said") != "registration":
            raise UsageError(
                "AgentService.Serve",
                expected="a registration first",
                found="nothing" if first is None else str(first.WhichOneof("said")),
                cure="use the same version of dptrain on both sides",
            )
        node = self.nodes.join(first.registration)
        reader = threading.Thread(target=self._read, args=(request_iterator, node), name="agent", daemon=True)
        reader.start()
        try:
            yield pb.ServeResponse(welcome=pb.Welcome(health_seconds=HEALTH_SECONDS))
            while context.is_active():
                try:
                    told = node.told.get(timeout=HEALTH_SECONDS)
                except queue.Empty:
                    if self.nodes.silent(node):
                        raise self._lose(node, f"its agent has said nothing for {SILENT_SECONDS:g} s") from None
                    continue
                if told is None:
                    break
                yield told
            if self.nodes.closed:
                raise self._lose(node, "the server stops")
        finally:
            self.nodes.leave(node, "its agent's connection broke")

    def FetchFile(self, request: pb.FetchFileRequest, context: grpc.ServicerContext) -> Iterator[pb.FetchFileResponse]:
        """A file of a job's data."""
        for data in self.offers.read(request.sha256):
            yield pb.FetchFileResponse(data=data)

    def Carry(
        self, request_iterator: Iterator[pb.CarryRequest], context: grpc.ServicerContext
    ) -> Iterator[pb.CarryResponse]:
        """What a worker asks of a launch's supervisor."""
        loan = None
        for request in request_iterator:
            if loan is None:
                loan = self.loans.find(request.ticket)
            if request.asked:
                answer, data = loan.do(request.asked, request.data)
                yield pb.CarryResponse(answered=json.dumps(answer).encode(), data=data)
            else:
                yield pb.CarryResponse(job=json.dumps(loan.job).encode(), items=loan.items)

    def _read(self, requests: Iterator[pb.ServeRequest], node: Node) -> None:
        """What an agent says, until it says no more; ends the stream."""
        try:
            for message in requests:
                said = message.WhichOneof("said")
                if said == "health":
                    self.nodes.hear(node, message.health)
                elif said == "output":
                    self.nodes.happen(node, message.output)
                elif said == "exited":
                    self.nodes.happen(node, message.exited)
                elif said == "leaving":
                    self.nodes.leave(node, "")
        except Exception:  # the connection broke, or what came over it was no message
            pass
        finally:
            node.told.put(None)

    def _lose(self, node: Node, why: str) -> UnreachableError:
        self.nodes.leave(node, why)
        return UnreachableError(
            f"node {node.registration.name}", expected="to take part", found=why, cure="its agent is to connect again"
        )
