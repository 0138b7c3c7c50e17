"""MPICH must not copy between processes where the kernel forbids it, as a default container's seccomp filter does."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from dptrain.exchange.mpi import CMA
from dptrain.launch import command, library
from tests.mpirun import ROOT, dptrain, run

# What docker does to process_vm_readv (310 on x86-64) without CAP_SYS_PTRACE: it fails with EPERM. The filter stays
# with whatever the process becomes.
FORBIDDEN = """
import ctypes, os, struct, sys
filter = [(0x20, 0, 0, 0), (0x15, 0, 1, 310), (6, 0, 0, 0x50001), (6, 0, 0, 0x7FFF0000)]
program = b"".join(struct.pack("HBBI", *instruction) for instruction in filter)
memory = ctypes.create_string_buffer(program)
class Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_void_p)]
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(38, 1, 0, 0, 0) == 0
assert libc.prctl(22, 2, ctypes.byref(Program(4, ctypes.addressof(memory)))) == 0, os.strerror(ctypes.get_errno())
os.execv(sys.argv[1], sys.argv[1:])
"""

# 0.8 million parameters, so that partials are large messages.
LARGE = 'model.layers=[{type="linear", units=4096}, {type="linear", units=128}, {type="linear", units=10}]'

pytestmark = pytest.mark.skipif(
    platform.machine() != "x86_64", reason="the filter is written for x86-64's number of the system call"
)


def python(code: str, *prefix: str) -> str:
    line = [*prefix, sys.executable, "-c", code]
    return subprocess.run(line, capture_output=True, text=True, check=True, cwd=ROOT, timeout=60).stdout.strip()


def test_what_the_kernel_says_is_found_out() -> None:
    code = "from dptrain.exchange.memory_access import permitted; print(permitted())"
    assert python(code) in ("True", "False")
    assert python(code, sys.executable, "-c", FORBIDDEN) == "False"


def test_a_process_with_threads_is_not_forked() -> None:
    code = """
import threading
from dptrain.exchange.memory_access import permitted
threading.Thread(target=threading.Event().wait, daemon=True).start()
print(permitted())
"""
    assert python(code) == "False"


@pytest.mark.parametrize("kind", ["node", "segments"])
def test_training_goes_on_where_copies_are_forbidden(tmp_path: Path, kind: str) -> None:
    options = [
        "--set",
        "train.epochs=1",
        "--set",
        "optimizer.lr=0.001",
        "--set",
        f"exchange.type='{kind}'",
        "--progress",
        "none",
    ]
    allowed = dptrain("run", "--set", LARGE, *options, "--run-dir", "allowed", n=2, folder=tmp_path)
    line, environ = command(2, ["run", "--set", LARGE, *options, "--run-dir", "forbidden"], os.environ)
    forbidden = run([sys.executable, "-c", FORBIDDEN, *line], environ, 120, tmp_path)
    assert allowed.returncode == 0, allowed.stderr
    assert forbidden.returncode == 0, forbidden.stderr
    hashes = [done.stdout.rpartition("weights ")[2].split()[0] for done in (allowed, forbidden)]
    assert hashes[0] == hashes[1]


@pytest.mark.skipif(library() != "MPICH", reason="only MPICH dies of it")
def test_mpich_dies_of_it_if_it_is_not_told(tmp_path: Path) -> None:
    """Negative control: the filter is one that kills."""
    if python("from dptrain.exchange.memory_access import permitted; print(permitted())") == "False":
        pytest.skip("copies are forbidden here already, so there is nothing to compare with")
    options = [
        "--set",
        LARGE,
        "--set",
        "train.epochs=1",
        "--set",
        "optimizer.lr=0.001",
        "--set",
        "exchange.type='segments'",
    ]
    line, environ = command(2, ["run", *options], {**os.environ, CMA: "1"})
    done = run([sys.executable, "-c", FORBIDDEN, *line], environ, 120, tmp_path)
    assert done.returncode != 0
