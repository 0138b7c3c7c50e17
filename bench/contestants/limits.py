"""What no contestant can pass on this machine: a step's products alone, and its exchange's bytes. Run under mpirun."""

import json
import math
import sys
import time
from collections.abc import Callable

import numpy as np
from mpi4py import MPI

from bench.workload import Model, Workload
from dptrain.errors import ArithmeticMismatch
from dptrain.job import spec
from dptrain.nn.products import Matmul, maker, numpy_matmul

ITEM = 4
"""Bytes of a float32."""

BLOCK = 1 << 20
"""Bytes of a convolution's windows that are multiplied at once, so that they come from the L2 cache."""

SECONDS = 1.0

Product = Callable[[], object]


def products(model: Model, rows: int, matmul: Matmul = numpy_matmul) -> list[Product]:
    """Every matrix product of one step on ``rows`` rows: forward, weight gradients, and input gradients but the first.

    Of a convolution they are those of the windows laid out as rows, some images at a time.
    """
    found: list[Product] = []
    for i, (layer, before, after) in enumerate(model.tensors()):
        if layer["type"] == "linear":
            found += _three(matmul, rows, before[0], after[0], 1, first=i == 0)
        elif layer["type"] == "conv2d":
            windows, fan_in = math.prod(after[:2]), layer["kernel"] ** 2 * before[2]
            images = max(1, min(rows, BLOCK // (windows * fan_in * ITEM)))
            found += _three(matmul, images * windows, fan_in, after[2], -(-rows // images), first=i == 0)
    return found


def _three(matmul: Matmul, m: int, k: int, n: int, times: int, *, first: bool) -> list[Product]:
    rng = np.random.default_rng(0)
    x, W, dy = (rng.standard_normal(shape, dtype=np.float32) for shape in ((m, k), (k, n), (m, n)))
    y, dW, dx = np.empty_like(dy), np.empty_like(W), np.empty_like(x)
    some: list[Product] = [lambda: matmul(x, W, out=y), lambda: matmul(x.T, dy, out=dW)]
    if not first:
        some.append(lambda: matmul(dy, W.T, out=dx))
    return some * times


def exchange_bytes(parameters: int, workers: int) -> int:
    """What an exchange on one machine must read and write at the least, SGD with momentum included.

    All gradients read once; weights and momenta read once and written once.
    """
    return (workers + 4) * parameters * ITEM


def pass_seconds(nbytes: int, comm: MPI.Comm, seconds: float = SECONDS) -> float:
    """The quickest time in which all workers together read two thirds and write one third of ``nbytes``.

    Every worker adds two arrays into a third; an exchange of two workers reads and writes in the same proportion.
    """
    elements = max(1, nbytes // (3 * ITEM * comm.size))
    a, b, c = (np.ones(elements, np.float32) for _ in range(3))
    return _quickest(lambda: np.add(a, b, out=c), comm, seconds)


def _quickest(action: Product, comm: MPI.Comm, seconds: float) -> float:
    """Over ten rounds of ``seconds`` in all, the shortest mean of a round; the slowest worker of each counts."""
    action()
    comm.Barrier()
    started = time.perf_counter()
    action()
    once = comm.allreduce(time.perf_counter() - started, MPI.MAX)
    times = max(1, int(seconds / 10 / max(once, 1e-7)))
    rounds = []
    for _ in range(10):
        comm.Barrier()
        started = time.perf_counter()
        for _ in range(times):
            action()
        rounds.append(float(comm.allreduce((time.perf_counter() - started) / times, MPI.MAX)))
    return min(rounds)


def products_seconds(work: Workload, comm: MPI.Comm, matmul: Matmul = numpy_matmul) -> float:
    """The quickest time of all products of a step."""
    some = products(work.network, work.rows, matmul)

    def every() -> None:
        for product in some:
            product()

    return _quickest(every, comm, SECONDS)


def mkl_products_seconds(work: Workload, comm: MPI.Comm) -> float:
    """The same by MKL, set as dptrain sets it; 0 where it can't be had."""
    try:
        matmul = maker(spec.Arithmetic(products="mkl"))
    except ArithmeticMismatch:
        return 0.0
    return products_seconds(work, comm, matmul)


def main(work: Workload) -> None:
    """Measure both for the workload and print what samples a second they allow."""
    comm = MPI.COMM_WORLD
    computing = products_seconds(work, comm)
    exchanging = pass_seconds(exchange_bytes(work.network.parameters, work.workers), comm, SECONDS / 2)
    by_mkl = mkl_products_seconds(work, comm)
    if comm.rank == 0:
        found = {
            "products_seconds": computing,
            "exchange_seconds": exchanging,
            "products_samples_per_second": work.batch / computing,
            "samples_per_second": work.batch / (computing + exchanging),
        }
        if by_mkl:
            found["mkl_products_samples_per_second"] = work.batch / by_mkl
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(Workload.parse(sys.argv[1]))
