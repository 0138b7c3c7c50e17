"""Plain numpy and mpi4py: forward, backward, Allreduce in place, the same update on every worker. Run under mpirun.

``--naive``: one Allreduce for each tensor and an update for each, as ChainerMN's naive communicator does; otherwise
gradients lie in one vector and travel at once.
"""

import json
import sys

from mpi4py import MPI

from bench import clock
from bench.contestants.numpy_model import Network
from bench.rows import Integers, read
from bench.workload import Workload


def main(work: Workload, naive: bool) -> None:
    """Train as one of the workers; rank 0 prints what it came to."""
    comm = MPI.COMM_WORLD
    lo, hi = comm.rank * work.rows, (comm.rank + 1) * work.rows
    network = Network(work.network, work.seed, flat=not naive)
    x, y = read(work.data)

    def step(batch: Integers) -> float:
        mine = batch[lo:hi]
        loss = network.differentiate(x[mine], y[mine])
        for _, gradient, _ in network.whole:
            comm.Allreduce(MPI.IN_PLACE, gradient)
        network.update(1 / comm.size, work.lr, work.momentum)
        return loss

    found = clock.train(work, step, comm.Barrier)
    found["loss"] = comm.allreduce(found["loss"]) / comm.size
    if comm.rank == 0:
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(Workload.parse(sys.argv[1]), "--naive" in sys.argv[2:])
