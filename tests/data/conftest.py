import gzip
import json
import struct
from pathlib import Path

import numpy as np
import pytest

from dptrain.data.dataset import open_dataset
from dptrain.data.prepare import prepare
from dptrain.job import spec

FASHION = Path("/usr/share/datasets/fashion-mnist")
needs_fashion = pytest.mark.skipif(
    not FASHION.is_dir(), reason="Debian's package dataset-fashion-mnist is not installed"
)


class Bench:
    """Prepares data sets in a folder of the test's own."""

    def __init__(self, folder):
        self.folder = folder
        self.cache = folder / "cache"

    def plan(self, source, seed=1, **keys):
        data = spec.Data(source=str(source), **keys)
        plan = prepare(data, directory=self.folder, seed=seed, cache=self.cache, where="job.toml")
        return json.loads(json.dumps(plan))

    def open(self, source, seed=1, **keys):
        return open_dataset(self.plan(source, seed, **keys))

    def npz(self, name="data.npz", **arrays):
        np.savez(self.folder / name, **arrays)
        return name

    def text(self, content, name="data.csv"):
        (self.folder / name).write_text(content)
        return name


@pytest.fixture
def bench(tmp_path):
    return Bench(tmp_path)


def rows_of(part, dtype=np.float64, y_dtype=None):
    """All rows of a part and their labels, in the order of the positions."""
    encoding = part.encoding
    numbers = encoding.target.kind == "numbers"
    x = np.full((part.rows, *encoding.sample_shape), -99, dtype)
    y_shape = (part.rows, encoding.target.width) if numbers else (part.rows,)
    y = np.full(y_shape, -99, y_dtype or (dtype if numbers else np.int64))
    part.read(np.arange(part.rows), x, y)
    return x, y


def idx_bytes(array):
    codes = {"|u1": 8, ">i2": 0x0B, ">i4": 0x0C, ">f4": 0x0D, ">f8": 0x0E}
    head = struct.pack(">BBBB", 0, 0, codes[array.dtype.str], array.ndim)
    return head + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write_idx(folder, name, array, packed=False):
    folder.mkdir(exist_ok=True)
    content = idx_bytes(array)
    path = folder / (name + (".gz" if packed else ""))
    path.write_bytes(gzip.compress(content) if packed else content)
    return path
