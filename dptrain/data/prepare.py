"""What one process of a node does once: parse, check every row, split, fit the encoding, digest, plan the rest."""

import contextlib
import hashlib
import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np

from dptrain.data import cache, labels, scan, source
from dptrain.data.encoding import Encoding
from dptrain.data.fit import Mask, fit
from dptrain.data.raw import CHUNK_BYTES, Column, Raw, Request, Role, written
from dptrain.data.store import Store, describe_npy
from dptrain.errors import DataError
from dptrain.job import spec
from dptrain.random import Permutation, Purpose

ROLES: tuple[Role, ...] = ("train", "validation", "test")


def prepare(
    data: spec.Data, *, directory: Path, seed: int, cache: Path | None = None, where: str = ""
) -> dict[str, Any]:
    """The plan of the job's data: plain data that every process opens with ``open_dataset``.

    One process of a node calls this. Relative paths are meant from ``directory``; ``cache`` is the folder for what is
    parsed once (default: DPTRAIN_CACHE, or the user's cache); ``where`` goes before the file's name in messages.
    A second call for unchanged files is quick. Raises DataError for data that can't be used as the job says,
    StorageError where the cache can't be written.
    """
    return _Preparation(data, directory, seed, cache, where).plan()


class _Preparation:
    def __init__(self, data: spec.Data, directory: Path, seed: int, folder: Path | None, where: str) -> None:
        self.data = data
        self.directory = directory
        self.seed = seed
        self.where = where
        self.path = self._path(data.source)
        self.kind = source.format_of(data.source, self.path, data, where)
        self.folder = folder
        self.cache = cache.locate(folder) if self.kind != "embedded" or self._paths() else Path(os.devnull)

    def _path(self, name: str) -> Path:
        return self.directory / Path(name).expanduser()

    def _paths(self) -> list[str]:
        return [value for value in (self.data.validation, self.data.test) if isinstance(value, str)]

    def plan(self) -> dict[str, Any]:
        if self.kind == "embedded":
            return self._make()
        name = "plan-" + cache.key(spec.plain(self.data), self._identities(), self.seed)
        known = cache.recall(self.cache, name)
        if known is not None and all(_there(part) for part in known["parts"].values()):
            return dict(known)
        cache.forget(self.cache, name)
        plan = self._make()
        cache.remember(self.cache, name, plan)
        return plan

    def _identities(self) -> list[Any]:
        files: list[Path] = []
        for path in ([] if self.kind == "synthetic" else [self.path]) + list(map(self._path, self._paths())):
            if path.is_file() and self.kind != "idx":
                files.append(path)
                continue
            folder = path if path.is_dir() else path.parent
            with contextlib.suppress(OSError):  # its reader says better what is wrong with it
                files += sorted(p for p in folder.iterdir() if p.suffix == ".npy" or "ubyte" in p.name)
        return [cache.identity(path, self.where) for path in files]

    def _request(self, role: Role, known: tuple[Column, ...] = ()) -> Request:
        return Request(self.data, self.cache, self.where, role, known=known)

    def _make(self) -> dict[str, Any]:
        train = source.read(self.kind, self.data.source, self.path, self._request("train"), self.seed)
        known = (*train.columns, train.label) if train.columns is not None and train.label is not None else ()
        others = {role: self._other(role, known) for role in ROLES[1:]}
        kept = scan.keep(train, self._request("train"))
        y, target = labels.bind(train, self._request("train"), kept, None)
        total = train.x.rows if kept is None else len(kept)
        sizes = self._sizes(total, others, train.where)
        permuted = total if sum(sizes[role] for role in ROLES[1:]) else 0
        rows = self._training_rows(train.x.rows, kept, sizes["train"], permuted)
        rules = spec.plain(self.data)
        if train.columns is not None:
            rules |= {"features": [column.name for column in train.columns], "label": train.label_name}
        encoding = fit(train, y, target, self.data, rows, rules)
        kept_store = keep_rows(kept, train, self.cache)
        parts, start, digests = {}, 0, [train.digests]
        for role in ROLES:
            other = others.get(role)
            if other is not None:
                parts[role] = part_plan(other, self._request(role), encoding)
                digests.append(other.digests)
                continue
            parts[role] = _plan(train, y, encoding, sizes[role], start, permuted, kept_store)
            start += sizes[role]
        digest = hashlib.sha256(json.dumps(digests).encode()).hexdigest()
        return {
            "digest": f"sha256:{digest}",
            "seed": self.seed,
            "encoding": encoding.plan(),
            "parts": parts,
        }

    def _other(self, role: Role, known: tuple[Column, ...]) -> Raw | None:
        """The part's own files, where it isn't split off the source."""
        said = self.data.validation if role == "validation" else self.data.test
        if isinstance(said, str):
            path = self._path(said)
            kind = source.format_of(said, path, self.data, self.where)
            return source.read(kind, said, path, self._request(role, known), self.seed)
        if said > 0 and source.brings(self.kind, self.path, role, self.where):
            return source.read(self.kind, self.data.source, self.path, self._request(role, known), self.seed)
        return None

    def _sizes(self, total: int, others: dict[Role, Raw | None], where: str) -> dict[Role, int]:
        sizes: dict[Role, int] = {"train": total}
        for role, said in (("validation", self.data.validation), ("test", self.data.test)):
            split = others[role] is None and not isinstance(said, str)  # type: ignore[index]
            # A share such as 0.29 of 100 rows is meant to be 29, whatever its nearest binary fraction says.
            sizes[role] = math.floor(total * float(said) + 1e-9) if split else 0  # type: ignore[index]
            sizes["train"] -= sizes[role]  # type: ignore[index]
        if sizes["train"] < 1:
            raise DataError(
                where,
                expected="shares that leave training rows",
                found=f"{sizes['train']} of {total} rows for training",
                cure="lower data.validation and data.test",
            )
        return sizes

    def _training_rows(self, rows: int, kept: scan.Rows | None, count: int, permuted: int) -> Mask | None:
        """Marks the training rows of a file that has others too; None where all are."""
        if not permuted and kept is None:
            return None
        mask = np.zeros(rows, dtype=np.bool_)
        permutation = Permutation(permuted, self.seed, Purpose.SPLIT) if permuted else None
        step = CHUNK_BYTES // 8
        for at in range(0, count, step):
            found = np.arange(at, min(count, at + step))
            found = found if permutation is None else permutation.at(found)
            mask[found if kept is None else kept[found]] = True
        return mask


def _there(part: dict[str, Any]) -> bool:
    stores = [part["x"], part["y"], *([part["kept"]] if part["kept"] else [])]
    return all(os.path.isfile(s["path"]) and os.path.getsize(s["path"]) == s["size"] for s in stores)


def keep_rows(kept: scan.Rows | None, raw: Raw, folder: Path) -> Store | None:
    """The kept rows as a store of the cache; None where all rows are."""
    if kept is None:
        return None

    def build(into: Path) -> None:
        written(into, "rows", np.int64, (), [kept])

    digest = hashlib.sha256(kept.tobytes()).hexdigest()
    return describe_npy(cache.entry(folder, "kept-" + cache.key(digest), build) / "rows.npy")[0]


def _plan(
    raw: Raw, y: Store, encoding: Encoding, rows: int, start: int, permuted: int, kept: Store | None
) -> dict[str, Any]:
    lookup = encoding.lookup([column.vocabulary for column in raw.columns or ()])
    return {
        "x": raw.x.plan(),
        "y": y.plan(),
        "rows": rows,
        "start": start,
        "permuted": permuted,
        "kept": kept.plan() if kept else None,
        "lookup": {str(j): codes.tolist() for j, codes in lookup.items()},
    }


def part_plan(raw: Raw, request: Request, encoding: Encoding) -> dict[str, Any]:
    """The plan of a part with files of its own, checked against the training part's encoding."""
    check_like_training(raw, encoding)
    kept = scan.keep(raw, request)
    y, _ = labels.bind(raw, request, kept, encoding.target)
    rows = raw.x.rows if kept is None else len(kept)
    return _plan(raw, y, encoding, rows, 0, 0, keep_rows(kept, raw, request.cache))


def check_like_training(raw: Raw, encoding: Encoding) -> None:
    """DataError where rows have another number of values than the training rows had."""
    expected, found = encoding.raw_shape, raw.x.shape[1:]
    if math.prod(expected) != math.prod(found):
        raise DataError(
            raw.where,
            expected=f"rows of shape {expected}, as in the training data",
            found=f"{found}",
            cure="give data of the same shape",
        )
