"""The rows that all contestants train on: patterns in noise, and the class a random linear map of them gives.

Sixteen coarse patterns of 28 x 28 pixels lie over one another in every sample; convolutions see them as well as
perceptrons do, so that some tens of steps already bring the loss well below that of guessing.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from bench.workload import CLASSES, DATA_ROWS, Model

Floats = npt.NDArray[np.float32]
PATTERNS = 16

Integers = npt.NDArray[np.int64]


def write(model: Model, folder: Path) -> None:
    """x.npy (rows, *shape) float32 and y.npy (rows,) int64, the same at every call; shape has 784 elements."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    coarse = rng.standard_normal((PATTERNS, 7, 7), dtype=np.float32)
    patterns = np.kron(coarse, np.ones((4, 4), np.float32)).reshape(PATTERNS, -1)
    x = 0.1 * rng.standard_normal((DATA_ROWS, PATTERNS), dtype=np.float32) @ patterns
    x += 0.5 * rng.standard_normal(x.shape, dtype=np.float32)
    y = np.argmax(x @ (patterns.T @ rng.standard_normal((PATTERNS, CLASSES), dtype=np.float32)), axis=1)
    np.save(folder / "x.npy", x.reshape(DATA_ROWS, *model.shape))
    np.save(folder / "y.npy", y.astype(np.int64))


def read(folder: str) -> tuple[Floats, Integers]:
    """What ``write`` wrote, in memory."""
    return np.load(Path(folder) / "x.npy"), np.load(Path(folder) / "y.npy")


def orders(seed: int) -> Iterator[Integers]:
    """A shuffled order of all rows for every epoch, the same for all workers."""
    rng = np.random.default_rng([seed, 1])
    while True:
        yield rng.permutation(DATA_ROWS)
