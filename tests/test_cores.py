import os
from pathlib import Path

import pytest

from dptrain.cores import crowded


def quota(tmp_path: Path, text: str) -> dict[str, Path]:
    """A root whose control group limits cpus, as version 2 says it."""
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/\n")
    (tmp_path / "cgroup").mkdir()
    (tmp_path / "cgroup/cpu.max").write_text(text)
    return {"proc": tmp_path / "proc", "mount": tmp_path / "cgroup"}


@pytest.mark.parametrize(("workers", "threads", "cores"), [(1, 1, 1), (4, 1, 4), (2, 2, 4), (3, 1, 4)])
def test_enough_cores_are_not_worth_a_word(workers: int, threads: int, cores: int, tmp_path: Path) -> None:
    assert crowded(workers, threads, cores, **quota(tmp_path, "max 100000\n")) == ""


@pytest.mark.parametrize(
    ("workers", "threads", "cores", "text"),
    [
        (8, 1, 2, "8 workers of 1 thread on 2 cores: they take turns and wait for each other; start at most 2"),
        (3, 2, 5, "3 workers of 2 threads on 5 cores: they take turns and wait for each other; start at most 2"),
        (1, 4, 1, "1 worker of 4 threads on 1 core: they take turns and wait for each other; lower arithmetic.threads"),
    ],
)
def test_more_threads_than_cores_are(workers: int, threads: int, cores: int, text: str, tmp_path: Path) -> None:
    assert crowded(workers, threads, cores, **quota(tmp_path, "max 100000\n")) == text


def test_a_quota_counts_where_it_is_less_than_the_cores(tmp_path: Path) -> None:
    root = quota(tmp_path, "150000 100000\n")
    said = crowded(4, 1, 8, **root)
    assert said.startswith("4 workers of 1 thread on 1.5 cores (the limit of a control group): ")
    assert said.endswith("start at most 1")
    assert "control group" not in crowded(4, 1, 1, **root)


def test_a_quota_of_the_first_version_counts_too(tmp_path: Path) -> None:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("4:cpu,cpuacct:/x\n")
    cpu = tmp_path / "cgroup/cpu,cpuacct/x"
    cpu.mkdir(parents=True)
    (cpu / "cpu.cfs_quota_us").write_text("200000\n")
    (cpu / "cpu.cfs_period_us").write_text("100000\n")
    where = {"proc": tmp_path / "proc", "mount": tmp_path / "cgroup"}
    assert crowded(2, 1, 8, **where) == ""
    assert "on 2 cores (the limit of a control group)" in crowded(3, 1, 8, **where)


def test_bound_workers_may_use_what_their_launcher_may(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    allowed = {0: {3}, os.getppid(): {2, 3}}
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: allowed[process])
    root = quota(tmp_path, "max 100000\n")
    assert crowded(2, 1, **root) == ""
    assert "on 2 cores" in crowded(3, 1, **root)
    assert "on 1 core:" in crowded(1, 2, **root)
