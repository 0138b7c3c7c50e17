"""From a job and its prepared data to what computes: model, loss, metrics, optimizer, evaluator."""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dptrain.data import cache
from dptrain.data.dataset import Dataset, open_dataset
from dptrain.data.encoding import Encoding
from dptrain.errors import JobError, ModelError
from dptrain.fingerprint import Sample
from dptrain.gradients import Gradients, declared
from dptrain.job.spec import Job
from dptrain.nn.accumulate import Accumulator, Loss
from dptrain.nn.chain import build_chain
from dptrain.nn.evaluate import Evaluator
from dptrain.nn.layer import Model
from dptrain.nn.loss import make_loss
from dptrain.nn.metrics import make_metrics
from dptrain.nn.products import maker
from dptrain.optim import Optimizer, make_optimizer, make_schedule, worth_compiling
from dptrain.state import Update


@dataclass(frozen=True)
class Assembly:
    """Everything of a job that computes, not yet distributed. ``own_digest`` is a Python model's source's, or ""."""

    job: Job
    dataset: Dataset
    model: Model
    own_digest: str
    loss: Loss
    optimizer: Optimizer
    dtype: np.dtype[Any]
    sample: Sample

    @property
    def shards(self) -> int:
        """The job's number of shards."""
        assert self.job.train.shards is not None
        return self.job.train.shards

    @property
    def rows_per_shard(self) -> int:
        """b, the same for every shard and step."""
        return -(-self.job.train.batch_size // self.shards)

    @property
    def unproved(self) -> bool:
        """Whether the user says that shards don't meet in the model, and nobody has checked it."""
        return bool(getattr(self.model, "batched", False))

    def accumulator(self, at_once: int) -> Accumulator:
        """A worker's forward and backward, ``at_once`` shards at a time."""
        return Accumulator(
            self.model,
            self.loss,
            seed=self.job.seed,
            shards=self.shards,
            at_once=at_once,
            gradients=self.gradients(),
        )

    def gradients(self) -> Gradients:
        """The declared arithmetic of gradients."""
        arithmetic = self.job.arithmetic
        compiled = _compiles(self.job, self.model)
        return declared(arithmetic.gradients, arithmetic.top_k, compiled=compiled)

    def evaluator(self) -> Evaluator:
        """A worker's evaluation."""
        return build_evaluator(self.job, self.model, self.dataset.encoding)

    def update(self, total_steps: int) -> Update:
        """The optimizer with its schedule over so many steps."""
        optimizer = self.job.optimizer
        schedule = make_schedule(optimizer.schedule, optimizer.lr, total_steps)
        return Update(self.model.layout, self.optimizer, schedule, optimizer.clip_norm, self.gradients())


def assemble(job: Job, plan: dict[str, Any], own_model: Any = None) -> Assembly:
    """Open the prepared data and build all that computes. Raises DataError and ModelError."""
    dataset = open_dataset(plan)
    dtype = np.dtype(job.train.dtype)
    target = dataset.target
    model, own_digest = build_model(job, dataset.sample_shape, dtype, own_model)
    outputs = model.output_shape
    loss = make_loss(job.loss, target.kind, target.classes, target.width)
    _check_outputs(job, dataset, outputs)
    sample = _sample(job, dataset.encoding, dtype)
    compiled = _compiles(job, model)
    if compiled:
        # Beside the source, numba's own choice, there may be no place to write to.
        os.environ.setdefault("NUMBA_CACHE_DIR", str(cache.locate() / "numba"))
    optimizer = make_optimizer(job.optimizer, compiled=compiled)
    return Assembly(job, dataset, model, own_digest, loss, optimizer, dtype, sample)


def _compiles(job: Job, model: Model) -> bool:
    """Whether what numba makes faster is compiled."""
    return worth_compiling(job.arithmetic.compiled, model.layout.parameters)


def build_model(
    job: Job, sample_shape: tuple[int, ...], dtype: np.dtype[Any], own_model: Any = None
) -> tuple[Model, str]:
    """The job's model for samples of a shape, and the digest of its source where it is the user's own."""
    if own_model is None and not job.model.python:
        return build_chain(job.model.layers, sample_shape, dtype, maker(job.arithmetic)), ""
    if job.arithmetic.products != "numpy":
        raise JobError(
            f'arithmetic.products = "{job.arithmetic.products}"',
            expected="a model of layers, whose products dptrain makes",
            found="a model of your own, which makes its own",
            cure="leave the key out",
        )
    from dptrain.nn.own import Own, digest_of, load_python

    if own_model is not None:
        model = Own(own_model, sample_shape, dtype)
        # The source says nothing of the sizes an object was made with.
        shapes = repr(model.layout.describe()).encode()
        return model, f"{digest_of(own_model)} {hashlib.sha256(shapes).hexdigest()}"
    own, source_digest = load_python(job.model.python, Path(job.directory), dict(job.model.options))
    return Own(own, sample_shape, dtype), source_digest


def build_evaluator(job: Job, model: Model, encoding: Encoding) -> Evaluator:
    """What evaluates a model of the job on rows of that encoding."""
    target = encoding.target
    sample = _sample(job, encoding, model.dtype)
    return Evaluator(
        model,
        make_loss(job.loss, target.kind, target.classes, target.width),
        make_metrics(job.loss, target.kind, target.width),
        sample=(sample.shape, sample.dtype),
        target=(sample.target_shape, sample.target_dtype),
        dtype=model.dtype,
        rows=job.train.evaluate_rows,
        decode=None if encoding.label.identity else encoding.decode_target,
    )


def _sample(job: Job, encoding: Encoding, dtype: np.dtype[Any]) -> Sample:
    target = encoding.target
    classes = target.classes if target.kind == "classes" else 0
    return Sample(
        shape=encoding.sample_shape,
        dtype=np.dtype(np.int64) if encoding.integer else dtype,
        target_shape=() if classes else (target.width,),
        target_dtype=np.dtype(np.int64) if classes else dtype,
        classes=2 if job.loss.type == "binary_cross_entropy" else classes,
    )


def _check_outputs(job: Job, dataset: Dataset, outputs: tuple[int, ...]) -> None:
    target = dataset.target
    wanted = (target.classes,) if target.kind == "classes" else (target.width,)
    if job.loss.type == "binary_cross_entropy" and target.kind == "classes":
        wanted = (1,)
    if outputs != wanted:
        what = f"{target.classes} classes" if target.kind == "classes" else f"{target.width} numbers a row"
        raise ModelError(
            f"model: the last layer's output for labels of {job.data.source}",
            expected=f"shape {wanted} for {what}",
            found=f"shape {outputs}",
            cure=f"end the model with a linear layer of {wanted[0]} units",
        )
