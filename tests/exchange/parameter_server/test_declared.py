"""Other arithmetics of gradients over the wire: as many bytes as promised, and the bits of solo."""

from pathlib import Path

import numpy as np
import pytest

from dptrain.errors import LaunchError
from dptrain.exchange.parameter_server.codec import CHUNK, Piece, Written, checksum, cuts, decode_push, elements, encode
from dptrain.exchange.parameter_server.intake import Intake
from dptrain.gradients import Rounded
from dptrain.layout import Array
from dptrain.training import run
from dptrain.tree import Node
from dptrain.v1 import parameter_server_pb2 as pb
from tests.exchange.jobs import job
from tests.exchange.parameter_server.running import Cluster


@pytest.mark.parametrize(
    ("name", "shards", "gradients", "workers"),
    [("cnn", 6, "bfloat16", 3), ("mlp", 8, "bfloat16", 2), ("mlp", 8, "float16", 3)],
)
def test_the_hash_is_solos(name: str, shards: int, gradients: str, workers: int, tmp_path: Path) -> None:
    it = job(name, shards, arithmetic={"gradients": gradients})
    alone = run(it, run_dir=tmp_path / "solo")
    result = Cluster(it, tmp_path).train(workers)
    assert result.weights_sha256 == alone.weights_sha256
    assert result.metrics == alone.metrics
    assert result.arithmetic["gradients"] == gradients
    plain = run(job(name, shards), run_dir=tmp_path / "plain")
    assert plain.weights_sha256 != alone.weights_sha256


@pytest.mark.parametrize("exchange", [{"mode": "async"}, {"mode": "ssp"}, {"backup_workers": 1}])
def test_where_residuals_have_no_place(exchange: dict[str, object], tmp_path: Path) -> None:
    it = job("cnn", 6, arithmetic={"gradients": "top_k"}, exchange=exchange)
    with pytest.raises(LaunchError, match="top_k"):
        Cluster(it, tmp_path).train(0)


def rounded(n: int) -> Array:
    vector: Array = np.random.default_rng(n).standard_normal(n).astype(np.float32)
    Rounded("bfloat16").round(vector)
    return vector


def chunk(vector: Array, encoding: pb.Encoding.ValueType, **more: int) -> bytes:
    return encode(pb.Place(encoding=encoding, **more), vector)


def test_two_bytes_an_element() -> None:
    vector = rounded(10_000)
    lengths = [len(chunk(vector, encoding)) for encoding in (pb.ENCODING_RAW, pb.ENCODING_BFLOAT16)]
    assert lengths[0] - lengths[1] == pytest.approx(20_000, abs=8)
    into = np.zeros_like(vector)
    elements(decode_push(chunk(vector, pb.ENCODING_BFLOAT16)), into)
    assert into.tobytes() == vector.tobytes()


def test_sparse_elements_are_indices_and_values() -> None:
    vector: Array = np.zeros(10_000, np.float32)
    vector[::100] = np.arange(1, 101)
    message = chunk(vector, pb.ENCODING_SPARSE)
    assert len(message) == pytest.approx(100 * 8, abs=40)
    into = np.ones_like(vector)
    elements(decode_push(message), into)
    assert into.tobytes() == vector.tobytes()
    # What that would make longer goes as it is, and says so.
    full = decode_push(chunk(vector + 1, pb.ENCODING_SPARSE))
    assert full.place.encoding == pb.ENCODING_RAW
    elements(full, into)
    assert into.tobytes() == (vector + 1).tobytes()


def test_sparse_chunks_that_are_none_are_refused() -> None:
    n = 100
    vector: Array = np.zeros(n, np.float32)
    vector[[3, 50]] = 1, 2
    intake = Intake(0, 0, n, np.float32, Written("sparse", n))
    box = intake.expect(1, 1, 0, [Node(0, 1), Node(1, 2)])

    def sent(lo: int, data: bytes, encoding: pb.Encoding.ValueType) -> pb.Outcome.ValueType:
        place = pb.Place(lease=1, lo=lo, hi=lo + 1, total=n, encoding=encoding, checksum=checksum(data))
        return intake.take(Piece(place, memoryview(data)))[0]

    good = bytes(decode_push(chunk(vector, pb.ENCODING_SPARSE)).data)
    beyond = np.array([3, n], np.uint32).tobytes() + good[8:]
    falling = np.array([50, 3], np.uint32).tobytes() + good[8:]
    for wrong in (good[:-1], good[:-4], beyond, falling, good * 60):
        assert sent(0, wrong, pb.ENCODING_SPARSE) == pb.OUTCOME_REFUSED
    assert sent(0, vector.tobytes()[:-4], pb.ENCODING_RAW) == pb.OUTCOME_REFUSED
    assert sent(0, good, pb.ENCODING_SPARSE) == pb.OUTCOME_UNSPECIFIED
    assert sent(1, vector.tobytes(), pb.ENCODING_RAW) == pb.OUTCOME_COMPLETE
    assert [row.tobytes() for row in box.vectors] == [vector.tobytes()] * 2


@pytest.mark.parametrize("border", [0, 5, CHUNK // 4, CHUNK // 4 + 1, 10**6])
def test_no_chunk_crosses_the_border(border: int) -> None:
    n = CHUNK // 2 + 3
    found = cuts(n, 4, border)
    assert [lo for lo, _ in found] == [0, *(hi for _, hi in found[:-1])]
    assert found[-1][1] == n
    assert all(0 < hi - lo <= CHUNK // 4 for lo, hi in found)
    assert not any(lo < border < hi for lo, hi in found)
    assert cuts(0, 4, border) == []


def test_another_encoding_than_the_jobs_is_refused() -> None:
    n, parameters = 100, 60
    vector = rounded(n)
    intake = Intake(0, 0, n, np.float32, Written("bfloat16", parameters))
    box = intake.expect(1, 1, 0, [Node(0, 2)])

    def sent(encoding: pb.Encoding.ValueType, start: int, stop: int) -> pb.Outcome.ValueType:
        place = {"lease": 1, "lo": 0, "hi": 2, "offset": start, "total": n}
        return intake.take(decode_push(chunk(vector[start:stop], encoding, **place)))[0]

    assert sent(pb.ENCODING_RAW, 0, parameters) == pb.OUTCOME_REFUSED
    assert sent(pb.ENCODING_BFLOAT16, parameters, n) == pb.OUTCOME_REFUSED
    assert sent(pb.ENCODING_FLOAT16, 0, parameters) == pb.OUTCOME_REFUSED
    assert sent(pb.ENCODING_BFLOAT16, 0, parameters - 1) == pb.OUTCOME_REFUSED
    assert sent(pb.ENCODING_BFLOAT16, 0, parameters) == pb.OUTCOME_UNSPECIFIED
    assert sent(pb.ENCODING_RAW, parameters, n) == pb.OUTCOME_COMPLETE
    assert box.vectors[0].tobytes() == vector.tobytes()
