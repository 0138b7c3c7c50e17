"""Runs that a command names: directories of this machine, or jobs of a server, brought here for as long as it takes."""

import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from dptrain import rundir
from dptrain.cli.access import Reach
from dptrain.errors import UnreachableError

_REFERENCE = re.compile(r"@latest|[0-9a-z]{1,12}", re.ASCII)

Wanted = Callable[[str], bool]
"""Whether a file of a run, by its path in it, is needed."""


def model(path: str) -> bool:
    """What the model is made of."""
    return path.rpartition(".")[2] in ("toml", "json", "safetensors", "py") and "/" not in path


def story(path: str) -> bool:
    """What tells how a run went."""
    return path in (rundir.JOB, rundir.JOURNAL, rundir.RESULT)


@contextmanager
def runs(named: Sequence[str], reach: Reach, wanted: Wanted) -> Iterator[list[Path]]:
    """The run directories that are meant, in order. A path that is there comes first; else it is a job's ID.

    Jobs are brought into a temporary folder, each in one of its ID's name. Raises UnreachableError where what is no
    directory could be a job but no server answers.
    """
    asked = [name for name in named if not Path(name).exists() and _REFERENCE.fullmatch(name)]
    if not asked:
        yield [Path(name) for name in named]
        return
    with tempfile.TemporaryDirectory(prefix="dptrain-") as folder:
        try:
            homes = _bring(asked, Path(folder), reach, wanted)
        except UnreachableError as error:
            raise UnreachableError(
                ", ".join(asked),
                expected="the directory of a run, or a job of a server",
                found=f"no such directory, and no server: {error}",
                cure="correct the path, or name the server with --server",
            ) from None
        yield [homes.get(name, Path(name)) for name in named]


def _bring(asked: Sequence[str], folder: Path, reach: Reach, wanted: Wanted) -> dict[str, Path]:
    homes = {}
    with reach.client() as client:
        for name in asked:
            job = client.job(name).id
            homes[name] = folder / job
            homes[name].mkdir(exist_ok=True)
            for artifact in client.artifacts(job):
                if wanted(artifact.path):
                    client.download(job, artifact.path, homes[name].joinpath(*artifact.path.split("/")))
    return homes
