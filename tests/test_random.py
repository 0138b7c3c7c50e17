import math
import tracemalloc

import numpy as np
import pytest

from dptrain.random import Permutation, Purpose, bits, stream

SIZES = [
    1,
    2,
    3,
    4,
    5,
    7,
    8,
    9,
    10,
    15,
    16,
    17,
    97,
    99,
    100,
    101,
    255,
    256,
    257,
    1797,
    4095,
    4096,
    4097,
    10_007,
    65_536,
]


def order(n, seed=1, *words):
    return Permutation(n, seed, Purpose.SHUFFLE, *words).at(np.arange(n))


@pytest.mark.parametrize("n", SIZES)
def test_every_element_appears_once(n):
    for seed in (0, 1, 2**63 - 1):
        np.testing.assert_array_equal(np.sort(order(n, seed)), np.arange(n))


def test_any_position_alone_is_the_same_as_in_the_whole():
    permutation = Permutation(1009, 5, Purpose.SHUFFLE, 3)
    whole = permutation.at(np.arange(1009))
    asked = np.array([[1008, 0], [17, 17]])
    np.testing.assert_array_equal(permutation.at(asked), whole[asked])
    assert permutation.at(asked).dtype == np.int64
    assert int(permutation.at(44)) == whole[44]
    assert permutation.at([]).shape == (0,)


def test_the_bits_never_change():
    # The splits and epochs of stored runs depend on these values.
    assert order(10, 7, 2).tolist() == [7, 5, 2, 4, 9, 6, 1, 8, 0, 3]
    far = Permutation(10**12, 7, Purpose.SPLIT).at([0, 1, 10**12 - 1])
    assert far.tolist() == [258449591245, 518448960652, 140970267492]
    assert bits(1, Purpose.SPLIT, 2, 3).random_raw(2).tolist() == [12909789892702885962, 10894098461376240617]


@pytest.mark.parametrize("other", [(2, 1000, 1), (1, 1000, 2)])
def test_another_seed_or_epoch_gives_an_unrelated_order(other):
    seed, n, epoch = other
    a, b = order(n, 1, 1), order(n, seed, epoch)
    # The number of positions two random orders agree in is about Poisson with mean 1.
    assert np.count_nonzero(a == b) <= 9
    assert not np.array_equal(a, b)


def test_another_purpose_gives_another_order():
    at = np.arange(1000)
    a = Permutation(1000, 1, Purpose.SPLIT).at(at)
    b = Permutation(1000, 1, Purpose.SHUFFLE).at(at)
    assert np.count_nonzero(a == b) <= 9


def _chi_square(n, cells, permuted):
    """Of (position, element) counted in cells x cells equal buckets; its z-score by the normal approximation."""
    table = np.zeros((cells, cells))
    np.add.at(table, (np.arange(n) * cells // n, permuted * cells // n), 1)
    expected = n / cells**2
    freedom = (cells - 1) ** 2
    statistic = ((table - expected) ** 2 / expected).sum()
    return (statistic - freedom) / math.sqrt(2 * freedom)


def _serial(permuted):
    """Correlation of neighbours, in units of its standard deviation."""
    return np.corrcoef(permuted[:-1], permuted[1:])[0, 1] * math.sqrt(len(permuted))


@pytest.mark.parametrize("n", [9_973, 10_000, 65_536, 65_537])
def test_it_looks_random(n):
    scores = []
    for epoch in range(8):
        permuted = order(n, 11, epoch)
        scores += [_chi_square(n, 16, permuted), _serial(permuted)]
        scores.append(np.corrcoef(np.arange(n), permuted)[0, 1] * math.sqrt(n))
    assert np.abs(scores).max() < 5
    assert abs(np.mean(scores)) < 1


def test_the_measures_of_randomness_see_what_is_not():
    n = 10_000
    assert abs(_chi_square(n, 16, np.arange(n))) > 100
    assert abs(_serial(np.arange(n))) > 50
    stride = np.arange(n) * 3_333 % n  # a linear congruence passes the eye, not the test
    assert abs(_chi_square(n, 16, stride)) > 10


def test_small_orders_are_equally_frequent():
    # All 24 orders of 4 elements; chi-square with 23 degrees of freedom, mean 23, deviation 6.8.
    seen = {}
    for seed in range(2_400):
        key = tuple(order(4, seed).tolist())
        seen[key] = seen.get(key, 0) + 1
    assert len(seen) == 24
    assert sum((count - 100) ** 2 / 100 for count in seen.values()) < 70


def test_fixed_points_are_as_rare_as_chance_has_them():
    fixed = [np.count_nonzero(order(500, seed) == np.arange(500)) for seed in range(400)]
    assert 0.75 < np.mean(fixed) < 1.25  # 1 in the mean, deviation 0.05 over 400 orders


@pytest.mark.parametrize("n", [10**9, 10**12])
def test_random_access_into_huge_ranges_needs_no_memory(n):
    tracemalloc.start()
    permutation = Permutation(n, 3, Purpose.SHUFFLE, 1)
    at = np.concatenate([np.arange(5_000), np.arange(n - 5_000, n)])
    found = permutation.at(at)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2_000_000
    assert found.min() >= 0
    assert found.max() < n
    assert len(np.unique(found)) == len(at)
    # Uniform over range(n): the mean of 10,000 draws lies within five deviations of the middle.
    assert abs(found.mean() / n - 0.5) < 5 / math.sqrt(12 * len(at))


@pytest.mark.parametrize("position", [-1, 10])
def test_positions_outside_are_refused(position):
    with pytest.raises(IndexError, match=r"range\(10\)"):
        Permutation(10, 1, Purpose.SPLIT).at([position])


def test_no_elements_are_refused():
    with pytest.raises(ValueError, match="at least one"):
        Permutation(0, 1, Purpose.SPLIT)


def test_streams_are_keyed():
    draw = stream(1, Purpose.DROPOUT, 2, 3, 4).random(8)
    np.testing.assert_array_equal(draw, stream(1, Purpose.DROPOUT, 2, 3, 4).random(8))
    others = [
        (2, Purpose.DROPOUT, 2, 3, 4),
        (1, Purpose.MODEL, 2, 3, 4),
        (1, Purpose.DROPOUT, 3, 3, 4),
        (1, Purpose.DROPOUT, 2, 4, 4),
        (1, Purpose.DROPOUT, 2, 3, 5),
        (1, Purpose.DROPOUT, 3, 2, 4),
    ]
    for words in others:
        assert not np.any(draw == stream(*words).random(8))
    with pytest.raises(ValueError, match="three words"):
        stream(1, Purpose.DROPOUT, 1, 2, 3, 4)
