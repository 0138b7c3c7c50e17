import threading
import tracemalloc

import numpy as np
import pytest

from dptrain.data.batches import Batches, Reader
from dptrain.errors import DataError
from dptrain.random import Permutation, Purpose

N = 53
X = np.arange(N * 2, dtype=np.float32).reshape(N, 2)
Y = np.arange(N) % 3


@pytest.fixture
def part(bench):
    bench.npz(x=X, y=Y)
    return bench.open("data.npz", validation=0.0, test=0.0).train


@pytest.fixture
def split(bench):
    bench.npz(x=X, y=Y)
    return bench.open("data.npz", validation=0.1, test=0.1).train


def batches(part, batch=10, shards=4, shuffle=True, drop_last=False, seed=1):
    return Batches(part, seed=seed, batch_size=batch, shards=shards, shuffle=shuffle, drop_last=drop_last)


@pytest.mark.parametrize("batch", [1, 3, 10, 52, 53])
@pytest.mark.parametrize("shards", [1, 3, 4, 8])
@pytest.mark.parametrize("shuffle", [True, False])
def test_an_epoch_has_every_row_once(part, batch, shards, shuffle):
    b = batches(part, batch, shards, shuffle)
    assert b.steps_per_epoch == -(-N // batch)
    for epoch in (0, 3):
        steps = range(epoch * b.steps_per_epoch, (epoch + 1) * b.steps_per_epoch)
        assert {b.epoch_of(step) for step in steps} == {epoch}
        order = np.concatenate([b.positions(step, 0, shards) for step in steps])
        truth = Permutation(N, 1, Purpose.SHUFFLE, epoch).at(np.arange(N)) if shuffle else np.arange(N)
        np.testing.assert_array_equal(order, truth)
        assert [b.count(step) for step in steps] == [min(batch, N - i * batch) for i in range(len(steps))]


def test_dropping_the_last_batch(part):
    b = batches(part, 10, drop_last=True)
    assert b.steps_per_epoch == 5
    assert [b.count(step) for step in range(11)] == [10] * 11
    assert b.epoch_of(5) == 1
    assert batches(part, 53, drop_last=True).steps_per_epoch == 1


@pytest.mark.parametrize(("batch", "shards"), [(10, 4), (10, 3), (3, 8), (9, 8), (53, 5)])
def test_shards_cut_every_batch_the_same_way(part, batch, shards):
    b = batches(part, batch, shards)
    size = b.rows_per_shard
    assert size == -(-batch // shards)
    for step in range(b.steps_per_epoch):
        whole = b.positions(step, 0, shards)
        for lo in range(shards + 1):
            for hi in range(lo, shards + 1):
                np.testing.assert_array_equal(b.positions(step, lo, hi), whole[lo * size : hi * size])
                np.testing.assert_array_equal(b.file_rows(step, lo, hi), part.file_rows(whole[lo * size : hi * size]))
                counts = b.counts(step, lo, hi)
                assert counts == tuple(len(whole[s * size : (s + 1) * size]) for s in range(lo, hi))


def test_epochs_and_seeds_differ(part):
    b = batches(part)
    assert not np.array_equal(b.positions(0, 0, 4), b.positions(b.steps_per_epoch, 0, 4))
    assert not np.array_equal(b.positions(0, 0, 4), batches(part, seed=2).positions(0, 0, 4))


def test_fewer_rows_than_a_batch_are_refused(part):
    with pytest.raises(DataError, match="expected at least one batch of 54 rows, found 53 training rows"):
        batches(part, 54)


class Huge:
    rows = 10**9

    def file_rows(self, positions):
        return positions


def test_a_billion_row_epoch_needs_no_index():
    tracemalloc.start()
    b = batches(Huge(), 1024, 8)
    first = b.file_rows(0, 2, 4)
    last = b.file_rows(b.steps_per_epoch - 1, 0, 8)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2_000_000
    assert len(first) == 256
    assert len(last) == 10**9 % 1024
    assert first.max() > 10**8


def reader(part, prefetch=False, **keys):
    return Reader(batches(part, **keys), (2,), np.float32, (), np.int64, prefetch=prefetch)


def test_shards_are_loaded_and_padded_with_zeros(part):
    b = batches(part, 10, 4)
    with reader(part) as read:
        for step in [0, 5, 0]:  # 5 is the last of the epoch, with 3 rows: one full shard, nothing else
            loaded = read.load(step, 0, 4, None)
            assert (loaded.x.shape, loaded.y.shape, loaded.rows.shape) == ((4, 3, 2), (4, 3), (4, 3))
            assert loaded.rows.dtype == np.float32
            rows = b.file_rows(step, 0, 4)
            n = len(rows)
            np.testing.assert_array_equal(loaded.x.reshape(12, 2), np.vstack([X[rows], np.zeros((12 - n, 2))]))
            np.testing.assert_array_equal(loaded.y.ravel(), [*Y[rows], *[0] * (12 - n)])
            np.testing.assert_array_equal(loaded.rows.ravel(), [1] * n + [0] * (12 - n))
            assert loaded.counts == b.counts(step, 0, 4)


@pytest.mark.parametrize("prefetch", [False, True])
def test_only_ones_own_rows_are_read(split, prefetch):
    b = batches(split, 10, 4)
    with reader(split, prefetch) as read:
        for step in range(8):
            read.load(step, 1, 3, (step + 1, 1, 3) if step < 7 else None)
    assert split.mapped
    assert split.rows_read == sum(sum(b.counts(step, 1, 3)) for step in range(8))
    assert split.rows_read < 8 * 10


def test_a_worker_without_shards_gets_empty_arrays(part):
    with reader(part) as read:
        loaded = read.load(0, 2, 2, None)
    assert (loaded.x.shape, loaded.counts) == ((0, 3, 2), ())
    assert part.rows_read == 0


def requests(rng, steps):
    """Requests and the announcements before them, a third of which are wrong or missing."""
    asked = []
    for _ in range(steps):
        lo, hi = sorted(rng.integers(0, 5, 2).tolist())
        asked.append((int(rng.integers(0, 30)), lo, hi))
    then = [
        following if kind else wrong if other else None
        for following, wrong, kind, other in zip(
            asked[1:], asked[::-1][1:], rng.random(steps - 1) > 0.3, rng.random(steps - 1) > 0.5, strict=True
        )
    ]
    return list(zip(asked, [*then, None], strict=True))


@pytest.mark.parametrize("seed", range(5))
def test_reading_ahead_changes_nothing(split, seed):
    plan = requests(np.random.default_rng(seed), 60)
    with reader(split) as plain, reader(split, prefetch=True) as ahead:
        before = None
        for request, then in plan:
            truth = [np.copy(part) for part in plain.load(*request, None)[:3]]
            loaded = ahead.load(*request, then)
            for expected, found in zip(truth, loaded[:3], strict=True):
                np.testing.assert_array_equal(found, expected)
            if before is not None:  # what was loaded before is still as it was
                for expected, found in zip(*before, strict=True):
                    np.testing.assert_array_equal(found, expected)
            before = truth, loaded[:3]


def names():
    return [thread.name for thread in threading.enumerate() if thread.name == "dptrain-prefetch"]


def test_the_thread_ends_with_the_reader(part):
    assert not names()
    read = reader(part, prefetch=True)
    assert len(names()) == 1
    read.load(0, 0, 4, (1, 0, 4))
    read.close()
    read.close()
    assert not names()
    with reader(part):
        assert not names()


def test_an_error_ahead_of_time_is_raised_by_the_load_that_wants_the_rows(part, bench):
    with reader(part, prefetch=True) as read:
        import os

        from dptrain.data import dataset

        assert dataset.Part is type(part)
        path = next(bench.cache.glob("npz-*/array.npy"))
        first = read.load(0, 0, 4, None)
        kept = first.x.copy()
        for file in bench.cache.glob("npz-*/array.npy"):
            os.truncate(file, 64)
        # The step before asks for it; only the next load may fail.
        with pytest.raises(DataError, match="as when it was opened"):
            read.load(1, 0, 4, (2, 0, 4))
        np.testing.assert_array_equal(first.x, kept)
        read._pending = (2, 0, 4)
        read._wanted.put((2, 0, 4))
        with pytest.raises(DataError, match=str(path.parent.parent)):
            read.load(2, 0, 4, None)
    assert not names()
