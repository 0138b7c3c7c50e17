"""In a process of its own, as it is the process's affair."""

import subprocess
import sys

PROGRAM = """
import sys
from dptrain import turns

before = sys.getswitchinterval()
turns.short()
print(before, sys.getswitchinterval())
"""


def test_a_turn_is_shorter_than_the_interpreters_own() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True, timeout=60)
    before, after = map(float, done.stdout.split())
    assert after < before / 10
