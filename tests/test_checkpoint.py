import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dptrain import checkpoint
from dptrain.checkpoint import MANIFEST, STATE, Snapshot, Writer
from dptrain.errors import CheckpointError, StorageError
from dptrain.layout import Layout, digest
from dptrain.state import Judgement, State

LAYOUT = Layout([("a.W", (3, 4)), ("empty", (0, 2)), ("b", (5,))], [("mean", (2,), 0.1)])


def snapshot(step: int, *, best: bool = False, dtype: type = np.float32, **facts: Any) -> Snapshot:
    rng = np.random.default_rng(step)
    weights, m, v = (rng.standard_normal(n).astype(dtype) for n in (LAYOUT.size, LAYOUT.parameters, LAYOUT.parameters))
    state = State(step, step - 1, weights, (m, v), 0, Judgement(0.1 + 0.2, 3, None, 1, step))
    return Snapshot.of(state, weights * 2 if best else None, ("m", "v"), {"trajectory_sha256": "t", **facts})


def equal(a: Snapshot, b: Snapshot) -> bool:
    """The same groups with the same bits, and all of b's manifest in a's."""
    groups = {name: (v.dtype, v.tobytes()) for name, v in a.groups.items()}
    return (
        groups == {n: (v.dtype, v.tobytes()) for n, v in b.groups.items()} and b.manifest.items() <= a.manifest.items()
    )


def found(folder: Path) -> tuple[int | None, list[str]]:
    """The step that is gone on from, and what was said on the way."""
    said: list[str] = []
    newest = checkpoint.newest(folder, lambda path: checkpoint.read(path, LAYOUT), said.append)
    return (None if newest is None else newest.manifest["step"]), said


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("best", [False, True])
def test_a_snapshot_comes_back_to_the_last_bit(tmp_path: Path, best: bool, dtype: type) -> None:
    saved = snapshot(7, best=best, dtype=dtype, note="ä")
    path = checkpoint.save(tmp_path, saved, LAYOUT)
    read = checkpoint.read(path, LAYOUT)
    assert equal(read, saved)
    assert not equal(read, snapshot(8, best=best, dtype=dtype))
    assert checkpoint.judgement_of(read.manifest) == Judgement(0.1 + 0.2, 3, None, 1, 7)
    assert [p.name for p in tmp_path.iterdir()] == ["step-0000000007"]


def test_the_memory_of_snapshots_is_used_again(tmp_path: Path) -> None:
    writer = Writer(tmp_path, LAYOUT, keep=9)
    first: dict[str, Any] = {}
    for step in (1, 2, 3):
        state = State(step, step, np.full(LAYOUT.size, step, np.float32), (), 0)
        # The best are only there from the second on.
        taken = Snapshot.of(state, state.weights if step > 1 else None, (), {}, writer.memory())
        assert all(taken.groups[name] is vector for name, vector in first.items())
        first = {**first, **taken.groups}
        writer.start(taken)
    writer.wait()
    assert set(first) == {"weights", "best"}
    found = [float(checkpoint.read(path).groups["weights"][0]) for path in checkpoint.generations(tmp_path)]
    assert found == [3, 2, 1]


def test_memory_is_not_given_away_while_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def slow(*arguments: Any) -> Path:
        begun.set()
        assert go_on.wait(30)
        return tmp_path

    monkeypatch.setattr(checkpoint, "save", slow)
    writer = Writer(tmp_path, LAYOUT, keep=1)
    writer.start(snapshot(1))
    assert begun.wait(30)
    assert writer.busy
    threading.Timer(0.1, go_on.set).start()
    writer.memory()
    assert go_on.is_set()
    assert not writer.busy


def test_a_snapshot_is_a_copy() -> None:
    state = State(1, 1, np.ones(3), (np.ones(2),), 0)
    taken = Snapshot.of(state, state.weights, ("m",), {})
    state.weights[:] = 5
    state.slots[0][:] = 5
    assert {float(v.max()) for v in taken.groups.values()} == {1.0}


def test_the_format_is_the_one_of_its_own_library(tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    saved = snapshot(7, best=True)
    tensors = load_file(checkpoint.save(tmp_path, saved, LAYOUT) / STATE)
    expected = {f"{g}/{n}": v for g in ("weights", "best") for n, v in LAYOUT.views(saved.groups[g]).items()}
    assert {name for name in tensors if name.split("/")[0] in ("weights", "best")} == set(expected)
    for name, view in expected.items():
        assert tensors[name].shape == view.shape
        assert tensors[name].tobytes() == view.tobytes()
    assert tensors["m/b"].tobytes() == saved.groups["m"][12:].tobytes()
    assert "m/mean" not in tensors

    checkpoint.export(tmp_path / "w.safetensors", saved.groups["weights"], LAYOUT)
    plain = load_file(tmp_path / "w.safetensors")
    assert set(plain) == set(LAYOUT.entries)
    assert plain["a.W"].tobytes() == saved.groups["weights"][:12].tobytes()


def test_a_file_cut_off_anywhere_is_passed_over_aloud(tmp_path: Path) -> None:
    old = checkpoint.save(tmp_path, snapshot(1), LAYOUT)
    new = checkpoint.save(tmp_path, snapshot(2), LAYOUT)
    whole = {name: (new / name).read_bytes() for name in (STATE, MANIFEST)}
    for name, content in whole.items():
        for length in (0, 1, 7, 8, len(content) // 2, len(content) - 1):
            new.mkdir(exist_ok=True)
            for other, kept in whole.items():
                (new / other).write_bytes(kept[:length] if other == name else kept)
            step, said = found(tmp_path)
            assert (step, len(said)) == (1, 1), (name, length)
            assert f"passed over: checkpoint {new}: expected " in said[0]
            assert name in said[0]
            shutil.rmtree(tmp_path / f"broken-{new.name}")
    shutil.copytree(old, new)
    for other, kept in whole.items():
        (new / other).write_bytes(kept)
    assert found(tmp_path) == (2, [])


def test_every_flipped_byte_of_a_manifest_is_seen(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, snapshot(2), LAYOUT)
    content = (path / MANIFEST).read_bytes()
    truth = json.loads(content)
    for i in range(len(content)):
        broken = bytearray(content)
        broken[i] ^= 1 << (i % 7)
        (path / MANIFEST).write_bytes(broken)
        try:
            read = checkpoint.read_manifest(path)
        except CheckpointError:
            continue
        # Only white space can become other white space.
        assert {**read, "manifest_sha256": truth["manifest_sha256"]} == truth


def test_a_flipped_bit_of_any_part_of_the_tensors_is_seen(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, snapshot(2), LAYOUT)
    content = (path / STATE).read_bytes()
    for i in range(0, len(content), 13):
        broken = bytearray(content)
        broken[i] ^= 0x40
        (path / STATE).write_bytes(broken)
        with pytest.raises(CheckpointError, match=r"expected .* with .*the manifest's checksum, found another"):
            checkpoint.read(path)
    (path / STATE).write_bytes(content)
    checkpoint.read(path)


def test_the_broken_tensor_is_named(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, snapshot(2), LAYOUT)
    content = bytearray((path / STATE).read_bytes())
    content[-1] ^= 1
    (path / STATE).write_bytes(content)
    with pytest.raises(CheckpointError, match=r"expected tensor v/b in state.safetensors with the manifest's checksum"):
        checkpoint.read(path)
    (path / STATE).write_bytes(content + b"x")
    with pytest.raises(CheckpointError, match=rf"expected {len(content)} bytes in state.safetensors"):
        checkpoint.read(path)
    content[8] ^= 1
    (path / STATE).write_bytes(content)
    with pytest.raises(CheckpointError, match=r"state.safetensors with a header of the manifest's checksum"):
        checkpoint.read(path)


def test_every_checksum_is_of_what_it_says(tmp_path: Path) -> None:
    saved = snapshot(2, best=True)
    path = checkpoint.save(tmp_path, saved, LAYOUT)
    manifest = checkpoint.read_manifest(path)
    content = (path / STATE).read_bytes()
    views = {
        f"{group}/{name}": vector[entry.start : entry.stop]
        for group, vector in saved.groups.items()
        for name, entry in LAYOUT.entries.items()
        if entry.stop <= len(vector)
    }
    assert manifest["tensors"] == {name: digest(view) for name, view in views.items()}
    whole = hashlib.sha256(content[: manifest["header_bytes"]])
    for view in views.values():
        whole.update(hashlib.sha256(view.tobytes()).digest())
    assert manifest["sha256"] == "sha256:" + whole.hexdigest()
    assert len(content) == manifest["header_bytes"] + sum(view.nbytes for view in views.values())


@pytest.mark.parametrize("content", [b"[]", b"5", b"null", b"{}", b'"x"', b'{"manifest_sha256": 3}', b"\xff"])
def test_a_manifest_of_something_else_is_no_checkpoint(tmp_path: Path, content: bytes) -> None:
    path = checkpoint.save(tmp_path, snapshot(2), LAYOUT)
    (path / MANIFEST).write_bytes(content)
    with pytest.raises(CheckpointError):
        checkpoint.read(path)


@pytest.mark.parametrize("name", [STATE, MANIFEST])
def test_a_missing_file_is_passed_over(tmp_path: Path, name: str) -> None:
    checkpoint.save(tmp_path, snapshot(1), LAYOUT)
    (checkpoint.save(tmp_path, snapshot(2), LAYOUT) / name).unlink()
    step, said = found(tmp_path)
    assert step == 1
    assert "an older one is used" in said[0]


def test_all_broken_is_an_error_and_none_is_a_start(tmp_path: Path) -> None:
    assert found(tmp_path / "nowhere") == (None, [])
    assert found(tmp_path) == (None, [])
    for step in (1, 2):
        (checkpoint.save(tmp_path, snapshot(step), LAYOUT) / STATE).unlink()
    with pytest.raises(CheckpointError, match="found 2 broken ones"):
        found(tmp_path)
    assert len(checkpoint.generations(tmp_path)) == 2


def test_a_checkpoint_of_another_model_or_format_is_refused(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, snapshot(2), LAYOUT)
    with pytest.raises(CheckpointError, match="the tensors of this job's model"):
        checkpoint.read(path, Layout([("a.W", (4, 3))]))
    later = checkpoint.save(tmp_path, snapshot(3, format=99), LAYOUT)
    with pytest.raises(CheckpointError, match="expected format 2, found format 99"):
        checkpoint.read(later)


def test_a_foreign_checkpoint_ends_the_search(tmp_path: Path) -> None:
    for step in (1, 2):
        checkpoint.save(tmp_path, snapshot(step), LAYOUT)

    def accept(path: Path) -> Snapshot:
        if path.name.endswith("2"):
            raise checkpoint.refuse(path, "this job", "another", "go away")
        return checkpoint.read(path)

    with pytest.raises(CheckpointError, match="expected this job, found another; go away"):
        checkpoint.newest(tmp_path, accept, lambda text: pytest.fail(text))


def test_only_the_newest_generations_stay(tmp_path: Path) -> None:
    writer = Writer(tmp_path, LAYOUT, keep=3)
    for step in (1, 5, 10, 100, 20):
        writer.start(snapshot(step))
    writer.wait()
    assert writer.complaint() is None
    assert [p.name for p in checkpoint.generations(tmp_path)] == [f"step-{n:010d}" for n in (100, 20, 10)]
    assert found(tmp_path) == (100, [])


def test_broken_ones_never_push_good_ones_out(tmp_path: Path) -> None:
    """After passing over a broken newest, the next write must not keep that one and remove what is good."""
    checkpoint.save(tmp_path, snapshot(1), LAYOUT)
    (checkpoint.save(tmp_path, snapshot(9), LAYOUT) / STATE).write_bytes(b"")
    assert found(tmp_path)[0] == 1
    writer = Writer(tmp_path, LAYOUT, keep=1)
    writer.start(snapshot(2))
    writer.wait()
    assert found(tmp_path) == (2, [])


def test_what_a_crash_left_is_cleaned(tmp_path: Path) -> None:
    kept = checkpoint.save(tmp_path, snapshot(1), LAYOUT)
    (tmp_path / ".writing-step-0000000002-123").mkdir()
    (tmp_path / ".writing-step-0000000002-123" / STATE).write_bytes(b"half")
    (tmp_path / ".writing-result.json-12345678").write_text("{")
    shutil.copytree(kept, tmp_path / f"{kept.name}.old")
    checkpoint.clean(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [kept.name]
    checkpoint.clean(tmp_path / "nowhere")
    kept.rename(tmp_path / f"{kept.name}.old")
    assert found(tmp_path) == (1, [])
    checkpoint.clean(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [kept.name]
    assert found(tmp_path) == (1, [])


def test_a_generation_is_there_at_any_time_while_it_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint.save(tmp_path, snapshot(1), LAYOUT)
    rename, seen = Path.rename, []

    def watched(path: Path, target: Path) -> Path:
        seen.append(found(tmp_path))
        rename(path, target)
        seen.append(found(tmp_path))
        return target

    monkeypatch.setattr(Path, "rename", watched)
    checkpoint.save(tmp_path, snapshot(1, note="new"), LAYOUT)
    assert seen == [(1, [])] * 4
    assert checkpoint.read(checkpoint.generations(tmp_path)[0]).manifest["note"] == "new"
    assert len(list(tmp_path.iterdir())) == 1


def watch(monkeypatch: pytest.MonkeyPatch, *names: str) -> list[tuple[str, str]]:
    """The calls of functions of os, with the name of the file that each concerns."""
    calls: list[tuple[str, str]] = []

    def recording(name: str) -> Any:
        real = getattr(os, name)

        def recorded(*arguments: Any, **keywords: Any) -> Any:
            which = arguments[0]
            path = os.readlink(f"/proc/self/fd/{which}") if isinstance(which, int) else os.fspath(which)
            calls.append((name, Path(path).name))
            return real(*arguments, **keywords)

        return recorded

    for name in names:
        monkeypatch.setattr(os, name, recording(name))
    return calls


def test_a_save_reserves_writes_flushes_reads_back_and_renames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "run" / "checkpoints"
    calls = watch(monkeypatch, "posix_fallocate", "write", "fsync", "posix_fadvise", "preadv", "rename")
    checkpoint.save(folder, snapshot(1), LAYOUT)
    once = list(dict.fromkeys(calls))
    assert [name for name, which in once if which == STATE] == [
        "posix_fallocate", "write", "fsync", "posix_fadvise", "preadv",
    ]  # fmt: skip
    assert [name for name, which in once if which == MANIFEST] == [name for name, which in once if which == STATE]
    (unfinished,) = {which for _, which in calls if which.startswith(".writing-step-0000000001-")}
    assert once[:2] == [("fsync", "run"), ("fsync", tmp_path.name)]
    assert once[-3:] == [("fsync", unfinished), ("rename", unfinished), ("fsync", "checkpoints")]
    sizes = {name: (folder / "step-0000000001" / name).stat().st_size for name in (STATE, MANIFEST)}
    assert all(sizes.values())


def test_a_file_whose_flush_failed_is_never_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def failing(handle: int) -> None:
        tried.append(os.readlink(f"/proc/self/fd/{handle}"))
        raise OSError(errno.EIO, "Input/output error")

    checkpoint.save(tmp_path, snapshot(1), LAYOUT)
    monkeypatch.setattr(os, "fsync", failing)
    for _ in range(3):
        with pytest.raises(StorageError, match="found Input/output error"):
            checkpoint.save(tmp_path, snapshot(2), LAYOUT)
        with pytest.raises(OSError, match="Input/output error"):
            checkpoint.write_durably(tmp_path / "result.json", b"{}")
    assert len(tried) == len(set(tried)) == 6
    assert [path.name for path in tmp_path.iterdir()] == ["step-0000000001"]
    assert found(tmp_path) == (1, [])


def test_what_reads_back_otherwise_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.save(tmp_path, snapshot(1), LAYOUT)
    real = os.preadv
    for bad in ("other", "short"):

        def lying(handle: int, buffers: Any, at: int, bad: str = bad) -> int:
            count = real(handle, buffers, at)
            if bad == "other":
                buffers[0][0] ^= 1
            return count if bad == "other" or not at else 0

        monkeypatch.setattr(os, "preadv", lying)
        with pytest.raises(StorageError, match=r"found state\.safetensors reads back differently"):
            checkpoint.save(tmp_path, snapshot(2), LAYOUT)
        assert found(tmp_path) == (1, [])
    assert len(list(tmp_path.iterdir())) == 1


def test_short_writes_are_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    monkeypatch.setattr(os, "write", lambda handle, data: real(handle, data[:7]))
    saved = snapshot(1, best=True)
    assert equal(checkpoint.read(checkpoint.save(tmp_path, saved, LAYOUT), LAYOUT), saved)


def test_a_half_removed_generation_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, snapshot(step), LAYOUT)

    def half(path: Path, **keywords: Any) -> None:
        (path / MANIFEST).unlink()

    monkeypatch.setattr(shutil, "rmtree", half)
    checkpoint.prune(tmp_path, 2)
    assert [path.name for path in checkpoint.generations(tmp_path)] == ["step-0000000003", "step-0000000002"]
    assert len(list(tmp_path.iterdir())) == 3
    monkeypatch.undo()
    checkpoint.clean(tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    ("trusted", "kept"), [(None, [6, 5]), (0, [6, 5]), (3, [6, 5, 3]), (4, [6, 5, 4]), (5, [6, 5]), (9, [6, 5])]
)
def test_the_newest_that_is_trusted_is_kept_besides_the_newest(
    tmp_path: Path, trusted: int | None, kept: list[int]
) -> None:
    for step in range(1, 6):
        checkpoint.save(tmp_path, snapshot(step), LAYOUT)
    writer = Writer(tmp_path, LAYOUT, keep=2)
    writer.start(snapshot(6), trusted)
    writer.wait()
    assert [checkpoint.step_of(path) for path in checkpoint.generations(tmp_path)] == kept


def test_a_file_in_the_way_is_a_storage_error(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    folder.write_text("in the way")
    with pytest.raises(StorageError, match=r"step-0000000001: expected to be written, found "):
        checkpoint.save(folder, snapshot(1), LAYOUT)
    writer = Writer(folder, LAYOUT, keep=1)
    writer.start(snapshot(1))
    writer.wait()
    assert isinstance(writer.complaint(), StorageError)
    assert writer.complaint() is None
    assert folder.read_text() == "in the way"


def test_what_nobody_foresaw_in_the_writer_is_told(tmp_path: Path) -> None:
    broken = snapshot(1)
    broken.groups["weights"] = broken.groups["weights"].astype(np.int64)
    writer = Writer(tmp_path, LAYOUT, keep=1)
    writer.start(broken)
    writer.wait()
    complaint = writer.complaint()
    assert isinstance(complaint, StorageError)
    assert "KeyError" in complaint.found
    assert writer.written == -1


LIMITED = """
import resource, sys
from pathlib import Path
from dptrain.errors import StorageError
from tests.test_checkpoint import LAYOUT, checkpoint, snapshot
folder = Path(sys.argv[1])
checkpoint.save(folder, snapshot(1), LAYOUT)
resource.setrlimit(resource.RLIMIT_FSIZE, (300, resource.RLIM_INFINITY))
try:
    checkpoint.save(folder, snapshot(2), LAYOUT)
except StorageError as error:
    print(error)
"""


def test_a_full_disk_keeps_the_older_generation(tmp_path: Path) -> None:
    line = [sys.executable, "-c", LIMITED, str(tmp_path)]
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run(line, capture_output=True, text=True, cwd=root, env={**os.environ, "PYTHONPATH": str(root)})
    assert done.returncode == 0, done.stderr
    assert "expected to be written, found File too large; make room" in done.stdout
    assert [p.name for p in tmp_path.iterdir()] == ["step-0000000001"]
    assert found(tmp_path) == (1, [])


def test_writing_durably_replaces_or_leaves_alone(tmp_path: Path) -> None:
    path = tmp_path / "x"
    checkpoint.write_durably(path, b"one")
    checkpoint.write_durably(path, b"two")
    assert path.read_bytes() == b"two"
    with pytest.raises(OSError, match="No such file"):
        checkpoint.write_durably(tmp_path / "none" / "x", b"")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="directory"):
        checkpoint.write_durably(tmp_path / "folder", b"")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder", "x"]
