"""From what the job calls its source to the reader of its format."""

import os
from pathlib import Path

from dptrain.data.raw import Raw, Request, Role
from dptrain.data.store import EMBEDDED, shown, unreadable
from dptrain.errors import DataError
from dptrain.job import spec

_SUFFIXES = {
    ".npz": "npz", ".npy": "npy", ".csv": "csv", ".tsv": "csv", ".csv.gz": "csv", ".tsv.gz": "csv",
    ".parquet": "parquet", ".pq": "parquet",
    "-ubyte": "idx", ".idx": "idx", "-ubyte.gz": "idx", ".idx.gz": "idx",
}  # fmt: skip


def format_of(source: str, path: Path, data: spec.Data, where: str) -> str:
    """The format of a source: as the job says, else by its name; DataError where neither tells."""
    if data.format != "auto":
        return data.format
    if not path.exists() and source in (*EMBEDDED, "synthetic"):
        return "embedded" if source in EMBEDDED else "synthetic"
    if path.is_dir():
        return "npy" if any(path.glob("*.npy")) else "idx"
    for suffix, name in _SUFFIXES.items():
        if path.name.lower().endswith(suffix):
            return name
    cure = "correct data.source or set data.format"
    if not path.exists():
        listed = ", ".join(EMBEDDED)
        if not path.suffix and os.sep not in source:
            raise DataError(
                shown(source, where),
                expected=f"a path, 'synthetic' or one of {listed}",
                found="no such file",
                cure=cure,
            )
        raise unreadable(FileNotFoundError(2, "No such file or directory"), path, where)
    kinds = "npz, npy, csv, IDX or parquet"
    raise DataError(shown(path, where), expected=f"a file of {kinds}", found=f"{path.name!r}", cure=cure)


def read(kind: str, source: str, path: Path, request: Request, seed: int) -> Raw:
    """The rows of a source. The readers are imported only here, so that nobody else pays for them."""
    if kind == "embedded":
        from dptrain.data.made import read_embedded

        return read_embedded(source, request)
    if kind == "synthetic":
        from dptrain.data.made import read_synthetic

        return read_synthetic(seed, request)
    if not path.exists() or not os.access(path, os.R_OK):
        missing = FileNotFoundError(2, "No such file or directory")
        raise unreadable(PermissionError(13, "Permission denied") if path.exists() else missing, path, request.where)
    if path.is_dir() and kind not in ("npy", "idx"):
        raise unreadable(IsADirectoryError(21, "Is a directory"), path, request.where)
    return _read_file(kind, path, request)


def _read_file(kind: str, path: Path, request: Request) -> Raw:
    if kind in ("npz", "npy"):
        from dptrain.data import arrays

        return arrays.read_npz(path, request) if kind == "npz" else arrays.read_folder(path, request)
    if kind == "idx":
        from dptrain.data.idx import read_idx

        return read_idx(path, request)
    if kind == "csv":
        from dptrain.data.delimited import read_csv

        return read_csv(path, request)
    from dptrain.data.parquet import read_parquet

    return read_parquet(path, request)


def brings(kind: str, path: Path, role: Role, where: str) -> bool:
    """Whether the source holds a part of its own for ``role``, so that none need be split off."""
    if kind == "idx" and path.is_dir():
        from dptrain.data.idx import images_of

        return images_of(path, role) is not None
    if kind in ("npz", "npy"):
        from dptrain.data import arrays

        if kind == "npz":
            return arrays.own_part(dict.fromkeys(arrays.npz_names(path, where)), role)
        return path.is_dir() and arrays.own_part(arrays.folder_arrays(path), role)
    return False
