"""The real program in a process of its own."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from dptrain import launch

Program = Callable[..., "subprocess.CompletedProcess[str]"]

PROGRAM = [sys.executable, "-P", "-m", "dptrain"]
SHORT = {"DPTRAIN_TRAIN__EPOCHS": "2", "COLUMNS": "100"}


def environment() -> dict[str, str]:
    """This process's, without what an outer launcher or job said, and fit for more workers than cores."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("DPTRAIN_")}
    env = launch.without_launcher(env)
    return launch.needs(launch.library(), 8) | env | SHORT


@pytest.fixture
def env(tmp_path: Path) -> dict[str, str]:
    return environment() | {"DPTRAIN_CACHE": str(tmp_path / "cache")}


@pytest.fixture
def dptrain(tmp_path: Path, env: dict[str, str]) -> Program:
    """Runs ``dptrain ARGUMENTS`` in an empty folder to its end; ``workers`` puts mpirun in front."""

    def run(*arguments: str, workers: int = 0, **extra: str) -> "subprocess.CompletedProcess[str]":
        mpirun = [launch.mpirun_for(launch.library(), env), "-n", str(workers)] if workers else []
        return subprocess.run(
            [*mpirun, *PROGRAM, *arguments],
            cwd=tmp_path,
            env=env | extra,
            capture_output=True,
            text=True,
            timeout=240,
            stdin=subprocess.DEVNULL,
        )

    return run


def weights(output: str) -> str:
    """The hash of the closing line."""
    found = [line.split("weights sha256:")[1] for line in output.splitlines() if "weights sha256:" in line]
    assert len(found) == 1, output
    assert len(found[0]) == 64
    return found[0]
