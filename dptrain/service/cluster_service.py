"""ClusterService: what jobs run on."""

import os
import socket
import time

import grpc

import dptrain
from dptrain.service import convert
from dptrain.service.desk import Desk, owner_of, scope
from dptrain.service.nodes import Nodes, NodeState, View
from dptrain.v1 import cluster_service_pb2 as pb
from dptrain.v1 import cluster_service_pb2_grpc
from dptrain.wire.guard import caller
from dptrain.wire.limits import Limits


class ClusterService(cluster_service_pb2_grpc.ClusterServiceServicer):
    """See cluster_service.proto."""

    def __init__(self, desk: Desk, nodes: Nodes, allow_code: bool, limits: Limits) -> None:
        self.desk, self.nodes, self.allow_code, self.limits = desk, nodes, allow_code, limits
        self._began = time.monotonic()

    def GetServerInfo(
        self, request: pb.GetServerInfoRequest, context: grpc.ServicerContext
    ) -> pb.GetServerInfoResponse:
        """Who answers, and whom it sees."""
        counts = self.desk.store.counts(scope(context))
        return pb.GetServerInfoResponse(
            version=dptrain.__version__,
            uptime=convert.duration(time.monotonic() - self._began),
            owner=owner_of(context),
            role=caller(context).role.value,
            allow_code=self.allow_code,
            max_message_bytes=self.limits.message_bytes,
            jobs={state.name: count for state, count in counts.items()},
        )

    def ListNodes(self, request: pb.ListNodesRequest, context: grpc.ServicerContext) -> pb.ListNodesResponse:
        """This machine, or those of agents."""
        if self.nodes.here.mpi is not None:
            return pb.ListNodesResponse(nodes=[self._told(view) for view in self.nodes.views()])
        page = os.sysconf("SC_PAGE_SIZE")
        own = pb.Node(
            name=socket.gethostname(),
            slots=self.desk.conductor.slots,
            free=max(0, self.desk.conductor.free),
            cores=len(os.sched_getaffinity(0)),
            memory_bytes=page * os.sysconf("SC_PHYS_PAGES"),
            free_memory_bytes=page * os.sysconf("SC_AVPHYS_PAGES"),
            state=pb.NODE_STATE_READY,
            load=os.getloadavg()[0],
        )
        return pb.ListNodesResponse(nodes=[own])

    def DrainNode(self, request: pb.DrainNodeRequest, context: grpc.ServicerContext) -> pb.DrainNodeResponse:
        """A node takes no new work from now on."""
        return pb.DrainNodeResponse(node=self._told(self.nodes.drain(request.name, True)))

    def ResumeNode(self, request: pb.ResumeNodeRequest, context: grpc.ServicerContext) -> pb.ResumeNodeResponse:
        """A node takes work again."""
        return pb.ResumeNodeResponse(node=self._told(self.nodes.drain(request.name, False)))

    def _told(self, view: View) -> pb.Node:
        said = view.registration
        free = self.desk.conductor.free_of(said.name, said.slots)
        return pb.Node(
            name=said.name,
            slots=said.slots,
            free=max(0, free) if view.state is NodeState.READY else 0,
            cores=said.cores,
            memory_bytes=said.memory_bytes,
            free_memory_bytes=view.health.free_memory_bytes,
            state=pb.NodeState.ValueType(view.state),
            message=view.message,
            address=said.address,
            arithmetic=said.arithmetic,
            load=view.health.load,
        )
