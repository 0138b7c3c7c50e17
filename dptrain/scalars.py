"""TensorBoard's event file of a run: loss, metrics, learning rate, samples a second, recoveries, by step.

It lies in the run directory itself, so that ``tensorboard --logdir runs`` calls a curve by its run. The library takes
a sixth of a second to load. Only the chief does that, and under "auto" only in a run that has lasted ``PATIENCE``
seconds; what it has missed until then it catches up on.
"""

import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dptrain.errors import StorageError

if TYPE_CHECKING:
    from tensorboardX.event_file_writer import EventsWriter

PATIENCE = 10.0
FIGURES = ("loss", "lr", "samples_per_second", "norm")
"""Keys of a journal's line that become curves of the same name; its metrics are ``metrics/NAME``."""


class Scalars:
    """Writes what the journal's lines hold to one event file; each line is handed to the system whole.

    ``attempt`` and ``step`` say where the run stands: TensorBoard drops what earlier files hold from there on.
    """

    def __init__(self, folder: Path, *, attempt: int, step: int, patience: float) -> None:
        self._folder, self._attempt, self._step = folder, attempt, step
        self._due = time.monotonic() + patience
        self._waiting: list[tuple[float, Mapping[str, Any]]] = []
        self._writer: EventsWriter | None = None
        self._recoveries = 0

    def write(self, line: Mapping[str, Any]) -> None:
        """Take in a line of the journal. Raises StorageError; after that the file is closed, and nothing is written."""
        self._waiting.append((time.time(), line))
        if time.monotonic() < self._due:
            return
        try:
            if self._writer is None:
                self._writer = self._open()
            for wall_time, one in self._waiting:
                self._add(self._writer, wall_time, one)
            self._writer.flush()
        except OSError as error:
            self._due = float("inf")
            self.close()
            raise StorageError(
                f"event file for TensorBoard in {self._folder}",
                expected="to be written",
                found=error.strerror or str(error),
                cure='make room, or set output.tensorboard = "never"; the journal holds the same',
            ) from None
        finally:
            self._waiting.clear()

    def close(self) -> None:
        """Nothing is raised: every line was flushed when it came."""
        writer, self._writer = self._writer, None
        if writer is not None:
            try:
                writer.close()
            except OSError:
                return

    def _open(self) -> "EventsWriter":
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        writer = EventsWriter(str(self._folder.absolute() / "events"), f".{self._attempt}.{self._step}")
        if self._step:
            log = SessionLog(status=SessionLog.START)
            writer.write_event(Event(wall_time=time.time(), step=self._step + 1, session_log=log))
        return writer

    def _add(self, writer: "EventsWriter", wall_time: float, line: Mapping[str, Any]) -> None:
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.proto.summary_pb2 import Summary

        if line.get("event") == "recovery":
            self._recoveries += 1
            line = {**line, "recoveries": self._recoveries}
        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in figures(line)]
        if values:
            writer.write_event(Event(wall_time=wall_time, step=line["step"], summary=Summary(value=values)))


def figures(line: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """The curves that a line of the journal has a point of, and the point."""
    for name in (*FIGURES, "recoveries"):
        value = line.get(name)
        if isinstance(value, (int, float)):
            yield name, float(value)
    for name, value in line.get("metrics", {}).items():
        yield f"metrics/{name}", float(value)
