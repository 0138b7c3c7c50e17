"""How every contestant but dptrain, which has a loop of its own, is driven and measured."""

import time
from collections.abc import Callable
from typing import Any

from bench.rows import Integers, orders
from bench.workload import WARMUP, Workload

Step = Callable[[Integers], Any]
"""Trains on the rows of one global batch; returns the mean loss of this worker's rows, perhaps still being computed."""


def train(work: Workload, step: Step, barrier: Callable[[], None]) -> dict[str, float]:
    """Train, all workers alike; samples a second after the warm-up, and this worker's mean loss at the end.

    The clock covers whole steps: shuffling, gathering of rows, forward, loss, backward, exchange, update.
    """
    total: Any = 0.0
    loss: Any = 0.0
    order, epochs = None, orders(work.seed)
    started = 0.0
    for number in range(work.total_steps):
        if number == WARMUP:
            float(loss)  # whatever was only asked for is done now
            barrier()
            started = time.perf_counter()
        at = number % work.steps_per_epoch
        if at == 0 or order is None:
            order = next(epochs)
        loss = step(order[at * work.batch : (at + 1) * work.batch])
        if number >= work.judged_from:
            total = total + loss
    mean = float(total) / (work.total_steps - work.judged_from)
    barrier()
    seconds = time.perf_counter() - started
    return {"samples_per_second": work.steps * work.batch / seconds, "loss": mean}
