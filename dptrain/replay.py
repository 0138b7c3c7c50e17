"""The composition root of a replay: a run whose order of arrival decided its bits, done again to the same bits."""

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dptrain import arithmetic
from dptrain.errors import ReplayError, UsageError
from dptrain.job.spec import Job

if TYPE_CHECKING:
    from dptrain.watch import Observer


def replay(path: Path, observer: "Observer | None" = None) -> dict[str, Any]:
    """Do a finished run again by its log; returns its result. Nothing is written to it.

    Raises StorageError where the log is missing or spoilt, ReplayError where it leads to other weights.
    """
    from dptrain import rundir
    from dptrain.job.load import load_job

    result: dict[str, Any] = rundir.read_json(path / rundir.RESULT)
    job = load_job(path / rundir.JOB, (), {})
    exchange = replace(job.exchange, type="ps", standby=False, servers=1)
    if not result.get("staleness"):
        raise UsageError(
            f"dptrain replay {path}",
            expected="a run with exchange.mode async or ssp",
            found="one whose order of arrival decided nothing",
            cure="its result is that of `dptrain run` of its job.toml, with any number of workers",
        )
    if exchange.in_step:
        raise UsageError(
            f"dptrain replay {path}",
            expected="a run with exchange.mode async or ssp to its end",
            found="one that went on otherwise, so that not all of its steps are in its log",
            cure="replay only what was not resumed with another exchange",
        )
    # Nobody wants another run of it; the last checkpoint is written in any case.
    output = replace(job.output, checkpoint_seconds=0.0, checkpoint_steps=0, tensorboard="never")
    arithmetic.choose(job.arithmetic.kernels, job.arithmetic.threads)
    with tempfile.TemporaryDirectory(prefix="dptrain-replay-") as folder:
        _again(replace(job, exchange=exchange, output=output), path, result, Path(folder) / "run", observer)
    return result


def _again(job: Job, path: Path, result: dict[str, Any], folder: Path, observer: "Observer | None") -> None:
    from dptrain import arrivals, rundir
    from dptrain.exchange.replayed import Log
    from dptrain.training import run

    assert job.train.shards is not None
    steps = int(result["steps"])
    bound = result["staleness"]["bound"]
    found = arrivals.read(path / rundir.ARRIVALS, steps=steps, shards=job.train.shards, bound=bound)
    again = run(job, run_dir=folder, observer=observer, communicator=Log(found, int(result["signal"])))
    if again.fingerprint != result["fingerprint"]:
        raise ReplayError(
            f"the replay of {path}",
            expected=f"the arithmetic of the run ({arithmetic.named(result['arithmetic'])})",
            found=f"another ({arithmetic.named(again.arithmetic)})",
            cure='replay it on a machine like those it ran on; with arithmetic.kernels = "portable" more are alike',
        )
    if (again.weights_sha256, again.steps) != (result["weights_sha256"], steps):
        raise ReplayError(
            f"the replay of {path}",
            expected=f"{result['weights_sha256']} after {steps} steps",
            found=f"{again.weights_sha256} after {again.steps}",
            cure="the log, job.toml, the data or dptrain itself is another than the run's",
        )
