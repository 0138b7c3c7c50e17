"""In a process of its own, as it is the process's affair."""

import subprocess
import sys

PROGRAM = """
import resource
from dptrain import heap

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def had(times):
    before = faults()
    for _ in range(times):
        three = [bytes(1 << 20) for _ in range(3)]
        del three
    return faults() - before

assert heap.keep()
had(2)
print(had(100))
"""


def test_what_was_given_back_is_had_again_without_new_pages() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True, timeout=60)
    assert int(done.stdout) < 256
