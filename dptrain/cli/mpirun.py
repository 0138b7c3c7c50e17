"""Start mpirun, pass on a request to stop, and wait for its end."""

import signal
import subprocess
from collections.abc import Mapping, Sequence
from types import FrameType

_REQUESTS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def supervise(line: Sequence[str], env: Mapping[str, str], mpi: str) -> int:
    """Run mpirun's command line to its end and return its exit code (128 + N where signal N ended it).

    The first SIGINT, SIGTERM or SIGHUP asks the workers to finish their step and write a checkpoint, a second one
    ends them. ``mpi`` is the MPI of this mpirun.
    """
    # Open MPI's mpirun kills its workers a quarter of a second after SIGINT or SIGTERM, but passes SIGUSR1 on, as
    # Hydra does. Killing Hydra ends its workers, killing Open MPI's mpirun would leave them.
    end = signal.SIGTERM if mpi == "Open MPI" else signal.SIGKILL
    process: subprocess.Popen[bytes] | None = None
    requests = 0

    def pass_on(signum: int, frame: FrameType | None) -> None:
        nonlocal requests
        requests += 1
        if process is not None:
            process.send_signal(signal.SIGUSR1 if requests == 1 else end)

    before = {number: signal.signal(number, pass_on) for number in _REQUESTS}
    try:
        # A process group of its own: Ctrl-C in a terminal reaches mpirun once, through here.
        process = subprocess.Popen(line, env=dict(env), stdin=subprocess.DEVNULL, process_group=0)
        if requests:
            process.send_signal(end)
        code = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return code if code >= 0 else 128 - code
