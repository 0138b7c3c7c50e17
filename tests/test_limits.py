import os
from pathlib import Path

from dptrain import limits


def group(tmp_path: Path, line: str) -> Path:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(line)
    return tmp_path / "proc"


def test_v2_takes_the_tightest_of_a_group_and_those_above(tmp_path: Path) -> None:
    proc = group(tmp_path, "0::/a/b\n")
    inner = tmp_path / "cgroup/a/b"
    inner.mkdir(parents=True)
    (inner / "cpu.max").write_text("max 100000\n")
    (inner / "memory.max").write_text("2000000\n")
    (inner.parent / "cpu.max").write_text("150000 100000\n")
    (inner.parent / "memory.max").write_text("1000000\n")
    found = limits.limits(proc, tmp_path / "cgroup")
    assert found == (len(os.sched_getaffinity(0)), 1.5, 1_000_000)


def test_v1_reads_quota_and_bytes_and_knows_no_limit(tmp_path: Path) -> None:
    proc = group(tmp_path, "4:cpu,cpuacct:/docker/x\n3:memory:/docker/x\n")
    cpu, memory = tmp_path / "cgroup/cpu,cpuacct", tmp_path / "cgroup/memory"
    cpu.mkdir(parents=True)
    memory.mkdir()
    (cpu / "cpu.cfs_quota_us").write_text("50000\n")
    (cpu / "cpu.cfs_period_us").write_text("100000\n")
    (memory / "memory.limit_in_bytes").write_text("9223372036854771712\n")
    assert limits.limits(proc, tmp_path / "cgroup")[1:] == (0.5, None)
    (cpu / "cpu.cfs_quota_us").write_text("-1\n")
    (memory / "memory.limit_in_bytes").write_text("4096\n")
    assert limits.limits(proc, tmp_path / "cgroup")[1:] == (None, 4096)


def test_no_control_groups_are_no_limits(tmp_path: Path) -> None:
    assert limits.limits(tmp_path / "proc", tmp_path / "cgroup")[1:] == (None, None)


def test_shared_memory_that_is_not_there(tmp_path: Path) -> None:
    assert limits.shared_memory(str(tmp_path / "none")) is None
    assert limits.shared_memory(str(tmp_path)) is not None
