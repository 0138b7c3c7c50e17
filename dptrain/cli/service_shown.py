"""How jobs are shown: tables for people, JSON for programs.

Names and messages of others are data, never control codes.
"""

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dptrain.cli.progress import number
from dptrain.service.convert import plain
from dptrain.v1 import artifact_service_pb2, cluster_service_pb2, job_pb2, log_service_pb2, metric_service_pb2

_BARS = "▁▂▃▄▅▆▇█"


def as_json(message: Any) -> str:
    """A message as one line of JSON."""
    return json.dumps(plain(message))


def all_as_json(messages: Iterable[Any]) -> str:
    """Messages as a JSON array."""
    return json.dumps([plain(message) for message in messages], indent=1)


def visible(text: str) -> str:
    """Text with whatever does not print written as an escape."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def state(job: "job_pb2.Job | log_service_pb2.LogEnd") -> str:
    """A state's name as people read it."""
    return job_pb2.JobState.Name(job.state).removeprefix("JOB_STATE_").lower()


def age(seconds: float) -> str:
    """A duration in its two largest units: 3d04h, 2m05s, 7s."""
    left = max(0, int(seconds))
    for name, length, lesser, unit in (("d", 86400, "h", 3600), ("h", 3600, "m", 60), ("m", 60, "s", 1)):
        if left >= length:
            return f"{left // length}{name}{left % length // unit:02}{lesser}"
    return f"{left}s"


def jobs_table(jobs: Sequence[job_pb2.Job], owners: bool) -> Any:
    """A table of jobs."""
    columns = ["ID", "NAME", "STATE", "STEP", "LOSS", "SAMPLES/S", "LEFT", "WORKERS", "AGE", "WHY"]
    if owners:
        columns.insert(2, "OWNER")
    rows = []
    for job in jobs:
        row = [job.id, visible(job.spec.name), state(job), *_progress(job), str(job.workers or job.spec.workers)]
        row += [age(time.time() - job.created_at.seconds), visible(job.message)]
        if owners:
            row.insert(2, visible(job.owner))
        rows.append(row)
    return table(columns, rows)


def _progress(job: job_pb2.Job) -> list[str]:
    if not job.HasField("progress"):
        return ["", "", "", ""]
    found = job.progress
    step = f"{found.step}/{found.total_steps}" if found.total_steps else str(found.step)
    loss = number(found.loss) if found.HasField("loss") else ""
    left = age(found.remaining.seconds) if found.HasField("remaining") else ""
    return [step, loss, number(found.samples_per_second) if found.samples_per_second else "", left]


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Any:
    """A plain table; cells are text, not markup."""
    from rich.table import Table
    from rich.text import Text

    made = Table(box=None, pad_edge=False, header_style="bold")
    for name in columns:
        made.add_column(name, no_wrap=name != "WHY", overflow="ellipsis" if name != "ID" else "fold")
    for row in rows:
        made.add_row(*(Text(cell) for cell in row))
    return made


def details(job: job_pb2.Job) -> list[tuple[str, str]]:
    """All that is worth telling of one job, as pairs."""
    pairs = [
        ("id", job.id),
        ("name", visible(job.spec.name)),
        ("owner", visible(job.owner)),
        ("state", state(job)),
        ("why", visible(job.message)),
        ("workers", f"{job.workers} of {job.spec.workers}" if job.workers else job.spec.workers),
        ("priority", str(job.spec.priority)),
        ("labels", visible(" ".join(f"{key}={value}" for key, value in sorted(job.spec.labels.items())))),
    ]
    for name in ("created_at", "started_at", "finished_at"):
        if job.HasField(name):
            moment = getattr(job, name).seconds
            pairs.append((name.partition("_")[0], time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(moment))))
    pairs += [("launches", str(job.launches)), ("faults", str(job.faults) if job.faults else "")]
    if job.HasField("progress"):
        step, loss, speed, left = _progress(job)
        pairs += [("step", step), ("epoch", number(job.progress.epoch)), ("loss", loss), ("samples/s", speed)]
        pairs += [("left", left)]
        pairs += [(name, number(value)) for name, value in sorted(job.progress.metrics.items()) if name != "loss"]
        pairs += [("recoveries", str(job.progress.recoveries or ""))]
    if job.HasField("result"):
        pairs += [(name, number(value)) for name, value in sorted(job.result.metrics.items())]
        pairs += [("weights", job.result.weights_sha256), ("job", job.result.job_sha256)]
    if job.HasField("exit_code"):
        pairs.append(("exit code", str(job.exit_code)))
    return [(key, value) for key, value in pairs if value]


def log_line(line: log_service_pb2.LogLine) -> str:
    """A line of a job's log as it is shown."""
    return visible(line.text.expandtabs())


def series_table(response: metric_service_pb2.QueryMetricsResponse) -> Any:
    """Curves as rows: first, last, least, greatest, and a picture."""
    rows = []
    for series in response.series:
        points = series.points
        if not points:
            continue
        low, high = min(point.minimum for point in points), max(point.maximum for point in points)
        cells = [points[0].value, points[-1].value, low, high]
        rows.append([series.name, str(points[-1].step), *map(number, cells), _picture([p.value for p in points])])
    return table(["NAME", "STEP", "FIRST", "LAST", "LEAST", "GREATEST", "CURVE"], rows)


def _picture(values: Sequence[float], width: int = 30) -> str:
    taken = [values[i * len(values) // min(width, len(values))] for i in range(min(width, len(values)))]
    low, high = min(taken), max(taken)
    span = high - low
    return "".join(_BARS[round((value - low) / span * (len(_BARS) - 1)) if span else 0] for value in taken)


def artifacts_table(found: Sequence[artifact_service_pb2.Artifact]) -> Any:
    """Files of a run."""
    return table(["PATH", "BYTES"], [[visible(artifact.path), str(artifact.size)] for artifact in found])


def nodes_table(nodes: Sequence[cluster_service_pb2.Node]) -> Any:
    """Machines."""
    columns = ["NODE", "STATE", "FREE SLOTS", "CORES", "FREE MEMORY", "LOAD", "ADDRESS", "WHY"]
    rows = []
    for node in nodes:
        state = cluster_service_pb2.NodeState.Name(node.state).removeprefix("NODE_STATE_").lower()
        figures = [f"{node.free}/{node.slots}", str(node.cores), f"{node.free_memory_bytes >> 20} MiB"]
        figures += [f"{node.load:.1f}", visible(node.address)]
        rows.append([visible(node.name), state, *figures, visible(node.message)])
    return table(columns, rows)


def pairs_table(pairs: Sequence[tuple[str, str]] | Mapping[str, str]) -> Any:
    """Names and values, one a row."""
    from rich.table import Table
    from rich.text import Text

    made = Table(box=None, pad_edge=False, show_header=False)
    made.add_column(style="bold", no_wrap=True)
    made.add_column(overflow="fold")
    for key, value in pairs.items() if isinstance(pairs, Mapping) else pairs:
        made.add_row(key, Text(value))
    return made
