"""How soon another thread of this interpreter gets its turn, where the one that runs it doesn't give it away."""

import sys

SECONDS = 1e-5
"""Five milliseconds, as the interpreter has it, are half a small model's step, and a message passes three threads."""


def short() -> None:
    """Let the threads of this process take short turns: for who waits for messages in one and computes in another."""
    sys.setswitchinterval(SECONDS)
