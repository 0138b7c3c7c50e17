"""``dptrain param-server``: train with the workers that join."""

import os
import sys
from typing import TYPE_CHECKING

from dptrain import launch, supervision
from dptrain.cli import terminal
from dptrain.cli.progress import observer
from dptrain.cli.run import Request, job_path

if TYPE_CHECKING:
    from dptrain.wire.security import Calling, Serving


def serve(
    request: Request, listen: str, standby: bool, standby_of: str, *, serving: "Serving", calling: "Calling"
) -> None:
    """Train as asked; see :func:`dptrain.serve.serve`. Raises DptrainError."""
    from dptrain.job.load import load_job
    from dptrain.serve import serve

    supervised = bool(os.environ.get(supervision.FOLDER))
    if supervised:
        supervision.die_with_launcher()
    job = load_job(job_path(request.job), request.sets, os.environ)
    place = launch.announced(os.environ)
    by_hand = ["dptrain", "param-server", *request.argv(place=False)[1:], "--listen", listen]
    mode = "none" if standby_of else request.progress
    shown = observer(mode, terminal.width(place), by_hand)

    def ready(address: str) -> None:
        if not supervised:
            print(f"dptrain: workers join with: dptrain worker --server {address}", file=sys.stderr, flush=True)

    try:
        serve(
            job,
            listen,
            standby=standby,
            standby_of=standby_of,
            serving=serving,
            calling=calling,
            ready=ready,
            run_dir=request.run_dir,
            resume=request.resume,
            trace=request.trace,
            observer=shown,
            successor=lambda: observer(request.progress, terminal.width(place), by_hand),
        )
    finally:
        shown.close()
