"""Data that needs no file of the user's: the embedded digits and seeded random rows."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from dptrain.data import cache
from dptrain.data.raw import Raw, Request, written
from dptrain.data.store import EMBEDDED, Store, describe_npy
from dptrain.errors import DataError
from dptrain.job import spec
from dptrain.layout import Array
from dptrain.random import Purpose, stream

_ROWS = 8_192


def read_embedded(name: str, request: Request) -> Raw:
    """The embedded data set ``name``: pixels 0 to 16 of 8 x 8 handwritten digits, flat unless the job shapes them."""
    import hashlib

    if name not in EMBEDDED:
        listed = ", ".join(EMBEDDED)
        raise DataError(
            f"{request.where}: data.source" if request.where else "data.source",
            expected=f"one of the embedded data sets ({listed}) or a path",
            found=f"{name!r}",
            cure="correct data.source",
        )
    content = (Path(__file__).parent / "embedded" / EMBEDDED[name]).read_bytes()
    images = Store(f"embedded:{name}/images", (1797, 64), "|u1")
    labels = Store(f"embedded:{name}/labels", (1797,), "|u1")
    return Raw(name, images, labels, (hashlib.sha256(content).hexdigest(),), pixels=16.0)


def read_synthetic(seed: int, request: Request) -> Raw:
    """Standard normal rows and what a random linear teacher with noise says of them, made in the cache once."""
    made = request.data.synthetic
    rules = [made.rows, list(made.shape), made.classes, made.noise, seed]

    def build(into: Path) -> None:
        width = int(np.prod(made.shape))
        cache.room(request.cache, made.rows * (4 * width + 8))
        written(into, "x", np.float32, made.shape, (x.reshape(-1, *made.shape) for x, _ in _chunks(made, seed)))
        kind = np.int64 if made.classes else np.float32
        written(into, "y", kind, (), (y for _, y in _chunks(made, seed)))
        digests = [cache.file_digest(into / f"{name}.npy", request.cache) for name in ("x", "y")]
        with cache.writing(into):
            (into / "digests.json").write_text(json.dumps(digests))

    entry = cache.entry(request.cache, "synthetic-" + cache.key(rules), build)
    x, y = (describe_npy(entry / f"{name}.npy")[0] for name in ("x", "y"))
    # The rows' bits depend on the machine's kernels in rare last places, so the digest is of the rows, not the rules.
    return Raw("synthetic", x, y, tuple(json.loads((entry / "digests.json").read_text())))


def _chunks(made: spec.Synthetic, seed: int) -> Iterator[tuple[Array, Array]]:
    width = int(np.prod(made.shape))
    outputs = made.classes or 1
    teacher = stream(seed, Purpose.SYNTHETIC, 0).standard_normal((width, outputs)) / np.sqrt(width)
    for chunk, at in enumerate(range(0, made.rows, _ROWS)):
        rng = stream(seed, Purpose.SYNTHETIC, 1, chunk)
        rows = min(_ROWS, made.rows - at)
        x = rng.standard_normal((rows, width), dtype=np.float32)
        z = x @ teacher + made.noise * rng.standard_normal((rows, outputs))
        yield x, z.argmax(axis=1) if made.classes else z[:, 0]
