"""dptrain from Python: train a job, load what a run left."""

import os
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dptrain import arithmetic, ranks, rundir
from dptrain.data.encoding import Encoding, encoding_of
from dptrain.errors import ModelError, StorageError
from dptrain.job.load import check, complete, load_job
from dptrain.job.spec import Job, plain
from dptrain.layout import Array
from dptrain.nn.layer import Model, Pass, Workspace
from dptrain.result import Result
from dptrain.training import run
from dptrain.watch import Observer

if TYPE_CHECKING:
    from dptrain.exchange.mpi import Mpi

__all__ = ["Job", "Result", "Trained", "load", "train"]

_MODELS = ("layers", "python")

JobLike = Job | Mapping[str, Any] | str | os.PathLike[str]


def train(
    job: JobLike,
    *,
    model: Any = None,
    run_dir: str | os.PathLike[str] | None = None,
    resume: bool = False,
    trace: str | os.PathLike[str] | None = None,
    observer: Observer | None = None,
) -> Result:
    """Train a job: a Job, its content as a mapping, or the path of its TOML file.

    In a program of its own this trains in one process; in one that was started by mpirun, all ranks call it alike
    and train together. ``model`` is an object of the user's own with the interface of ``dptrain.nn.own.OwnModel``;
    ``trace`` names a file to be written, which shows in Perfetto or Chrome where every worker's time went. Raises
    DptrainError, whose message is one sentence with the cure.
    """
    checked = _job(job, model is not None)
    options: dict[str, Any] = {"model": model, "run_dir": run_dir, "resume": resume, "trace": trace}
    options["observer"] = observer
    communicator = _communicator()
    return run(checked, **options) if communicator is None else ranks.train(communicator, checked, **options)


class Trained:
    """What a run learned: predict with it, evaluate it, look at its job and result."""

    def __init__(self, run_dir: Path, job: Job, result: dict[str, Any], model: Model, encoding: Encoding) -> None:
        self.run_dir = run_dir
        self.job = job
        self.result = result
        self.model = model
        self.encoding = encoding
        self.weights: Array = _weights(run_dir / rundir.WEIGHTS, model)

    @property
    def tensors(self) -> dict[str, Array]:
        """The weights by name."""
        return self.model.layout.views(self.weights)

    def predict(self, x: Any) -> Array:
        """The model's output for raw rows (n, ...) as in the data's source: logits, or numbers in their own unit."""
        encoded = self.encoding.encode(x, np.int64 if self.encoding.integer else self.weights.dtype)
        with self._arithmetic():
            z = self._forward(encoded)
        return self.encoding.decode_target(z)

    def evaluate(self, data: str | os.PathLike[str] | None = None) -> dict[str, float]:
        """Loss and metrics on a file of the source's format, or on the run's own test part (None)."""
        from dptrain.assemble import build_evaluator
        from dptrain.data.dataset import open_dataset
        from dptrain.data.prepare import prepare
        from dptrain.data.unseen import open_for_evaluation

        if data is None:
            prepared = prepare(self.job.data, directory=Path(self.job.directory), seed=self.job.seed, cache=None)
            parts = open_dataset(prepared)
            part = parts.test if parts.test.rows else parts.validation
        else:
            part = open_for_evaluation(Path(data), {"encoding": self.encoding.plan()})
        evaluator = build_evaluator(self.job, self.model, self.encoding)
        with self._arithmetic():
            return evaluator.report(evaluator.sums(self.weights, part, 0, evaluator.blocks(part)))

    @contextmanager
    def _arithmetic(self) -> Iterator[None]:
        """As while training: the same number of threads gives the same bits, and an overflow is only a number."""
        with arithmetic.limited(self.job.arithmetic.threads), np.errstate(all="ignore"):
            yield

    def _forward(self, x: Array) -> Array:
        rows = self.job.train.evaluate_rows
        tensors = self.tensors
        found: Array = np.empty((len(x), *self.model.output_shape), self.weights.dtype)
        workspace = Workspace()
        for lo in range(0, len(x), rows):
            some = x[lo : lo + rows]
            ones = np.ones((1, len(some)), self.weights.dtype)
            run = Pass(training=False, seed=0, step=0, shards=[0], rows=ones, counts=[len(some)], workspace=workspace)
            found[lo : lo + rows] = self.model.forward(tensors, some[None], run)[0][0]
        return found


def load(run_dir: str | os.PathLike[str], *, model: Any = None) -> Trained:
    """The trained model of a finished run. ``model`` is the user's own object, where the run was made with one."""
    from dptrain.assemble import build_model

    path = Path(run_dir)
    result = rundir.read_json(path / rundir.RESULT)
    job = _job_of(path, model is not None)
    encoding = encoding_of(rundir.read_json(path / rundir.ENCODING))
    if job.model.python and model is None:
        job = _with_kept_source(job, path)
    built, _ = build_model(job, encoding.sample_shape, np.dtype(job.train.dtype), model)
    return Trained(path, job, result, built, encoding)


def _job_of(path: Path, own_model: bool) -> Job:
    job = path / rundir.JOB
    if not own_model and not any(tomllib.loads(rundir.read_text(job)).get("model", {}).get(k) for k in _MODELS):
        raise ModelError(
            f"run {path}",
            expected="the object it was trained with",
            found="none",
            cure="load it from Python with dptrain.load(run_dir, model=...)",
        )
    return load_job(job, own_model=own_model)


def _with_kept_source(job: Job, path: Path) -> Job:
    content = plain(job)
    function = job.model.python.rpartition(":")[2]
    content["model"]["python"] = f"{path.resolve() / rundir.MODEL_SOURCE}:{function}"
    directory = content.pop("directory")
    kept = complete(check(content, str(path / rundir.JOB)))
    return Job(**{**{name: getattr(kept, name) for name in kept.__dataclass_fields__}, "directory": directory})


def _weights(path: Path, model: Model) -> Array:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise StorageError(
            str(path), expected="the weights of a finished run", found=str(error), cure="finish the run with --resume"
        ) from None
    vector: Array = np.zeros(model.layout.size, model.dtype)
    views = model.layout.views(vector)
    found = {name: tensor.shape for name, tensor in tensors.items()}
    wanted = {name: view.shape for name, view in views.items()}
    if found != wanted:
        raise ModelError(str(path), expected=f"tensors {wanted}", found=f"{found}", cure="give the model of that run")
    for name, view in views.items():
        view[...] = tensors[name]
    return vector


def _job(job: JobLike, own_model: bool) -> Job:
    if isinstance(job, (str, os.PathLike)):
        return load_job(Path(job), own_model=own_model)
    content = dict(plain(job) if isinstance(job, Job) else job)
    directory = content.pop("directory", ".")
    checked = complete(check(content, "the job"), own_model=own_model)
    return Job(**{**{name: getattr(checked, name) for name in checked.__dataclass_fields__}, "directory": directory})


def _communicator() -> "Mpi | None":
    from dptrain.launch import announced, library, refuse_mismatch, refuse_size

    place = announced(os.environ)
    if place.alone:
        return None
    from dptrain.exchange.mpi import connect

    refuse_mismatch(place, library())
    communicator = connect()
    refuse_size(place, communicator.began)
    return communicator
