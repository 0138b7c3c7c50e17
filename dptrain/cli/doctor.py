"""``dptrain doctor``: what this machine offers a run, and each problem with its cure."""

import os
import platform
import sys
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from dptrain import arithmetic, launch, limits
from dptrain.errors import DptrainError

SMALL_SHARED_MEMORY = 1 << 27
"""Docker's default is 64 MiB."""


class Finding(NamedTuple):
    """One thing looked at. ``problem`` is "" where all is well; ``stops`` says that it stops a run."""

    topic: str
    value: str
    problem: str = ""
    cure: str = ""
    stops: bool = False


def examine(environ: Mapping[str, str]) -> list[Finding]:
    """All findings, in the order in which a person would look."""
    return [*_versions(), *_mpi(environ), *_cores(), *_memory(), *_blas(), *_folders()]


def show(findings: list[Finding], as_json: bool) -> None:
    """Print the findings, as a list for people or as JSON."""
    if as_json:
        import json

        problems = [
            {"topic": f.topic, "problem": f.problem, "cure": f.cure, "stops": f.stops} for f in findings if f.problem
        ]
        print(json.dumps({"facts": {f.topic: f.value for f in findings}, "problems": problems}, indent=2))
        return
    wide = max(len(finding.topic) for finding in findings)
    for finding in findings:
        mark = "STOP" if finding.stops else "note" if finding.problem else "ok"
        print(f"{mark:4}  {finding.topic:{wide}}  {finding.value}")
        if finding.problem:
            print(f"      {'':{wide}}  {finding.problem}")
            print(f"      {'':{wide}}  cure: {finding.cure}")
    stops = sum(finding.stops for finding in findings)
    notes = sum(bool(finding.problem) for finding in findings) - stops
    print(f"{stops} problem{'s' * (stops != 1)} that would stop a run, {notes} note{'s' * (notes != 1)}")


def _versions() -> Iterator[Finding]:
    from importlib.metadata import PackageNotFoundError, version

    yield Finding("python", f"{platform.python_version()} ({sys.executable})")
    for package in ("dptrain", "numpy", "mpi4py"):
        try:
            yield Finding(package, version(package))
        except PackageNotFoundError:
            yield Finding(package, "not installed", "a run needs it", "pip install dptrain", stops=package != "dptrain")


def _mpi(environ: Mapping[str, str]) -> Iterator[Finding]:
    try:
        name, version = launch.library_version()
    except DptrainError as error:
        yield Finding("mpi library", "none", f"mpi4py finds no MPI: {error.found}", error.cure, stops=True)
        return
    yield Finding("mpi library", f"{name} {version}")
    found = list(launch.mpiruns(environ))
    fitting = [mpirun for mpirun in found if (mpirun.mpi == "Open MPI") == (name == "Open MPI") and mpirun.mpi]
    if not fitting:
        yield Finding("dptrain run -n", "no mpirun", f"none belongs to {name}", launch.INSTALL, stops=True)
    else:
        yield Finding("dptrain run -n", fitting[0].path)
    yield _on_path(name, found, environ)
    if name == "Open MPI" and os.geteuid() == 0 and "OMPI_ALLOW_RUN_AS_ROOT" not in environ:
        yield Finding(
            "root",
            "yes",
            "Open MPI's mpirun refuses root",
            "start with `dptrain run -n N`, or export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1",
        )


def _on_path(name: str, found: list[launch.Mpirun], environ: Mapping[str, str]) -> Finding:
    import shutil

    first = shutil.which("mpirun", path=environ.get("PATH", ""))
    if first is None:
        return Finding(
            "mpirun on PATH", "none", "`mpirun` can't be called by its name", "activate the virtual environment"
        )
    mpi = next((mpirun.mpi for mpirun in found if mpirun.path == first), "")
    if (mpi == "Open MPI") != (name == "Open MPI") or not mpi:
        return Finding(
            "mpirun on PATH",
            f"{first} ({mpi or 'unknown'})",
            f"it does not belong to {name}, the library mpi4py loads",
            "activate the virtual environment, or start with `dptrain run -n N`, which finds the right one",
            stops=True,
        )
    return Finding("mpirun on PATH", f"{first} ({mpi})")


def _cores() -> Iterator[Finding]:
    limit = limits.limits()
    yield Finding("cores", f"{limit.cores} usable of {os.cpu_count()}")
    if limit.cpus is None:
        yield Finding("cgroup cpu limit", "none")
    elif limit.cpus < limit.cores:
        yield Finding(
            "cgroup cpu limit",
            f"{limit.cpus:g} cpus",
            f"{limit.cores} cores are seen but only {limit.cpus:g} may be used at a time",
            f"start at most {max(1, int(limit.cpus))} workers, or raise the limit",
        )
    else:
        yield Finding("cgroup cpu limit", f"{limit.cpus:g} cpus")


def _memory() -> Iterator[Finding]:
    bound = limits.limits().memory
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    yield Finding("memory", size(total))
    yield Finding("cgroup memory limit", "none" if bound is None or bound >= total else size(bound))
    shared = limits.shared_memory()
    if shared is None:
        yield Finding(
            "/dev/shm",
            "not writable",
            "MPI passes messages between workers of one machine through it",
            "mount a tmpfs there; docker: --shm-size=1g",
            stops=True,
        )
    elif shared[1] < SMALL_SHARED_MEMORY:
        yield Finding(
            "/dev/shm",
            f"{size(shared[0])}, {size(shared[1])} free",
            "many workers or a large model may not find room",
            "docker: --shm-size=1g; else remove what was left there",
        )
    else:
        yield Finding("/dev/shm", f"{size(shared[0])}, {size(shared[1])} free")
    where = "in a container" if limits.container() else "no container seen"
    allowed = "allowed" if limits.cross_memory_attach() else "forbidden; not needed"
    yield Finding("copies between processes", f"{allowed} ({where})")


def _blas() -> Iterator[Finding]:
    arithmetic.choose("native", 1)
    import numpy  # noqa: F401
    from threadpoolctl import threadpool_info

    pools = [pool for pool in threadpool_info() if pool.get("user_api") == "blas"]
    for pool in pools:
        kernel = pool.get("architecture", "unknown kernels")
        yield Finding("blas", f"{pool['internal_api']} {pool['version']}, {kernel}, {pool['num_threads']} thread(s)")
    if not pools:
        yield Finding("blas", "unknown", "threadpoolctl does not know numpy's BLAS", "threads can't be held to one")


def _folders() -> Iterator[Finding]:
    from dptrain.data.cache import locate

    try:
        yield Finding("data cache", str(locate()))
    except DptrainError as error:
        yield Finding("data cache", error.where, f"found {error.found}", error.cure, stops=True)
    if os.access(".", os.W_OK):
        yield Finding("working directory", os.getcwd())
    else:
        yield Finding(
            "working directory", os.getcwd(), "it can't be written", "go elsewhere or say --run-dir", stops=True
        )


def size(count: int) -> str:
    """Bytes as people read them: 1,536 is "1.5 KiB"."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.4g} {unit}"
        value /= 1024
    return f"{value:.4g} TiB"
