"""The console script. A worker that is not the first imports nothing of the command line."""

import os
import resource
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from dptrain import launch, supervision
from dptrain.errors import DeadlineError, DptrainError, PeerFailed, WorkerLost, exit_code
from dptrain.limits import shortage

if TYPE_CHECKING:
    from dptrain.cli.progress import Silent

_GLOBAL = frozenset({"-h", "--help", "--version", "--install-completion", "--show-completion"})

COMPLETION = "_DPTRAIN_COMPLETE"
"""Set where a shell asks how a line may go on; the line is in the environment too, and there are no arguments."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run ``dptrain ARGUMENTS`` (default: the process's own) and exit with its code."""
    argv = list(sys.argv[1:] if arguments is None else arguments)
    # gRPC reports each attempt to connect on stderr; here the error that is raised says what failed.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    place = launch.announced(os.environ)
    if place.alone:
        code = _code_of(lambda: _command_line(argv, place, None), place)
        server = sys.modules.get("dptrain.wire.server")
        if server is not None and server.abandoned:
            # Threads that wait for a stopped caller would be waited for.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        sys.exit(code)
    code = _code_of(lambda: _worker(argv, place), place)
    mpi = sys.modules.get("dptrain.exchange.mpi")
    if mpi is not None and mpi.survived:
        mpi.end(code)
    sys.exit(code)


def _code_of(action: Callable[[], None], place: launch.Announced) -> int:
    """Do something that may leave by any way, and return the exit code it leaves with."""
    try:
        action()
    except SystemExit as leaving:
        if isinstance(leaving.code, str):
            print(leaving.code, file=sys.stderr)
        return leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except DptrainError as error:
        tell(error, place)
        return exit_code(error)
    except MemoryError as error:
        # Before there is a worker that could tell where: while libraries are loaded.
        found = shortage("starting", error, 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
        tell(found, place)
        return exit_code(found)
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        traceback.print_exception(error)
        supervision.failed(1, f"{type(error).__name__}: {error}")
        return 1
    return 0


def _worker(argv: list[str], place: launch.Announced) -> None:
    from dptrain.ranks import follow, lead

    launch.refuse_mismatch(place, launch.library())
    supervision.die_with_launcher()
    if place.rank:
        sys.exit(follow(place, _inherit))
    with lead(place) as leader:
        sys.exit(_code_of(lambda: _command_line(argv, place, leader), place))


def _inherit(shown: Any) -> "Silent":
    from dptrain.cli.progress import observer

    return observer(shown["mode"], shown["width"], shown["resume"])


def _command_line(argv: list[str], place: launch.Announced, leader: object) -> None:
    completes = COMPLETION in os.environ
    if argv in ([], ["run"]) and not completes:
        # Nothing to parse: the others wait for this rank, so it spares itself the parser.
        from dptrain.cli.progress import MODES
        from dptrain.cli.run import Request, train

        mode = os.environ.get("DPTRAIN_PROGRESS") or "auto"
        if mode in MODES:
            sys.exit(train(Request(progress=mode), place, leader))
    from dptrain.cli.app import Context, app

    if not completes and (not argv or (argv[0].startswith("-") and argv[0] not in _GLOBAL)):
        argv = ["run", *argv]
    app(argv, prog_name="dptrain", obj=Context(place, leader))


def tell(error: DptrainError, place: launch.Announced) -> None:
    """One line on stderr; nothing for a failure that another worker tells itself, or that the first tells for all."""
    if os.environ.get("DPTRAIN_TRACEBACK", "") not in ("", "0"):
        traceback.print_exception(error)
    if isinstance(error, PeerFailed) or (error.everywhere and place.rank):
        return
    said = " ".join(str(error).split())
    if not isinstance(error, (WorkerLost, DeadlineError)):
        supervision.failed(exit_code(error), said)
    rank = "" if place.alone or said.startswith("rank ") else f"rank {place.rank}: "
    print(f"dptrain: {rank}{said}", file=sys.stderr, flush=True)
