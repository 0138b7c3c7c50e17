"""A process that computes for a worker of its host, beside it: ``python -m dptrain.companion``.

It inherits the memory that they share, the job and a socket, says that it is ready, and does what it is told until the
worker has ended. numpy is not imported before it is known with which kernels it is to be loaded.
"""

import json
import signal
import socket
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dptrain import arithmetic, board, supervision
from dptrain.job.spec import Job, rebuild
from dptrain.phases import Phase, Phases

if TYPE_CHECKING:
    from dptrain.exchange.parameter_server.means import Means


def main(parent: int, memory: int, setup: int, end: int, number: int) -> None:
    """Serve the worker of that process id as its process ``number``, by way of these open files."""
    supervision.die_with(parent)
    for wish in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        # These ask the worker to stop, and may come to its whole process group.
        signal.signal(wish, signal.SIG_IGN)
    with open(f"/proc/self/fd/{setup}") as file:
        wanted = json.load(file)
    job = rebuild(Job, wanted["job"])
    arithmetic.choose(job.arithmetic.kernels, job.arithmetic.threads)
    from dptrain.exchange.parameter_server.line import Gone

    with arithmetic.limited(job.arithmetic.threads), socket.socket(fileno=end) as open_end:
        try:
            Companion(job, wanted, memory, open_end, number).serve()
        except Gone:
            # The worker has ended.
            return


class Companion:
    """Says that it is ready and does what it is told; all that it raises is told first."""

    def __init__(self, job: Job, wanted: Mapping[str, Any], memory: int, end: socket.socket, number: int) -> None:
        from dptrain.exchange import shared_memory
        from dptrain.exchange.parameter_server.host_memory import HostMemory
        from dptrain.exchange.parameter_server.line import Line

        laid_out = HostMemory(**wanted["memory"])
        mapped = shared_memory.attach(f"/proc/self/fd/{memory}", laid_out.nbytes)
        assert mapped is not None
        self._job, self._wanted, self._number = job, wanted, number
        self._placed = laid_out.place(mapped)
        counts = self._placed.counts[number]
        self._line = Line(end, sent=counts.back, came=counts.to)
        self._phases = Phases()
        self._phases.cell = self._placed.signs[number]
        board.sign(self._phases.cell, number)

    def serve(self) -> None:
        """Raises Gone when the worker has ended."""
        from dptrain.exchange.parameter_server.line import Gone, Lines
        from dptrain.exchange.parameter_server.several import DONE, EVALUATE, FAILED, READY, told
        from dptrain.worker import told_at

        step, phase = 0, "setting up"
        try:
            means, fingerprint = _means(self._job, self._wanted)
            means.tell(self._phases)
            self._line.send([READY, fingerprint])
            lines = Lines([self._line])
            while True:
                lines.wait(None, self._wanted["sleepless"])
                what, number, step, *arguments = self._line.receive()
                phase = "evaluation" if what == EVALUATE else "forward and backward"
                shards, rows = means.accumulator.shards_computed, means.reader.rows_read
                started = time.perf_counter()
                self._phases.at(step + 1)
                self._do(means, what, step, arguments)
                self._phases.begin(Phase.WAITING)
                seconds = time.perf_counter() - started
                shards, rows = means.accumulator.shards_computed - shards, means.reader.rows_read - rows
                self._line.send([DONE, number, seconds, shards, rows])
        except Gone:
            raise
        except BaseException as error:  # a model's sys.exit() is no death either
            failure = told_at(error, f"process {self._number} at step {step} in {phase}")
            if failure is not error:
                traceback.print_exception(error)
            self._line.send([FAILED, told(failure)])
            sys.exit(1)

    def _do(self, means: "Means", what: str, step: int, arguments: Sequence[Any]) -> None:
        from dptrain.exchange.parameter_server.residuals import beside
        from dptrain.exchange.parameter_server.several import COMPUTE, EVALUATE, add

        placed = self._placed
        if what == COMPUTE:
            lo, hi, updates, box = arguments
            kept = beside(placed.residuals, updates) if means.accumulator.gradients.feeds_back else None
            done = means.partials(placed.weights, placed.boxes[box], step, lo, hi, kept)
            placed.tallies[box][: len(done.nodes)] = done.tallies
        elif what == EVALUATE:
            lo, hi, part, _ = arguments
            placed.rows[lo:hi] = means.evaluate(placed.weights, part, lo, hi)
        else:
            start, stop, adds, _ = arguments
            self._phases.begin(Phase.PARTIALS, "of this host")
            add(placed.boxes, adds, start, stop, means.accumulator)


def _means(job: Job, wanted: Mapping[str, Any]) -> "tuple[Means, str]":
    """What this process computes with, and the fingerprint of its bits."""
    import numpy as np

    from dptrain.assemble import assemble
    from dptrain.exchange.parameter_server.means import Means
    from dptrain.fingerprint import probe
    from dptrain.nn.layer import Workspace
    from dptrain.parts import batches_of, reader_of, start_of
    from dptrain.rule import Rule

    a = assemble(job, wanted["plan"])
    batches = batches_of(a)
    rule = Rule(job.train, batches.steps_per_epoch, a.dataset.validation.rows > 0)
    accumulator, evaluator = a.accumulator(2), a.evaluator()
    with np.errstate(all="ignore"):
        found = probe(accumulator, evaluator, a.update(rule.total_steps), start_of(a), a.sample, a.rows_per_shard)
    accumulator.workspace = Workspace()
    accumulator.at_once, evaluator.at_once = wanted["at_once"], wanted["blocks_at_once"]
    parts = {"validation": a.dataset.validation, "test": a.dataset.test}
    return Means(accumulator, evaluator, reader_of(a, batches), parts), found.fingerprint


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
