"""dptrain in the middle of training: the memory of all its workers. Run under mpirun, or alone; rank 0 prints JSON."""

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.contestants.ours import job, run
from bench.workload import Workload
from dptrain.launch import announced
from dptrain.watch import Unwatched

KEYS = ("Pss", "Pss_Anon", "Pss_File", "Pss_Shmem", "Rss")


class Footprint(Unwatched):
    """Looks once, between the steps after the first few, while the other workers wait for this one."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.workers: list[dict[str, int]] = []

    def progressed(self, line: Mapping[str, Any]) -> None:
        """See Observer."""
        if not self.workers and line["step"] >= self.step:
            self.workers = [memory(process) for process in workers()]


def workers() -> list[int]:
    """The processes of this launch: the children of whatever started this one that run this program."""
    if announced(os.environ).alone:
        return [os.getpid()]
    mine = Path("/proc/self/cmdline").read_bytes()
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == os.getppid() and (folder / "cmdline").read_bytes() == mine:
                found.append(int(folder.name))
        except OSError:
            continue  # it ended meanwhile
    return sorted(found)


def memory(process: int) -> dict[str, int]:
    """Bytes of a process by kind; a page that several map counts in each with its share (PSS)."""
    found = {}
    for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()[1:]:
        name, _, rest = line.partition(":")
        if name in KEYS:
            found[name] = int(rest.split()[0]) * 1024
    return found


def main(work: Workload, shards: int, exchange: str) -> None:
    """Train and print what every worker held."""
    observer = Footprint(work.total_steps // 2)
    run(job(work, shards, exchange), observer)
    print(json.dumps({"workers": observer.workers}), flush=True)


if __name__ == "__main__":
    main(Workload.parse(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
