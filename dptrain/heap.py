"""Memory that is given back and soon wanted again: kept, not handed to the system and had anew page by page."""

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""Of glibc's mallopt."""

LARGEST, KEPT = 8 << 20, 64 << 20
"""Bytes of the largest piece that is kept, and of all that is."""


def keep() -> bool:
    """Keep this process's freed memory, up to a limit; False where its C library can't be told so.

    A chunk of 1 MiB costs ten times its copy where each is made of new pages.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, LARGEST) and mallopt(_M_TRIM_THRESHOLD, KEPT))
