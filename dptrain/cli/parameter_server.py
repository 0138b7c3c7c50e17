"""``dptrain param-server``: train with the workers that join."""

import os
import sys
from typing import TYPE_CHECKING

from dptrain import launch, supervision
from dptrain.cli import terminal
from dptrain.cli.progress import observer
from dptrain.cli.run import Request, job_path
from dptrain.errors import UsageError

if TYPE_CHECKING:
    from dptrain.wire.security import Calling, Serving


def serve(
    request: Request,
    listen: str,
    *,
    segment: str = "",
    chief: str = "",
    standby: bool = False,
    standby_of: str = "",
    serving: "Serving",
    calling: "Calling",
) -> None:
    """Train as asked; see :func:`dptrain.serve.serve`. Raises DptrainError."""
    place, servers = _place(segment, chief, standby, standby_of)
    from dptrain.job.load import load_job
    from dptrain.serve import serve

    supervised = bool(os.environ.get(supervision.FOLDER))
    if supervised:
        supervision.die_with_launcher()
    job = load_job(job_path(request.job), request.sets, os.environ)
    width = terminal.width(launch.announced(os.environ))
    by_hand = ["dptrain", "param-server", *request.argv(place=False)[1:], "--listen", listen]
    chief = chief or standby_of
    shown = observer("none" if chief else request.progress, width, by_hand)

    def ready(address: str) -> None:
        if not supervised and not chief:
            print(f"dptrain: workers join with: dptrain worker --server {address}", file=sys.stderr, flush=True)

    try:
        serve(
            job,
            listen,
            servers=servers,
            place=place,
            standby=standby,
            chief=chief,
            serving=serving,
            calling=calling,
            ready=ready,
            run_dir=request.run_dir,
            resume=request.resume,
            trace=request.trace,
            observer=shown,
            successor=lambda: observer(request.progress, width, by_hand),
        )
    finally:
        shown.close()


def _place(segment: str, chief: str, standby: bool, standby_of: str) -> tuple[int | None, int]:
    """Which server this is, None for a standby, and of how many with a segment. Raises UsageError."""
    if standby_of:
        if segment or chief or standby:
            raise UsageError(
                "--standby-of",
                expected="no --segment, --chief or --standby beside it",
                found="one of them",
                cure="a standby has no segment",
            )
        return None, 1
    number, slash, count = (segment or "1/1").partition("/")
    whole = slash and number.isascii() and number.isdigit() and count.isascii() and count.isdigit()
    if not whole or not 1 <= int(number) <= int(count):
        raise UsageError("--segment", expected="I/N, from 1/N to N/N", found=segment, cure="such as --segment 1/2")
    if (int(number) > 1) != bool(chief) or (chief and standby):
        raise UsageError(
            "--chief",
            expected="the address of the first server, for --segment 2/N to N/N and no other",
            found="--standby beside it" if chief and standby else chief or "none",
            cure="start the first with --segment 1/N, and --standby if there is to be one",
        )
    return int(number) - 1, int(count)
