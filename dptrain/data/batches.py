"""Which rows are in which batch and shard, and reading them, the next request ahead of its time."""

import queue
import threading
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from dptrain.data.dataset import Part, Positions
from dptrain.errors import DataError
from dptrain.layout import Array
from dptrain.random import Permutation, Purpose

_AHEAD = 4_096
"""Rows whose places are computed at once: a permutation costs much per call and little per element."""


class Batches:
    """The global batches of a part: a function of seed and step alone, computed for the asked rows only.

    Batch ``step`` belongs to epoch ``step // steps_per_epoch`` and holds ``batch_size`` rows, fewer at the end of an
    epoch unless ``drop_last``. Shard s has its rows s * b to (s + 1) * b, b = ``rows_per_shard``, as far as they go.
    DataError where the part has fewer rows than a batch. For one thread at a time.
    """

    def __init__(self, part: Part, *, seed: int, batch_size: int, shards: int, shuffle: bool, drop_last: bool) -> None:
        if part.rows < batch_size:
            raise DataError(
                "training data",
                expected=f"at least one batch of {batch_size} rows",
                found=f"{part.rows} training rows",
                cure="lower train.batch_size or give more data",
            )
        self.part = part
        self.batch_size = batch_size
        self.shards = shards
        self.rows_per_shard = -(-batch_size // shards)
        self.steps_per_epoch = part.rows // batch_size if drop_last else -(-part.rows // batch_size)
        self._seed = seed
        self._shuffle = shuffle
        self._epochs: dict[int, Permutation] = {}
        self._known: dict[tuple[int, int, int], list[Positions]] = {}

    def epoch_of(self, step: int) -> int:
        """The epoch that the step belongs to."""
        return step // self.steps_per_epoch

    def count(self, step: int) -> int:
        """Real rows of the step's batch."""
        return min(self.batch_size, self.part.rows - step % self.steps_per_epoch * self.batch_size)

    def counts(self, step: int, lo: int, hi: int) -> tuple[int, ...]:
        """Real rows of each of the shards lo to hi - 1."""
        rows, b = self.count(step), self.rows_per_shard
        if hi * b <= rows:
            return (b,) * (hi - lo)
        return tuple(max(0, min(b, rows - shard * b)) for shard in range(lo, hi))

    def positions(self, step: int, lo: int, hi: int) -> Positions:
        """The positions in the part of the real rows of the shards lo to hi - 1, shard after shard."""
        epoch, index = divmod(step, self.steps_per_epoch)
        return self._ordered(epoch, self._span(index, lo, hi))

    def file_rows(self, step: int, lo: int, hi: int) -> Positions:
        """Where the part's files hold the rows at :meth:`positions`; computed for some steps at once."""
        epoch, index = divmod(step, self.steps_per_epoch)
        span = max(1, _AHEAD // max(1, (hi - lo) * self.rows_per_shard))
        first = index - index % span
        key = (step - index + first, lo, hi)
        if key not in self._known:
            spans = [self._span(i, lo, hi) for i in range(first, min(first + span, self.steps_per_epoch))]
            rows = self.part.file_rows(self._ordered(epoch, np.concatenate(spans)))
            while len(self._known) >= 4:
                del self._known[next(iter(self._known))]
            self._known[key] = np.split(rows, np.cumsum([len(s) for s in spans])[:-1])
        return self._known[key][index - first]

    def _span(self, index: int, lo: int, hi: int) -> Positions:
        start, b = index * self.batch_size, self.rows_per_shard
        rows = min(self.batch_size, self.part.rows - start)
        return np.arange(start + min(lo * b, rows), start + min(hi * b, rows), dtype=np.int64)

    def _ordered(self, epoch: int, places: Positions) -> Positions:
        if not self._shuffle:
            return places
        if epoch not in self._epochs:
            self._epochs = {epoch: Permutation(self.part.rows, self._seed, Purpose.SHUFFLE, epoch)}
        return self._epochs[epoch].at(places)


class Loaded(NamedTuple):
    """Shards ready for a pass: ``x`` (k, b, *sample), ``y`` (k, b[, width]), ``rows`` (k, b) of 1 and 0, ``counts``.

    Padding is zero. All belong to the reader: they stay as they are until the next load but one.
    """

    x: Array
    y: Array
    rows: Array
    counts: tuple[int, ...]


Request = tuple[int, int, int]
"""(step, lo, hi)."""


class Reader:
    """Loads the shards of a step; with ``prefetch`` one thread reads the next request meanwhile.

    ``x_dtype`` is what the model takes (floating-point, or int64 for an embedding), ``y_shape`` the shape of one
    row's label: () for classes, (width,) for numbers. To be closed; usable in a with statement.
    """

    def __init__(
        self,
        batches: Batches,
        sample_shape: Sequence[int],
        x_dtype: npt.DTypeLike,
        y_shape: Sequence[int],
        y_dtype: npt.DTypeLike,
        *,
        prefetch: bool,
        dtype: npt.DTypeLike = np.float32,
    ) -> None:
        self._batches = batches
        self._kinds = ((tuple(sample_shape), np.dtype(x_dtype)), (tuple(y_shape), np.dtype(y_dtype)))
        self._dtype = np.dtype(dtype)
        # One set in use, one valid still, and with prefetch one more that is being filled.
        self._sets: list[tuple[Array, Array] | None] = [None] * (3 if prefetch else 2)
        self._turn = 0
        self._masks: dict[tuple[int, ...], Array] = {}
        self._pending: Request | None = None
        self._wanted: queue.SimpleQueue[Request | None] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[Loaded | Exception] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="dptrain-prefetch", daemon=True) if prefetch else None
        if self._thread is not None:
            self._thread.start()

    @property
    def rows_read(self) -> int:
        """Rows of the part that have been read so far."""
        return self._batches.part.rows_read

    def load(self, step: int, lo: int, hi: int, then: Request | None = None) -> Loaded:
        """The shards lo to hi - 1 of ``step``; ``then`` names the request that will probably be next.

        Raises DataError where the data can't be read, also where that was found out ahead of time.
        """
        ahead = self._finish()
        if ahead is not None and ahead[0] != (step, lo, hi):
            # What was read in vain gives its memory back, or a set that is still valid would be next.
            self._turn = (self._turn - 1) % len(self._sets)
            ahead = None
        if ahead is None:
            loaded = self._read(step, lo, hi)
        elif isinstance(ahead[1], Exception):
            raise ahead[1]
        else:
            loaded = ahead[1]
        if then is not None and self._thread is not None:
            self._pending = then
            self._wanted.put(then)
        return loaded

    def close(self) -> None:
        """End the thread and let the memory go. May be called twice."""
        if self._thread is not None:
            self._wanted.put(None)
            self._thread.join()
            self._thread = None
        self._pending = None
        self._sets = [None] * len(self._sets)

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _finish(self) -> tuple[Request, Loaded | Exception] | None:
        """What was read ahead, waiting for it; None where nothing was."""
        if self._pending is None:
            return None
        pending, self._pending = self._pending, None
        return pending, self._done.get()

    def _work(self) -> None:
        while (request := self._wanted.get()) is not None:
            try:
                self._done.put(self._read(*request))
            except Exception as error:  # raised again by the load that wants these rows
                self._done.put(error)

    def _read(self, step: int, lo: int, hi: int) -> Loaded:
        counts = self._batches.counts(step, lo, hi)
        self._turn = (self._turn + 1) % len(self._sets)
        x, y = self._memory(hi - lo)
        # Only the last real shard of a batch can be part full, so the real rows are the first ones.
        real, b = sum(counts), self._batches.rows_per_shard
        flat_x, flat_y = x.reshape(-1, *x.shape[2:]), y.reshape(-1, *y.shape[2:])
        if real:
            self._batches.part.read_rows(self._batches.file_rows(step, lo, hi), flat_x, flat_y)
        if real < len(flat_x):
            flat_x[real:] = 0
            flat_y[real:] = 0
        return Loaded(x, y, self._mask(counts, b), counts)

    def _memory(self, k: int) -> tuple[Array, Array]:
        kept = self._sets[self._turn]
        if kept is None or len(kept[0]) < k:
            b = self._batches.rows_per_shard
            x, y = (np.empty((k, b, *shape), dtype) for shape, dtype in self._kinds)
            kept = self._sets[self._turn] = x, y
        return kept[0][:k], kept[1][:k]

    def _mask(self, counts: tuple[int, ...], b: int) -> Array:
        known = self._masks.get(counts)
        if known is None:
            if len(self._masks) >= 8:
                self._masks.clear()
            known = (np.arange(b) < np.array(counts, dtype=np.int64)[:, None]).astype(self._dtype)
            known.flags.writeable = False
            self._masks[counts] = known
        return known
