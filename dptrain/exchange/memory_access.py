"""Whether processes of this machine may copy from each other's memory, as MPICH does with large messages.

A container without CAP_SYS_PTRACE forbids process_vm_readv, by its seccomp filter or by Yama, and MPICH dies at the
first large message. Asking the kernel with two processes that are to each other what ranks are is the only sure way.
"""

import ctypes
import os


class _Range(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


def permitted() -> bool:
    """Whether one child of this process can read another's memory; False too where it would be unsafe to find out."""
    if len(os.listdir("/proc/self/task")) > 1:
        # A fork of a process with threads may hang in the child.
        return False
    libc = ctypes.CDLL(None)
    text = ctypes.create_string_buffer(b"readable", 8)
    waiting, end = os.pipe()
    owner = os.fork()
    if owner == 0:
        os.close(end)
        os.read(waiting, 1)
        os._exit(0)
    os.close(waiting)
    reader = os.fork()
    if reader == 0:
        os._exit(0 if _read(libc, owner, text) else 1)
    try:
        return os.waitpid(reader, 0)[1] == 0
    finally:
        os.close(end)
        os.waitpid(owner, 0)


def _read(libc: ctypes.CDLL, pid: int, text: "ctypes.Array[ctypes.c_char]") -> bool:
    """Read the other process's copy of ``text``, which lies where ours does."""
    copy = ctypes.create_string_buffer(8)
    here, there = _Range(ctypes.addressof(copy), 8), _Range(ctypes.addressof(text), 8)
    return bool(libc.process_vm_readv(pid, ctypes.byref(here), 1, ctypes.byref(there), 1, 0) == 8)
