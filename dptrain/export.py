"""A finished run's model in one file that other programs read."""

import json
from pathlib import Path
from typing import Any

from dptrain import rundir
from dptrain.api import Trained, load
from dptrain.checkpoint import write_durably
from dptrain.errors import ModelError, StorageError
from dptrain.job.spec import plain

SUFFIXES = {"safetensors": ".safetensors", "onnx": ".onnx"}
"""What can be exported to, and how such a file's name ends."""


def export(run: Path, kind: str, out: Path | None = None) -> Path:
    """Write the run's model to ``out``, or into the run directory; its path.

    "safetensors" holds the weights by name, and in its metadata layers, encoding and digests: all that ``predict``
    needs. "onnx" is described in ``dptrain.onnx_graph``. Raises ModelError for a model of the user's own in Python as
    ONNX, StorageError, and UsageError where a package is missing.
    """
    own = kind == "onnx" and _python_model(run)
    if own:
        raise ModelError(
            f"export of {run} to ONNX",
            expected="a model of layers",
            found="a model of one's own in Python, of which dptrain knows no graph",
            cure="use --format safetensors, or make the graph yourself from the weights there",
        )
    trained = load(run)
    path = out or run / f"model{SUFFIXES[kind]}"
    content = _onnx(trained) if kind == "onnx" else _safetensors(trained)
    try:
        write_durably(path, content)
    except OSError as error:
        raise StorageError(
            str(path), expected="to be written", found=error.strerror or str(error), cure="choose another --out"
        ) from None
    return path


def _python_model(run: Path) -> bool:
    import tomllib

    model = tomllib.loads(rundir.read_text(run / rundir.JOB, "name a run directory")).get("model", {})
    return bool(model.get("python")) or not model.get("layers")


def _facts(trained: Trained) -> dict[str, str]:
    return {key: trained.result[key] for key in ("weights_sha256", "job_sha256")} | {"name": trained.job.name}


def _onnx(trained: Trained) -> bytes:
    from dptrain.onnx_graph import onnx_model

    dtype, layers = trained.weights.dtype, trained.job.model.layers
    return onnx_model(layers, trained.encoding, trained.tensors, dtype, _facts(trained))


def _safetensors(trained: Trained) -> bytes:
    from safetensors.numpy import save

    plans: dict[str, Any] = {"layers": plain(trained.job.model.layers), "encoding": trained.encoding.plan()}
    metadata = {**_facts(trained), **{key: json.dumps(plan) for key, plan in plans.items()}}
    return bytes(save({name: tensor.copy() for name, tensor in trained.tensors.items()}, metadata))
