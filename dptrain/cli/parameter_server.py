"""``dptrain param-server``: train with the workers that join."""

import os
import sys

from dptrain import launch, supervision
from dptrain.cli import terminal
from dptrain.cli.progress import observer
from dptrain.cli.run import Request, job_path


def serve(request: Request, listen: str) -> None:
    """Train as asked; see :func:`dptrain.serve.serve`. Raises DptrainError."""
    from dptrain.job.load import load_job
    from dptrain.serve import serve

    supervised = bool(os.environ.get(supervision.FOLDER))
    if supervised:
        supervision.die_with_launcher()
    job = load_job(job_path(request.job), request.sets, os.environ)
    place = launch.announced(os.environ)
    by_hand = ["dptrain", "param-server", *request.argv(place=False)[1:], "--listen", listen]
    shown = observer(request.progress, terminal.width(place), by_hand)

    def ready(address: str) -> None:
        if not supervised:
            print(f"dptrain: workers join with: dptrain worker --server {address}", file=sys.stderr, flush=True)

    try:
        serve(
            job,
            listen,
            ready=ready,
            run_dir=request.run_dir,
            resume=request.resume,
            trace=request.trace,
            observer=shown,
        )
    finally:
        shown.close()
