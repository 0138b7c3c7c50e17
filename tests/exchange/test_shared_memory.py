"""Memory that workers share: found by others, left behind by nobody, refused with the cure."""

import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest

from dptrain import supervision
from dptrain.errors import LaunchError
from dptrain.exchange import shared_memory
from dptrain.exchange.segments import Machines, Memory
from dptrain.exchange.shared_memory import attach, in_dev_shm, nameless
from dptrain.layout import Layout
from dptrain.limits import Limits
from tests.mpirun import ROOT, ranks

WRITE = """
import sys
from dptrain.exchange.shared_memory import attach
memory = attach(sys.argv[1], int(sys.argv[2]))
memory[7] = 42
"""


@pytest.fixture(params=[nameless, in_dev_shm])
def way(request: pytest.FixtureRequest) -> Any:
    return request.param


@contextmanager
def folder_of_ones_own() -> Iterator[Path]:
    """In /dev/shm, where other tests make and remove what they need meanwhile."""
    with TemporaryDirectory(prefix="dptrain-test-", dir=shared_memory.FOLDER) as folder:
        # So that no other test takes it for left behind.
        (Path(folder) / supervision.SUPERVISOR).write_text(str(os.getpid()))
        yield Path(folder)


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with folder_of_ones_own() as folder:
        monkeypatch.setattr(shared_memory, "FOLDER", folder)
        yield


def names() -> set[Path]:
    return set(shared_memory.FOLDER.glob("dptrain-*"))


def test_another_process_writes_what_this_one_reads(way: Any) -> None:
    made = way(4096)
    memory = attach(made.path, 4096)
    assert memory is not None
    assert not memory.any()
    subprocess.run([sys.executable, "-c", WRITE, made.path, "4096"], check=True, cwd=ROOT, timeout=60)
    made.release()
    assert memory[7] == 42
    assert attach(made.path, 4096) is None


def test_released_memory_has_no_name(way: Any) -> None:
    before = names()
    made = way(4096)
    assert len(names() - before) == (way is in_dev_shm)
    made.release()
    assert names() == before


def test_memory_of_another_size_is_not_ones_own(way: Any) -> None:
    made = way(4096)
    assert attach(made.path, 8192) is None
    made.release()


@contextmanager
def files_up_to(nbytes: int) -> Iterator[None]:
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.getsignal(signal.SIGXFSZ)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_too_little_room_is_told_with_the_cure() -> None:
    before = names()
    with files_up_to(1 << 20), pytest.raises(LaunchError) as caught:
        in_dev_shm(3 << 20)
    assert "3 MB" in str(caught.value)
    assert "shm_size" in str(caught.value)
    assert "segments" in str(caught.value)
    assert names() == before


def test_more_than_the_machine_has_is_not_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(LaunchError, match="fewer workers"):
        nameless(1 << 50)
    monkeypatch.setattr(shared_memory, "limits", lambda: Limits(2, None, 4096))
    nameless(4096).release()
    with pytest.raises(LaunchError, match=r"expected 1 MB .* found 0 MB"):
        nameless(4097)


def test_a_machine_without_dev_shm_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(shared_memory, "FOLDER", tmp_path / "none")
    with pytest.raises(LaunchError, match="shm-size"):
        in_dev_shm(4096)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("shared")
    with folder_of_ones_own() as shared:
        done = ranks(4, "tests.exchange.shared_suite", str(folder), str(shared))
    assert done.returncode == 0, done.stderr
    content: dict[str, Any] = json.loads((folder / "shared.json").read_text())
    return content


def test_the_second_way_is_taken_where_the_first_is_barred(found: dict[str, Any]) -> None:
    assert found["nameless"]["said"][0]["exchange"] == "node"
    assert found["file"]["said"] == found["nameless"]["said"]
    assert found["file"]["left"] == found["nameless"]["left"] == []


def test_where_nothing_can_be_shared_all_end_and_one_says_the_cure(found: dict[str, Any]) -> None:
    first, *others = found["nothing"]["said"]
    assert 'exchange.type = "segments"' in first["error"]
    assert all("rank 0" in said["error"] for said in others)


def test_weights_and_optimizer_state_are_held_once_a_machine(found: dict[str, Any]) -> None:
    """The pages of four workers together are what one state and four outboxes take, not four states."""
    held = found["held"]
    assert held["pss"] == pytest.approx(held["need"], rel=0.1)
    assert held["need"] == pytest.approx(held["state"] + held["outboxes"], rel=0.01)
    assert held["pss"] < held["outboxes"] + 2 * held["state"]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_nothing_overlaps_in_memory(dtype: str) -> None:
    layout = Layout([("W", (33,))], [("mean", (5,), 0.1)])
    memory = Memory(layout, 2, dtype, [1, 3])
    store, boxes, _ = memory.place(np.zeros(memory.nbytes, np.uint8))
    places = [store.weights(side) for side in (0, 1)] + [slot for side in (0, 1) for slot in store.slots(side)]
    places += [row for box in boxes for row in box]
    for number, place in enumerate(places, 1):
        assert place.ctypes.data % 64 == places[0].ctypes.data % 64
        assert not place.any()
        place[:] = number
    assert [set(place.tolist()) for place in places] == [{number} for number in range(1, len(places) + 1)]
    assert [len(box) for box in boxes] == [1, 3]


def test_lanes() -> None:
    machines = Machines(((0, 2, 4), (1, 3)), 3)
    assert machines.here == (1, 3)
    assert [machines.carrier(1, owner) for owner in range(5)] == [1, 1, 3, 3, 1]
    assert [machines.carrier(0, owner) for owner in range(5)] == [0, 0, 2, 2, 4]


KILLED = """
import os, pathlib, signal, sys
from dptrain.exchange import shared_memory
shared_memory.FOLDER = pathlib.Path(sys.argv[1])
shared_memory.nameless(1 << 20)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_worker_that_is_killed_before_it_released_leaves_no_name() -> None:
    before = names()
    done = subprocess.run([sys.executable, "-c", KILLED, str(shared_memory.FOLDER)], cwd=ROOT, timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL
    assert names() == before
