"""The machine that was measured, and the versions of what ran on it."""

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

SIMD = ("avx2", "fma", "avx512f", "avx512bw", "avx512vl", "avx512_bf16", "avx_vnni", "amx_bf16", "asimd", "sve")


def describe() -> dict[str, Any]:
    """CPU, cores, caches, SIMD flags, memory, and versions."""
    fields = dict(_cpuinfo())
    return {
        "cpu": fields.get("model name", platform.machine()),
        "cores": len(os.sched_getaffinity(0)),
        "caches": _caches(),
        "simd": [flag for flag in SIMD if flag in flags()],
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "linux": platform.release(),
        "python": platform.python_version(),
        "versions": _versions(),
    }


def line(machine: dict[str, Any]) -> str:
    """The description as one paragraph."""
    caches = ", ".join(f"{name} {size}" for name, size in machine["caches"].items())
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    return (
        f"{machine['cpu']}, {machine['cores']} cores, {caches}, {machine['memory_gib']} GiB; "
        f"{' '.join(machine['simd'])}; Linux {machine['linux']}, Python {machine['python']}, {versions}."
    )


def flags() -> set[str]:
    """What the CPU says it can."""
    fields = dict(_cpuinfo())
    return set((fields.get("flags") or fields.get("Features") or "").split())


def _cpuinfo() -> list[tuple[str, str]]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return [(name.strip(), value.strip()) for name, _, value in (line.partition(":") for line in lines) if name.strip()]


def _caches() -> dict[str, str]:
    found = {}
    for cache in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = ((cache / name).read_text().strip() for name in ("level", "type", "size"))
        if kind != "Instruction":
            found[f"L{level}"] = size
    return found


def _versions() -> dict[str, str]:
    import numpy as np

    from dptrain.launch import library_version

    blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
    mpi, version = library_version()
    found = {"numpy": np.__version__, blas["name"]: blas["version"], mpi: version}
    for package, variable in (("torch", "BENCH_TORCH"), ("jax", "BENCH_JAX")):
        version = _version_in(os.environ.get(variable, ""), package)
        if version:
            found[package] = version
    return found


def _version_in(python: str, package: str) -> str:
    """The version of a package in the environment of a Python, this one where none is named; "" where it has none."""
    if not python:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return ""
    code = f"import importlib.metadata as m; print(m.version({package!r}))"
    try:
        done = subprocess.run([python, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    except OSError:
        return ""
    return done.stdout.strip()
