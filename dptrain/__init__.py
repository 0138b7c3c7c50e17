"""Distributed data-parallel training on CPUs with the same bits for any number of workers.

``dptrain.train(job)`` trains, ``dptrain.load(run_dir)`` gives the trained model, ``dptrain.Job`` is the job's class,
``dptrain.Client`` talks to a server of jobs.
They are imported on first use: a rank that is only told to leave pays for nothing.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dptrain.api import Job, Result, Trained, load, train
    from dptrain.errors import DptrainError
    from dptrain.service.client import Client

__version__ = "0.1.0"

__all__ = ["Client", "DptrainError", "Job", "Result", "Trained", "__version__", "load", "train"]


def __getattr__(name: str) -> Any:
    if name == "DptrainError":
        from dptrain.errors import DptrainError

        return DptrainError
    if name == "Client":
        from dptrain.service.client import Client

        return Client
    if name in __all__:
        from dptrain import api

        return getattr(api, name)
    raise AttributeError(f"module 'dptrain' has no attribute {name!r}")
