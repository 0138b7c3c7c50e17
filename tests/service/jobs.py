"""A job that takes no longer than it has to, and what it comes to when it is run by hand."""

import json
import os
import subprocess
import sys
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
    (folder / "by-hand.toml").write_text(text)
    environ = {name: value for name, value in os.environ.items() if name not in ("DPTRAIN_TOKEN", "DPTRAIN_SERVER")}
    line = [sys.executable, "-m", "dptrain", "run", "by-hand.toml", "--run-dir", "by-hand", "--progress", "none"]
    subprocess.run(line, cwd=folder, env=environ, check=True, capture_output=True, timeout=120)
    found: str = json.loads((folder / "by-hand" / "result.json").read_text())["weights_sha256"]
    return found
