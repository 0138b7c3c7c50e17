"""dptrain with a parameter server: ``dptrain run --exchange ps``, as a person would start it."""

import json
import sys
import tempfile
from pathlib import Path

import tomli_w

from bench import spawn
from bench.contestants import ours
from bench.spawn import Found
from bench.workload import Workload
from dptrain import journal
from dptrain.rundir import JOURNAL
from dptrain.supervision import RESULT


def train(work: Workload, *, host_sum: bool) -> Found:
    """Train with a server and the workload's workers, a shard each.

    They send each its own partial, or with ``host_sum`` add up in shared memory and send one.
    """
    with tempfile.TemporaryDirectory() as folder:
        job, run = Path(folder) / "job.toml", Path(folder) / "run"
        content = ours.content(work, work.workers, "ps")
        content["exchange"]["host_sum"] = host_sum
        job.write_text(tomli_w.dumps(content))
        line = [sys.executable, "-P", "-m", "dptrain", "run", str(job), "-n", str(work.workers)]
        line += ["--run-dir", str(run), "--progress", "none", "--max-restarts", "0"]
        with spawn.started(line, spawn.environment()) as process:
            spawn.finish(process)
        found: Found = ours.measured(work, journal.read_steps(run / JOURNAL))
        found["weights_sha256"] = json.loads((run / RESULT).read_text())["weights_sha256"]
        return found
