"""``python -m dptrain.service.started PID PROGRAM ARGUMENTS``: becomes a program that ends with the process PID."""

import os
import sys

from dptrain.supervision import die_with

if __name__ == "__main__":
    die_with(int(sys.argv[1]))
    os.execv(sys.argv[2], sys.argv[2:])
