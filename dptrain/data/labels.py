"""Labels: classes or numbers, and the numbering of classes."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dptrain.data import cache
from dptrain.data.arrays import text_array
from dptrain.data.encoding import Target
from dptrain.data.raw import Raw, Request, chunks, written
from dptrain.data.store import Opened, Store, describe_npy
from dptrain.errors import DataError
from dptrain.layout import Array


def kind_of(raw: Raw, store: Store, request: Request) -> str:
    """``classes`` or ``numbers``, as the job says or else as the labels look."""
    if request.data.task != "auto":
        return request.data.task
    if raw.label is not None:
        return "classes" if raw.label.kind == "text" or raw.label.integer else "numbers"
    return "numbers" if np.dtype(store.dtype).kind == "f" else "classes"


def bind(raw: Raw, request: Request, kept: Array | None, target: Target | None) -> tuple[Store, Target]:
    """The labels as a store of class numbers or of numbers, and what they mean.

    ``kept`` are the rows that count (None: all). ``target`` is the training part's, which the labels must then
    match; None for the training part itself. Raises DataError for labels that are not what they should be.
    """
    store = raw.y
    assert store is not None
    kind = target.kind if target is not None else kind_of(raw, store, request)
    text = raw.label.kind == "text" if raw.label is not None else np.dtype(store.dtype).kind in "US"
    if kind == "numbers":
        if text:
            raise _wrong(raw, "numbers", "text", 'set data.task = "classes"')
        if len(store.shape) > 2:
            raise _wrong(raw, "labels of shape (n,) or (n, width)", f"{store.shape}", "reshape them")
        width = 1 if len(store.shape) == 1 else store.shape[1]
        found = Target("numbers", 0, width, (raw.label_name,) if width == 1 else ())
        if target is not None and target.width != width:
            raise _wrong(raw, f"{target.width} numbers a row", f"{width}", "give the same labels as for training")
        return store, target or found
    store = _flat(raw, store)
    names = target.names if target is not None else None
    if raw.label is None and not text and np.dtype(store.dtype).kind in "biu":
        return store, _count(raw, store, request, kept, target)
    return _numbered(raw, store, request, kept, names)


def _wrong(raw: Raw, expected: str, found: str, cure: str, row: int | None = None) -> DataError:
    place = f"{raw.where} label" if row is None else f"{raw.where} row {row}"
    return DataError(place, expected=expected, found=found, cure=cure)


def _flat(raw: Raw, store: Store) -> Store:
    if any(n != 1 for n in store.shape[1:]):
        cure = 'give one class a row, or set data.task = "numbers"'
        raise _wrong(raw, "labels of shape (n,)", f"{store.shape}", cure)
    return Store(store.path, store.shape[:1], store.dtype, store.offset, store.size)


def _count(raw: Raw, store: Store, request: Request, kept: Array | None, target: Target | None) -> Target:
    """The classes of integer labels, which must be 0..C-1."""
    data = request.data
    labels = Opened(store).array
    said = target.classes if target is not None else data.classes
    limit = said or data.max_categories
    highest = 0
    for lo, hi in chunks(len(labels), labels.itemsize):
        block = labels[lo:hi] if kept is None else labels[kept[(kept >= lo) & (kept < hi)]]
        if not len(block):
            continue
        low, high = int(block.min()), int(block.max())
        highest = max(highest, high)
        if low < 0 or high >= limit:
            bad = np.flatnonzero((labels[lo:hi] < 0) | (labels[lo:hi] >= limit))
            row = lo + int(bad[0] if kept is None else next(i for i in bad if lo + i in kept))
            raise _wrong(
                raw,
                f"a class from 0 to {limit - 1}",
                f"{int(labels[row])}",
                "correct the label" if said else 'set data.classes or data.max_categories, or data.task = "numbers"',
                row,
            )
    classes = said or highest + 1
    return target or Target("classes", classes, 1, tuple(map(str, range(classes))))


def _values(raw: Raw, store: Store) -> npt.NDArray[np.str_]:
    """Every row's class by name, as text."""
    if raw.label is not None and raw.label.kind == "text":
        words = np.array([*raw.label.vocabulary, ""])
        return np.asarray(words[Opened(store).array.astype(np.int64)])
    if np.dtype(store.dtype).kind in "US":
        return np.asarray(text_array(store))
    numbers = Opened(store).array
    finite = np.where(np.isfinite(numbers), numbers, 0)
    broken = np.flatnonzero((finite != np.trunc(finite)) | (np.abs(finite) >= 1 << 53))
    if len(broken):
        row = int(broken[0])
        raise _wrong(raw, "a whole number as the class", f"{numbers[row]}", 'set data.task = "numbers"', row)
    return finite.astype(np.int64).astype(np.str_)


def _numbered(
    raw: Raw, store: Store, request: Request, kept: Array | None, names: Sequence[str] | None
) -> tuple[Store, Target]:
    """Labels that have names: numbered in sorted order (whole numbers by value) into a store in the cache."""
    values = _values(raw, store)
    used = values if kept is None else values[kept]
    if names is None:
        words = [str(word) for word in np.unique(used)]
        whole = all(word.lstrip("-").isdigit() for word in words)
        names = sorted(words, key=int) if whole else words
        limit = request.data.classes or request.data.max_categories
        if len(names) > limit:
            cure = 'set data.classes or data.max_categories, or data.task = "numbers"'
            raise _wrong(raw, f"at most {limit} classes", f"{len(names)}", cure)
    order = np.argsort(np.array(names))
    ordered = np.array(names)[order]
    at = np.minimum(np.searchsorted(ordered, values), len(ordered) - 1)
    codes = np.where(ordered[at] == values, order[at], -1)
    unknown = np.flatnonzero(codes < 0) if kept is None else kept[codes[kept] < 0]
    if len(unknown):
        row = int(unknown[0])
        listed = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
        raise _wrong(raw, f"one of the classes {listed}", f"{str(values[row])!r}", "correct the label", row)

    def build(into: Path) -> None:
        written(into, "classes", np.int64, (), [codes])

    made = cache.entry(request.cache, "classes-" + cache.key(raw.digests, store.plan(), list(names)), build)
    return describe_npy(made / "classes.npy")[0], Target("classes", len(names), 1, tuple(names))
