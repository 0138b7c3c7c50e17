import math
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from dptrain.exchange.verdict import Ballot, Report, Verdict
from dptrain.membership import Membership
from dptrain.phases import Phase

SHARDS, BLOCKS = 8, 5
RNG = np.random.default_rng(4)
TALLIES = np.column_stack([RNG.random(SHARDS) + 1, RNG.random(SHARDS), np.arange(8.0) + 1])
SQUARES = RNG.random(BLOCKS) * 100


def subtotal(lo: int, hi: int) -> npt.NDArray[np.float64]:
    """The canonical sum of a node of eight shards: halves of halves."""
    if hi - lo == 1:
        return TALLIES[lo]
    middle = (lo + hi) // 2
    return np.asarray(subtotal(lo, middle) + subtotal(middle, hi))


def verdict(size: int, clip_norm: float = 0.0, squares: Any = SQUARES, **reports: dict[int, Any]) -> Verdict:
    """What ``size`` workers decide; ``reports`` give single workers' values of Report's fields."""
    cuts = [BLOCKS * i // size for i in range(size + 1)]
    counts = [hi - lo for lo, hi in pairwise(cuts)]
    rows, norms = [], []
    for rank in range(size):
        member = Membership(rank, size, SHARDS)
        ballot = Ballot(member, counts, clip_norm)
        tallies = np.array([subtotal(node.lo, node.hi) for node in member.nodes[rank]]).reshape(-1, 3)
        report = Report(**{name: values[rank] for name, values in reports.items() if rank in values})
        rows.append(ballot.row(report, tallies).copy())
        norms.append(ballot.row_of_squares(squares[cuts[rank] : cuts[rank + 1]]).copy())
    found = ballot.read(np.array(rows))
    return ballot.clipped(found, np.array(norms)) if clip_norm else found


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7, 8, 11])
def test_all_sums_are_the_same_for_any_number_of_workers(size: int) -> None:
    found = verdict(size, clip_norm=1.0)
    weight, loss, rows = subtotal(0, SHARDS).tolist()
    assert (found.weight, found.loss, found.rows) == (weight, loss, rows)
    square = 0.0
    for value in SQUARES.tolist():
        square += value
    assert found.norm == math.sqrt(square) / weight
    assert found.finite


def test_the_norm_is_of_the_mean_gradient_and_clips_it() -> None:
    free = verdict(3)
    assert free.norm is None
    assert free.scale == 1 / free.weight
    norm = verdict(3, clip_norm=1e9).norm
    assert norm is not None
    assert verdict(3, clip_norm=1e9).scale == free.scale
    assert verdict(3, clip_norm=norm).scale == free.scale
    clipped = verdict(3, clip_norm=norm / 4)
    assert clipped.scale * clipped.weight * norm == pytest.approx(norm / 4)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("at", range(BLOCKS))
def test_one_block_that_is_not_finite_spoils_the_step(at: int, value: float) -> None:
    squares = SQUARES.copy()
    squares[at] = value
    assert verdict(3, 1.0).finite
    assert not verdict(3, 1.0, squares).finite
    assert not verdict(1, 1.0, squares).finite


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_spoils_the_step(value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "TALLIES", TALLIES.copy())
    TALLIES[5, 1] = value
    assert not verdict(3).finite


def test_signals_failures_and_times_are_everyones() -> None:
    found = verdict(3, failure={2: 2, 1: 1}, signal={1: 15}, compute={0: 0.5}, wait={2: 0.25})
    assert found.failures == ((1, 1), (2, 2))
    assert found.signal == 15
    assert found.compute == (0.5, 0.0, 0.0)
    assert found.wait == (0.0, 0.0, 0.25)
    assert not found.phases.any()
    phases = {rank: [float(10 * rank + phase) for phase in Phase] for rank in range(3)}
    assert verdict(3, phases=phases).phases.tolist() == [phases[0], phases[1], phases[2]]
    assert verdict(3).failures == ()
    assert verdict(3).signal == 0
