"""Whether the workers of this machine have a core for each of their threads."""

import os
from pathlib import Path

from dptrain import limits


def crowded(
    local_workers: int,
    threads: int,
    cores: int | None = None,
    proc: Path = Path("/proc"),
    mount: Path = Path("/sys/fs/cgroup"),
) -> str:
    """One sentence where ``local_workers`` of ``threads`` BLAS threads each want more cores than they may use, else "".

    ``cores`` is how many they may be scheduled on together (None: what this process and its launcher may); a control
    group's cpu quota below that counts instead.
    """
    if cores is None:
        cores = len(_shared(local_workers))
    quota = limits.limits(proc, mount).cpus
    given, wanted = cores if quota is None else min(cores, quota), local_workers * threads
    if wanted <= given:
        return ""
    limit = " (the limit of a control group)" if given < cores else ""
    who = f"{local_workers} worker" + "s" * (local_workers > 1) + f" of {threads} thread" + "s" * (threads > 1)
    if given >= threads and local_workers > 1:
        cure = f"start at most {int(given / threads)}"
    else:
        cure = "lower arithmetic.threads" if threads > 1 else "raise the limit"
    return f"{who} on {given:g} core{'s' * (given != 1)}{limit}: they take turns and wait for each other; {cure}"


def _shared(local_workers: int) -> set[int]:
    """The cores of the workers together. A launcher may have bound each of them to some of its own cores."""
    mine = os.sched_getaffinity(0)
    if local_workers == 1:
        return mine
    try:
        return mine | os.sched_getaffinity(os.getppid())
    except OSError:
        return mine
