"""A server whose volume is read-only or full says so in one line, and ends with code 2."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("unshare") is None, reason="file systems are mounted by root, with unshare"
)
@pytest.mark.parametrize(
    ("volume", "said"),
    [
        ("ro", "data: expected a folder to keep jobs in, found Read-only file system; choose another --data"),
        ("size=8k", "full; make room"),
        ("size=32k", "jobs.sqlite: expected to be read and written, found"),
    ],
)
def test_a_volume_that_can_t_be_written(volume: str, said: str, environ: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    serve = [sys.executable, "-P", "-m", "dptrain", "serve", "--listen", f"unix:{tmp_path}/s", "--data", "data"]
    mounted = ["unshare", "--mount", "sh", "-c", f'mount -t tmpfs -o {volume} none data && exec "$@"', "sh"]
    line = [*mounted, *serve]
    done = subprocess.run(line, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    (one,) = [line for line in done.stderr.splitlines() if line.startswith("dptrain: ")]
    assert said in one
