"""Snapshots on disk: whole or not there, checked by checksums, in a layout that knows no number of workers.

A generation is a directory ``step-<n>`` with ``state.safetensors`` and ``manifest.json``. It is written under another
name, flushed to the disk, read back from it, and renamed; several generations stay. The tensors lie in the file exactly
as in the flat vectors, so the file is a header and the snapshot's own bytes, and is read without copying (the format is
safetensors', so other programs read it too; there is no pickle).

Every byte is hashed once: the manifest holds a checksum of each tensor, one of the file's header with all of those, and
one of itself.
"""

import contextlib
import hashlib
import json
import os
import secrets
import shutil
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dptrain.afar import FarPath
from dptrain.errors import CheckpointError, DptrainError, StorageError
from dptrain.layout import Array, Layout, digest
from dptrain.state import Judgement, State

FORMAT = 2
STATE, MANIFEST = "state.safetensors", "manifest.json"
_DTYPES = {"float32": "F32", "float64": "F64"}
_ASIDE = ".old"
_UNFINISHED = ".writing-"
_CHUNK = 1 << 18
"""Bytes that are read back at once: they stay in a core's cache until they are compared."""


@dataclass
class Snapshot:
    """A copy of a committed state: vectors by group name, and what the manifest says besides checksums."""

    groups: dict[str, Array]
    manifest: dict[str, Any]

    @classmethod
    def of(
        cls,
        state: State,
        best: Array | None,
        slot_names: tuple[str, ...],
        facts: Mapping[str, Any],
        memory: dict[str, Array] | None = None,
    ) -> "Snapshot":
        """Copy ``state``; the only thing that a checkpoint makes the steps wait for.

        ``memory`` holds vectors by group name that are written over; what it lacks is added to it.
        """
        memory = {} if memory is None else memory
        vectors = {"weights": state.weights, **dict(zip(slot_names, state.slots, strict=True))}
        vectors |= {residual(shard): vector for shard, vector in enumerate(state.residuals)}
        if best is not None:
            vectors["best"] = best
        for name, vector in vectors.items():
            if name not in memory:
                memory[name] = np.empty_like(vector)
            np.copyto(memory[name], vector)
        manifest = {
            "format": FORMAT,
            "step": state.step,
            "updates": state.updates,
            "judgement": asdict(state.judgement),
            **facts,
        }
        return cls({name: memory[name] for name in vectors}, manifest)


def residual(shard: int) -> str:
    """The name of the group that holds a shard's residual."""
    return f"residual-{shard}"


def save(folder: Path, snapshot: Snapshot, layout: Layout) -> Path:
    """Write one generation; after it returns the snapshot survives a crash of the machine. Raises StorageError."""
    name = f"step-{snapshot.manifest['step']:010d}"
    writing = _unfinished(folder / name)
    try:
        _make(folder)
        writing.mkdir()
        head = _header(snapshot.groups, layout)
        _write(writing / STATE, [head, *snapshot.groups.values()])
        _write(writing / MANIFEST, [json.dumps(_manifest(snapshot, layout, head), indent=1).encode()])
        flush_folder(writing)
        target, aside = folder / name, folder / f"{name}{_ASIDE}"
        if target.exists():
            # Under this name it is still a generation, should the next rename never come.
            _remove(aside)
            target.rename(aside)
        writing.rename(target)
        flush_folder(folder)
        _remove(aside)
    except OSError as error:
        _remove(writing)
        raise StorageError(
            f"checkpoint {folder / name}",
            expected="to be written",
            found=error.strerror or str(error),
            cure="make room or make the folder writable; older checkpoints are untouched",
        ) from error
    return target


def _manifest(snapshot: Snapshot, layout: Layout, head: bytes) -> dict[str, Any]:
    tensors = {
        f"{group}/{name}": digest(view)
        for group, vector in snapshot.groups.items()
        for name, view in _tensors(vector, layout).items()
    }
    manifest = {
        **snapshot.manifest,
        "layout": layout.describe(),
        "groups": list(snapshot.groups),
        "header_bytes": len(head),
        "tensors": tensors,
        "sha256": _sha256_of_all(head, tensors),
    }
    manifest["manifest_sha256"] = _sha256_of_json(manifest)
    return manifest


def prune(folder: Path, keep: int, trusted: int | None = None) -> None:
    """Remove all but the newest ``keep`` generations, and the newest of a step up to ``trusted``."""
    found = generations(folder)
    beyond_doubt = next((one for one in found if trusted is not None and step_of(one) <= trusted), None)
    for old in found[keep:]:
        if old == beyond_doubt:
            continue
        # Half removed under its own name it would be a broken generation.
        removing = _unfinished(old)
        with contextlib.suppress(OSError):
            old.rename(removing)
            _remove(removing)


def generations(folder: Path) -> list[Path]:
    """The generations of a run, newest first."""
    if not folder.is_dir():
        return []
    found = (p for p in folder.iterdir() if p.name.removeprefix("step-").removesuffix(_ASIDE).isdigit())
    return sorted((p for p in found if p.name.startswith("step-")), key=lambda p: p.name.removesuffix(_ASIDE))[::-1]


def clean(folder: Path) -> None:
    """Remove what a writer that died left unfinished in a folder of checkpoints, or of a run.

    A generation that was to be replaced, and was not, gets its name back. No other may be writing there: what it has
    not finished is lost.
    """
    if not folder.is_dir():
        return
    for entry in list(folder.iterdir()):
        if entry.name.endswith(_ASIDE) and entry.is_dir():
            with contextlib.suppress(OSError):
                if entry.with_suffix("").exists():
                    _removed(entry)
                else:
                    entry.rename(entry.with_suffix(""))
        elif entry.name.startswith(_UNFINISHED):
            with contextlib.suppress(OSError):
                if entry.is_dir():
                    _removed(entry)
                else:
                    entry.unlink()


def read(generation: Path, layout: Layout | None = None) -> Snapshot:
    """One generation, checked against all of its checksums and, if given, the layout. Raises CheckpointError."""
    manifest = read_manifest(generation)
    if layout is not None and manifest["layout"] != layout.describe():
        raise _broken(generation, "the tensors of this job's model", "others", "resume with the job it was made by")
    try:
        content = _content(generation / STATE)
    except OSError as error:
        raise _broken(generation, f"a readable {STATE}", error.strerror or str(error)) from None
    start, tensors = manifest["header_bytes"], manifest["tensors"]
    head = content[:start].tobytes()
    if _sha256_of_all(head, tensors) != manifest["sha256"]:
        raise _broken(generation, f"{STATE} with a header of the manifest's checksum", "another")
    header = json.loads(head[8:])
    ends = {name: header[name]["data_offsets"] for name in tensors}
    length = start + max((stop for _, stop in ends.values()), default=0)
    if len(content) != length:
        raise _broken(generation, f"{length} bytes in {STATE}", f"{len(content)}")
    for name, (lo, hi) in ends.items():
        if digest(content[start + lo : start + hi]) != tensors[name]:
            raise _broken(generation, f"tensor {name} in {STATE} with the manifest's checksum", "another")
    return Snapshot(_groups(content, start, header, manifest["groups"]), manifest)


def _groups(content: Array, start: int, header: Mapping[str, Any], names: Iterable[str]) -> dict[str, Array]:
    """The vectors of a whole file of ours, as views into its bytes."""
    dtypes = {letters: name for name, letters in _DTYPES.items()}
    groups: dict[str, Array] = {}
    for group in names:
        tensors = [entry for name, entry in header.items() if name.startswith(f"{group}/")]
        lo = min((entry["data_offsets"][0] for entry in tensors), default=0)
        hi = max((entry["data_offsets"][1] for entry in tensors), default=0)
        dtype = dtypes[tensors[0]["dtype"]] if tensors else "float32"
        groups[group] = content[start + lo : start + hi].view(dtype)
    return groups


def read_manifest(generation: Path) -> dict[str, Any]:
    """The manifest of a generation, checked against its own checksum. Raises CheckpointError."""
    try:
        manifest = json.loads((generation / MANIFEST).read_bytes())
        checksum = manifest.pop("manifest_sha256")
        whole = checksum == _sha256_of_json(manifest)
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise _broken(generation, f"a readable {MANIFEST}", f"{type(error).__name__}") from None
    if not whole:
        raise _broken(generation, f"{MANIFEST} with its own checksum", "another")
    if manifest.get("format") != FORMAT:
        found = f"format {manifest.get('format')}"
        raise _broken(generation, f"format {FORMAT}", found, "use the version of dptrain that wrote it")
    return dict(manifest)


def newest(folder: Path, accept: Callable[[Path], Snapshot], warn: Callable[[str], None]) -> Snapshot | None:
    """The newest generation that ``accept`` takes; broken ones are passed over aloud.

    Once one is found, those passed over are no generations any more: as the newest they would be kept in place of
    good ones. None where there are none at all; CheckpointError where all are broken.
    """
    found = generations(folder)
    for i, generation in enumerate(found):
        try:
            snapshot = accept(generation)
        except _Foreign:
            raise
        except DptrainError as error:
            warn(f"passed over: {error}")
        else:
            for broken in found[:i]:
                with contextlib.suppress(OSError):
                    set_aside(broken)
            return snapshot
    if found:
        raise CheckpointError(
            f"checkpoints in {folder}",
            expected="one that can be read",
            found=f"{len(found)} broken ones",
            cure="start again without --resume in another run directory",
        )
    return None


def set_aside(generation: Path) -> None:
    """Let it be a generation no more, and keep what it holds. Raises OSError."""
    target = generation.with_name(f"broken-{generation.name}")
    _remove(target)
    generation.rename(target)


def step_of(generation: Path) -> int:
    """The step after which a generation's state was."""
    return int(generation.name.removeprefix("step-").partition(".")[0])


class _Foreign(CheckpointError):
    """A whole checkpoint of something else: older generations would not help."""


def refuse(generation: Path, expected: str, found: str, cure: str) -> CheckpointError:
    """The error for a checkpoint that is whole but belongs to another job, which ends the search."""
    return _Foreign(f"checkpoint {generation}", expected=expected, found=found, cure=cure)


def judgement_of(manifest: Mapping[str, Any]) -> Judgement:
    """What evaluations had decided when a snapshot was taken."""
    return Judgement(**manifest["judgement"])


class Writer:
    """Writes snapshots in the background, one at a time; the steps go on meanwhile."""

    def __init__(self, folder: Path, layout: Layout, keep: int) -> None:
        self.folder, self.layout, self.keep = folder, layout, keep
        self.failed: DptrainError | None = None
        self.written = -1
        self._memory: dict[str, Array] = {}
        self._thread: threading.Thread | None = None

    @property
    def busy(self) -> bool:
        """Whether a snapshot is being written."""
        return self._thread is not None and self._thread.is_alive()

    def memory(self) -> dict[str, Array]:
        """Room for the next snapshot, the same each time; waits until the one before is written."""
        self.wait()
        return self._memory

    def start(self, snapshot: Snapshot, trusted: int | None = None) -> None:
        """Begin to write; waits for the one before. Of steps up to ``trusted`` a generation stays, however old."""
        self.wait()
        self._thread = threading.Thread(target=self._write, args=(snapshot, trusted), name="checkpoint", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Return when nothing is being written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def complaint(self) -> DptrainError | None:
        """What went wrong with the last write, told once."""
        failed, self.failed = self.failed, None
        return failed

    def _write(self, snapshot: Snapshot, trusted: int | None) -> None:
        try:
            save(self.folder, snapshot, self.layout)
            self.written = snapshot.manifest["step"]
            prune(self.folder, self.keep, trusted)
        except DptrainError as error:
            self.failed = error
        except Exception as error:  # nobody sees what is raised in a thread
            self.failed = StorageError(
                f"checkpoint of step {snapshot.manifest['step']} in {self.folder}",
                expected="to be written",
                found=f"{type(error).__name__}: {error}",
                cure="older checkpoints are untouched",
            )


def write_durably(path: Path, content: bytes) -> None:
    """Create or replace a file; after it returns the content survives a crash of the machine. Raises OSError."""
    _replace(path, [content])


def flush_folder(folder: Path) -> None:
    """Make renames within a folder survive a crash of the machine."""
    if isinstance(folder, FarPath):
        # There each is made so before it is answered.
        return
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def export(path: Path, weights: Array, layout: Layout) -> None:
    """A safetensors file of a model's tensors by their plain names, for other programs. Raises StorageError."""
    try:
        _replace(path, [_header({"": weights}, layout), weights])
    except OSError as error:
        raise StorageError(
            str(path), expected="to be written", found=error.strerror or str(error), cure="make room, then --resume"
        ) from None


def _unfinished(path: Path) -> Path:
    """A name beside ``path`` that nobody had before.

    After a failed fsync the system takes what it could not write for written: that file must not be tried again.
    """
    return path.with_name(f"{_UNFINISHED}{path.name}-{secrets.token_hex(4)}")


def _make(folder: Path) -> None:
    """Create a folder that survives a crash of the machine, unless it is there already."""
    if not folder.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        # The run's own folder may be as new.
        for above in list(folder.parents)[:2]:
            with contextlib.suppress(PermissionError):
                flush_folder(above)


def _replace(path: Path, pieces: Sequence[bytes | Array]) -> None:
    part = _unfinished(path)
    try:
        _write(part, pieces)
        part.replace(path)
        flush_folder(path.parent)
    except OSError:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise


def _write(path: Path, pieces: Sequence[bytes | Array]) -> None:
    """Create a file, its room reserved first; when it returns, the disk is known to hold it. Raises OSError."""
    views = [np.frombuffer(piece, np.uint8) if isinstance(piece, bytes) else piece.view(np.uint8) for piece in pieces]
    if isinstance(path, FarPath):
        path.write_whole([view.data for view in views])
        return
    with path.open("xb+", buffering=0) as file:
        handle = file.fileno()
        total = sum(len(view) for view in views)
        if total:
            os.posix_fallocate(handle, 0, total)
        for view in views:
            while len(view):
                view = view[os.write(handle, view.data) :]
        os.fsync(handle)
        # Without this the next lines would read memory, not the disk.
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        if not _holds(handle, views):
            raise OSError(f"{path.name} reads back differently from what was written")


def _content(path: Path) -> Array:
    """A file's bytes. Raises OSError."""
    if isinstance(path, FarPath):
        return np.frombuffer(path.read_bytes(), np.uint8)
    return np.fromfile(path, np.uint8)


def _removed(folder: Path) -> None:
    """Remove a folder with all that is in it. Raises OSError."""
    if isinstance(folder, FarPath):
        folder.remove()
    else:
        shutil.rmtree(folder)


def _remove(folder: Path) -> None:
    """Remove a folder as far as that can be."""
    with contextlib.suppress(OSError):
        if isinstance(folder, FarPath):
            folder.remove()
        else:
            shutil.rmtree(folder, ignore_errors=True)


def _holds(handle: int, views: Sequence[Array]) -> bool:
    """Whether a file's content is that of ``views``, one after the other."""
    chunk: Array = np.empty(_CHUNK, np.uint8)
    at = 0
    for view in views:
        while len(view):
            count = os.preadv(handle, [chunk[: len(view)].data], at)
            if not count or not np.array_equal(chunk[:count], view[:count]):
                return False
            at, view = at + count, view[count:]
    return os.fstat(handle).st_size == at


def _header(groups: Mapping[str, Array], layout: Layout) -> bytes:
    """What comes before the vectors of ``groups`` in a safetensors file."""
    header: dict[str, Any] = {}
    at = 0
    for group, vector in groups.items():
        for name, view in _tensors(vector, layout).items():
            header[f"{group}/{name}" if group else name] = {
                "dtype": _DTYPES[vector.dtype.name],
                "shape": list(view.shape),
                "data_offsets": [at, at + view.nbytes],
            }
            at += view.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _tensors(vector: Array, layout: Layout) -> dict[str, Array]:
    """A vector's tensors; the optimizer's vectors end where the parameters do."""
    return {
        name: vector[entry.start : entry.stop].reshape(entry.shape)
        for name, entry in layout.entries.items()
        if entry.stop <= len(vector)
    }


def _broken(generation: Path, expected: str, found: str, cure: str = "an older one is used") -> CheckpointError:
    return CheckpointError(f"checkpoint {generation}", expected=expected, found=found, cure=cure)


def _sha256_of_json(content: Mapping[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def _sha256_of_all(head: bytes, tensors: Mapping[str, str]) -> str:
    """A checksum over a file's header and the checksums of its tensors, and so over all of its bytes."""
    found = hashlib.sha256(head)
    for checksum in tensors.values():
        found.update(bytes.fromhex(checksum.removeprefix("sha256:")))
    return "sha256:" + found.hexdigest()
