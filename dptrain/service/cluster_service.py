"""ClusterService: what jobs run on."""

import os
import socket
import time

import grpc

import dptrain
from dptrain.service import convert
from dptrain.service.desk import Desk, owner_of, scope
from dptrain.v1 import cluster_service_pb2 as pb
from dptrain.v1 import cluster_service_pb2_grpc
from dptrain.wire.guard import caller
from dptrain.wire.limits import Limits


class ClusterService(cluster_service_pb2_grpc.ClusterServiceServicer):
    """See cluster_service.proto."""

    def __init__(self, desk: Desk, allow_code: bool, limits: Limits) -> None:
        self.desk, self.allow_code, self.limits = desk, allow_code, limits
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
        """This machine."""
        page = os.sysconf("SC_PAGE_SIZE")
        return pb.ListNodesResponse(
            nodes=[
                pb.Node(
                    name=socket.gethostname(),
                    slots=self.desk.conductor.slots,
                    free=max(0, self.desk.conductor.free),
                    cores=len(os.sched_getaffinity(0)),
                    memory_bytes=page * os.sysconf("SC_PHYS_PAGES"),
                    free_memory_bytes=page * os.sysconf("SC_AVPHYS_PAGES"),
                )
            ]
        )
