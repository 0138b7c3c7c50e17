"""A job that takes no longer than it has to, and what it comes to when it is run by hand."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

JOB = """
name = "tiny"

[data]
source = "digits"

[model]
layers = [{ type = "linear", units = 10 }]

[train]
steps = 30
batch_size = 64
"""

LONG = JOB.replace("steps = 30", "steps = 100000").replace("[train]", "[output]\ncheckpoint_steps = 200\n\n[train]")
"""One that does not end before it is ended, with checkpoints often."""


def solo_hash(folder: Path, text: str = JOB) -> str:
    """The weights' SHA-256 of `dptrain run` of a job by hand."""
    found: str = json.loads((solo(folder, text) / "result.json").read_text())["weights_sha256"]
    return found


def solo(folder: Path, text: str) -> Path:
    """The run directory of `dptrain run` of a job by hand."""
    inside = Path(tempfile.mkdtemp(prefix="by-hand-", dir=folder))
    (inside / "job.toml").write_text(text)
    environ = {name: value for name, value in os.environ.items() if name not in ("DPTRAIN_TOKEN", "DPTRAIN_SERVER")}
    line = [sys.executable, "-m", "dptrain", "run", "job.toml", "--run-dir", "run", "--progress", "none"]
    subprocess.run(line, cwd=inside, env=environ, check=True, capture_output=True, timeout=120)
    return inside / "run"
