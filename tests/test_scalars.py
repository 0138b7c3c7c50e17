"""The event files, read back by TensorBoard itself."""

import errno
from pathlib import Path

import pytest

import dptrain
from dptrain.errors import StorageError
from dptrain.journal import read_steps
from dptrain.scalars import Scalars, _masked_crc
from dptrain.watch import Unwatched
from tests.softmax import LAYERS, job


def read(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Every curve of a run's event files, by TensorBoard's own reader."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    found.Reload()
    return {tag: [(event.step, event.value) for event in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def written(**train: object) -> dict[str, object]:
    return {**job(LAYERS, train=train), "output": {"journal_steps": 1}}


def test_a_run_has_the_curves_of_its_journal(tmp_path: Path) -> None:
    dptrain.train(written(), run_dir=tmp_path / "run")
    lines, curves = read_steps(tmp_path / "run" / "journal.jsonl"), read(tmp_path / "run")
    for name in ("loss", "lr", "samples_per_second"):
        wanted = [(line["step"], pytest.approx(line[name], rel=1e-6)) for line in lines if line[name] is not None]
        assert curves[name] == wanted
    evaluated = [line for line in lines if line.get("metrics")]
    assert evaluated
    for name in evaluated[0]["metrics"]:
        assert curves[f"metrics/{name}"] == [
            (line["step"], pytest.approx(line["metrics"][name], rel=1e-6)) for line in evaluated
        ]


def test_a_run_that_goes_on_replaces_what_it_repeats(tmp_path: Path) -> None:
    folder = tmp_path
    first = Scalars(folder, attempt=1, step=0)
    for step in range(1, 7):
        first.write({"step": step, "loss": 1.0})
    first.close()
    second = Scalars(folder, attempt=2, step=4)
    for step in range(5, 9):
        second.write({"step": step, "loss": 2.0})
    second.close()
    assert read(folder)["loss"] == [(s, 1.0) for s in range(1, 5)] + [(s, 2.0) for s in range(5, 9)]


def test_recoveries_are_counted(tmp_path: Path) -> None:
    scalars = Scalars(tmp_path, attempt=1, step=0)
    for line in ({"step": 3, "loss": None}, {"event": "recovery", "step": 3}, {"event": "warning", "text": "x"}):
        scalars.write(line)
    scalars.write({"event": "recovery", "step": 9})
    scalars.close()
    scalars.close()
    assert read(tmp_path) == {"recoveries": [(3, 1.0), (9, 2.0)]}


def test_unwanted_ones_are_not_there(tmp_path: Path) -> None:
    content = {**job(LAYERS), "output": {"tensorboard": "never"}}
    dptrain.train(content, run_dir=tmp_path / "run")
    assert not list((tmp_path / "run").glob("events*"))


def test_the_checksum_is_that_of_the_standard() -> None:
    # RFC 3720, B.4: thirty-two bytes of zeros.
    crc = 0x8A9136AA
    masked = ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
    assert int.from_bytes(_masked_crc(bytes(32)), "little") == masked


def test_figures_that_a_float32_cannot_hold_are_infinite(tmp_path: Path) -> None:
    scalars = Scalars(tmp_path, attempt=1, step=0)
    scalars.write({"step": 1, "loss": 1e300, "lr": -1e300, "norm": float("nan")})
    scalars.close()
    (loss,), (lr,), (norm,) = (read(tmp_path)[name] for name in ("loss", "lr", "norm"))
    assert (loss, lr) == ((1, float("inf")), (1, float("-inf")))
    assert norm[1] != norm[1]


def test_a_full_disk_stops_the_curves_and_not_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Scalars) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    class Listening(Unwatched):
        said: tuple[str, ...] = ()

        def warned(self, text: str) -> None:
            self.said += (text,)

    monkeypatch.setattr(Scalars, "_open", full)
    with pytest.raises(StorageError, match="No space left"):
        Scalars(tmp_path, attempt=1, step=0).write({"step": 1, "loss": 1.0})
    observer = Listening()
    assert dptrain.train(written(), run_dir=tmp_path / "run", observer=observer).state == "done"
    assert len(observer.said) == 1
    assert "without TensorBoard's curves" in observer.said[0]
