"""Where a run begins: its directory, the weights it starts from, and the checkpoint it goes on from."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dptrain import arithmetic, checkpoint, rundir
from dptrain.checkpoint import Snapshot
from dptrain.errors import CheckpointError, ModelError
from dptrain.job.digest import JobDigest
from dptrain.job.load import to_toml
from dptrain.job.located import lent, located
from dptrain.job.spec import Job, needs_validation
from dptrain.layout import Array, Layout


def directory(job: Job, wanted: Path | None, *, resume: bool) -> Path:
    """The run directory: ``wanted``, or one below ``job.output.runs``: a new one, or to resume the newest."""
    runs = Path(job.directory) / job.output.runs
    if wanted is not None:
        return rundir.claim(wanted, resume=resume)
    return rundir.newest(runs, job.name) if resume else rundir.fresh(runs, job.name)


def echo(path: Path, job: Job, encoding: Mapping[str, Any]) -> None:
    """Write down with what the run is made: the resolved job, the data's encoding, a Python model's source."""
    checkpoint.clean(path)
    checkpoint.clean(path / rundir.CHECKPOINTS)
    rundir.write_text(path / rundir.JOB, to_toml(_absolute(job)))
    rundir.write_json(path / rundir.ENCODING, encoding)
    if job.model.python:
        source = Path(job.directory) / located(job).model.python.rpartition(":")[0]
        rundir.write_text(path / rundir.MODEL_SOURCE, rundir.read_text(source))


@dataclass(frozen=True)
class Expected:
    """What a checkpoint has to agree with."""

    job: Job
    digests: JobDigest
    fingerprint: str
    arithmetic: Mapping[str, Any]
    layout: Layout

    def accept(self, generation: Path) -> Snapshot:
        """The generation's content. Raises CheckpointError where it is broken or of another job or arithmetic."""
        manifest = checkpoint.read_manifest(generation)
        if manifest["trajectory_sha256"] != self.digests.trajectory:
            raise checkpoint.refuse(
                generation,
                "a checkpoint of this job (only its stopping rule may differ)",
                "another job's",
                "resume with the job.toml of that run (a cosine's length is part of it unless "
                "optimizer.schedule.decay_steps is set), or start anew in another --run-dir",
            )
        if needs_validation(self.job) and manifest["judging_sha256"] != self.digests.judging:
            raise checkpoint.refuse(
                generation,
                "a checkpoint whose evaluations were made as train.stop or train.result now wants them",
                "others (train.evaluate_steps, train.stop.metric or what belongs to them)",
                "set them as in the job.toml of that run, or start anew in another --run-dir",
            )
        if manifest["fingerprint"] != self.fingerprint and not self.job.arithmetic.accept_other:
            raise checkpoint.refuse(
                generation,
                f"the arithmetic it was made with ({arithmetic.named(manifest['arithmetic'])})",
                f"another here ({arithmetic.named(self.arithmetic)})",
                "resume on such a machine; or --set arithmetic.accept_other=true, which gives up the same bits",
            )
        return checkpoint.read(generation, self.layout)


def restore(path: Path, expected: Expected, warn: Callable[[str], None]) -> Snapshot | None:
    """The newest checkpoint of a run that is whole and agrees; None where there is none yet."""
    return checkpoint.newest(path / rundir.CHECKPOINTS, expected.accept, warn)


def warm_start(job: Job, layout: Layout) -> Array:
    """The weights that ``model.init_from`` names: a run directory, or one checkpoint of a run."""
    path = Path(job.directory) / job.model.init_from
    folder = path / rundir.CHECKPOINTS
    generations = checkpoint.generations(folder) if folder.is_dir() else [path]
    if not generations:
        raise CheckpointError(
            f"model.init_from = {job.model.init_from!r}",
            expected="a run directory with checkpoints, or one checkpoint",
            found="none there",
            cure="name the directory that holds job.toml and checkpoints/",
        )
    snapshot = checkpoint.read(generations[0])
    if snapshot.manifest["layout"] != layout.describe():
        raise ModelError(
            f"model.init_from = {job.model.init_from!r}",
            expected="the tensors of this job's model: " + _tensors(layout.describe()),
            found=_tensors(snapshot.manifest["layout"]),
            cure="use the same layers as the run it comes from",
        )
    return snapshot.groups.get("best", snapshot.groups["weights"])


def _tensors(described: list[list[Any]]) -> str:
    return ", ".join(f"{name} {tuple(shape)}" for name, shape, _ in described)


def _absolute(job: Job) -> Job:
    """The job with paths that hold wherever its echo is read from."""
    base = Path(job.directory).resolve()

    def moved(path: str) -> str:
        return str(base / path) if path and (lent(job, path) or (base / path).exists()) else path

    parts: dict[str, Any] = {
        name: moved(value) if isinstance(value, str) else value
        for name, value in (("validation", job.data.validation), ("test", job.data.test))
    }
    python, colon, function = job.model.python.rpartition(":")
    model = replace(
        job.model, python=f"{moved(python)}{colon}{function}" if python else "", init_from=moved(job.model.init_from)
    )
    return replace(job, data=replace(job.data, source=moved(job.data.source), **parts), model=model)
