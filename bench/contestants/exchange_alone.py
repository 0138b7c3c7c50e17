"""Exchanges without a model: finished gradients in, updated weights out. Run under mpirun; rank 0 prints JSON."""

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from bench.contestants.limits import exchange_bytes, pass_seconds
from bench.rows import Floats
from dptrain.exchange.mpi import connect
from dptrain.exchange.protocol import Exchange
from dptrain.exchange.verdict import Report
from dptrain.job.load import check, complete
from dptrain.job.spec import Job
from dptrain.nn.accumulate import Partials
from dptrain.optim import worth_compiling
from dptrain.parts import Parts
from dptrain.state import State

LR, MOMENTUM = 1e-3, 0.9

Act = Callable[[], None]


class Vector:
    """A model of one tensor with ``n`` elements, as far as the parts of a run look at it."""

    def __init__(self, n: int) -> None:
        self.n = n

    def parameters(self, rng: np.random.Generator) -> dict[str, Any]:
        """All zero."""
        return {"w": np.zeros(self.n)}

    def forward(self, params: dict[str, Any], x: Any, rng: Any) -> tuple[Any, Callable[[Any], dict[str, Any]]]:
        """The same ten logits for every row."""
        logits = np.zeros((len(x), 10), x.dtype) + params["w"][:1]
        return logits, lambda dy: {"w": np.full(self.n, dy.sum(), dy.dtype)}


def job(shards: int, kind: str, compiled: str) -> Job:
    """A job whose exchange is the one wanted, with numpy's updates or (where numba is installed) compiled ones."""
    content = {
        "data": {"validation": 0.0, "test": 0.0},
        "model": {"python": "given:directly"},
        "optimizer": {"lr": LR, "momentum": MOMENTUM},
        "train": {"batch_size": shards, "shards": shards, "steps": 1},
        "exchange": {"type": kind},
        "arithmetic": {"compiled": compiled},
    }
    return complete(check(content, "exchange"))


class Ours:
    """An exchange of dptrain, as a run has it, and the state that it leads on."""

    def __init__(self, kind: str, compiled: str, n: int, comm: Any) -> None:
        parts = Parts(job(comm.size, kind, compiled), Vector(n), comm)
        parts.reader.close()
        exchange: Exchange = parts.exchange
        self.exchange = exchange
        nodes = exchange.membership.nodes[comm.rank]
        self.partials = Partials(nodes, exchange.outbox[: len(nodes)], np.ones((len(nodes), 3)))
        store = exchange.store
        self.state = State(0, 0, store.weights(0), store.slots(0), 0)
        self.moments = [*store.slots(0), *store.slots(1)]
        self.report = Report()

    def fill(self, gradient: Floats) -> None:
        """Make ``gradient`` this worker's."""
        self.partials.vectors[0] = gradient

    def __call__(self) -> None:
        self.state, _ = self.exchange.swap(self.state, self.partials, self.report)

    @property
    def weights(self) -> Floats:
        """As they are now."""
        return self.state.weights


class Plain:
    """What a loop in numpy does: MPI adds, then SGD passes over whole vectors, on every worker or on rank 0."""

    def __init__(self, n: int, comm: Any, *, at_root: bool) -> None:
        self.comm, self.at_root = comm, at_root
        self.gradient, self.weights, moments, self.scratch = (np.zeros(n, np.float32) for _ in range(4))
        self.moments = [moments]
        self.total = np.zeros(n, np.float32) if at_root and comm.rank == 0 else None

    def fill(self, gradient: Floats) -> None:
        """Make ``gradient`` this worker's."""
        self.gradient[:] = gradient

    def __call__(self) -> None:
        from mpi4py import MPI

        if not self.at_root:
            self.comm.Allreduce(MPI.IN_PLACE, self.gradient)
            self._update(self.gradient)
            return
        self.comm.Reduce(self.gradient, self.total)
        if self.total is not None:
            self._update(self.total)
        self.comm.Bcast(self.weights)

    def _update(self, gradient: Floats) -> None:
        # The mean is left where the sum was, so that in-place reductions of it come to the same every time.
        gradient *= 1 / self.comm.size
        (moments,) = self.moments
        moments *= MOMENTUM
        moments += gradient
        np.multiply(moments, LR, out=self.scratch)
        self.weights -= self.scratch


OURS = {
    "dptrain node": ("node", "never"),
    "dptrain node, extra `compiled`": ("node", "auto"),
    "dptrain segments": ("segments", "never"),
    "dptrain allreduce": ("allreduce", "never"),
}
PLAIN = {"Allreduce + update": False, "Reduce + update + Bcast": True}


def main(n: int, repeats: int, elements: int) -> None:
    """Every way on vectors of ``n``, interleaved, some ``elements`` elements a round of each."""
    comm = connect()
    from mpi4py import MPI

    world = MPI.COMM_WORLD
    ways: dict[str, Ours | Plain] = {
        name: Ours(*kind, n, comm) for name, kind in OURS.items() if kind[1] == "never" or worth_compiling("auto", n)
    }
    ways |= {name: Plain(n, world, at_root=at_root) for name, at_root in PLAIN.items()}
    gradient = np.random.default_rng(comm.rank).standard_normal(n, dtype=np.float32)
    differences = [_differences(ways, gradient)]
    # Some ways add into the gradients, which would grow without end; zeros don't, nor do their momenta wither away.
    for way in ways.values():
        way.fill(np.zeros_like(gradient))
        for moments in way.moments:
            moments.fill(0)
    times = max(3, min(1_000, elements // n))
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(-1, repeats):
        for name, way in ways.items():
            world.Barrier()
            started = time.perf_counter()
            for _ in range(times):
                way()
            elapsed = world.allreduce(time.perf_counter() - started, MPI.MAX)
            if repeat >= 0:  # the round before is the warm-up
                seconds[name].append(elapsed / times)
    differences.append(_differences(ways, gradient))
    nbytes = exchange_bytes(n, comm.size)
    bound = pass_seconds(nbytes, world)
    worst = {name: max(some[name] for some in differences) for name in ways}
    if comm.rank == 0:
        found = {"times": times, "seconds": seconds, "differences": worst, "bytes": nbytes, "bound": bound}
        print(json.dumps(found), flush=True)


def _differences(ways: dict[str, Ours | Plain], gradient: Floats) -> dict[str, float]:
    """How far each way's weights are from those after Allreduce, as a share of the largest, after one more update."""
    for way in ways.values():
        way.fill(gradient)
        way()
    reference = ways["Allreduce + update"].weights
    scale = float(np.abs(reference).max())
    return {name: float(np.abs(way.weights - reference).max()) / scale for name, way in ways.items()}


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
