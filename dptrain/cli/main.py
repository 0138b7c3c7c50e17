"""The console script. A worker that is not the first imports nothing of the command line."""

import os
import sys
from collections.abc import Sequence

from dptrain import launch
from dptrain.errors import DptrainError, PeerFailed, exit_code

_GLOBAL = frozenset({"-h", "--help", "--version"})


def main(arguments: Sequence[str] | None = None) -> None:
    """Run ``dptrain ARGUMENTS`` (default: the process's own) and exit with its code."""
    argv = list(sys.argv[1:] if arguments is None else arguments)
    place = launch.announced(os.environ)
    try:
        if place.alone:
            _command_line(argv, place, None)
        else:
            launch.refuse_mismatch(place, launch.library())
            _worker(argv, place)
    except DptrainError as error:
        tell(error, place)
        sys.exit(exit_code(error))
    except KeyboardInterrupt:
        sys.exit(130)


def _worker(argv: list[str], place: launch.Announced) -> None:
    from dptrain.ranks import follow, lead

    if place.rank:
        sys.exit(follow(place))
    with lead(place) as leader:
        try:
            _command_line(argv, place, leader)
        except DptrainError as error:
            tell(error, place)
            raise SystemExit(exit_code(error)) from None


def _command_line(argv: list[str], place: launch.Announced, leader: object) -> None:
    if argv in ([], ["run"]):
        # Nothing to parse: the others wait for this rank, so it spares itself the parser.
        from dptrain.cli.progress import MODES
        from dptrain.cli.run import Request, train

        mode = os.environ.get("DPTRAIN_PROGRESS") or "auto"
        if mode in MODES:
            sys.exit(train(Request(progress=mode), place, leader))
    from dptrain.cli.app import Context, app

    if not argv or (argv[0].startswith("-") and argv[0] not in _GLOBAL):
        argv = ["run", *argv]
    app(argv, prog_name="dptrain", obj=Context(place, leader))


def tell(error: DptrainError, place: launch.Announced) -> None:
    """One line on stderr; nothing for a failure that another worker tells itself, or that the first tells for all."""
    if os.environ.get("DPTRAIN_TRACEBACK", "") not in ("", "0"):
        import traceback

        traceback.print_exception(error)
    if isinstance(error, PeerFailed) or (error.everywhere and place.rank):
        return
    said = " ".join(str(error).split())
    rank = "" if place.alone or said.startswith("rank ") else f"rank {place.rank}: "
    print(f"dptrain: {rank}{said}", file=sys.stderr, flush=True)
