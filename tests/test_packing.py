import numpy as np
import pytest

from dptrain.gradients import Rounded, TopK
from dptrain.layout import Array
from dptrain.packing import BFLOAT16, ENCODINGS, FLOAT16, RAW, SPARSE, encoding_of, pack, ranges, unpack


def message(vector: Array, encoding: str) -> tuple[str, Array]:
    packed = pack(vector, encoding)
    content = np.concatenate([np.asarray(piece) for piece in packed.pieces])
    assert content.dtype == np.uint8
    assert len(content) == packed.nbytes
    return packed.encoding, content


def declared(encoding: str, n: int) -> Array:
    """Values as the arithmetic of an encoding gives them, infinities and NaN among those of 16 bits."""
    vector: Array = np.random.default_rng(n).standard_normal(n).astype(np.float32)
    if encoding in (BFLOAT16, FLOAT16):
        vector[: n // 3] *= 1e9
        vector[n // 2 :: 9] = np.nan
        Rounded(encoding).round(vector)
    elif encoding == SPARSE:
        TopK(0.01).leaf(vector, None, None)
    return vector


@pytest.mark.parametrize("n", [1, 2, 1_001, 70_000])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_what_was_packed_comes_out_to_the_last_bit(encoding: str, n: int) -> None:
    vector = declared(encoding, n)
    kind, content = message(vector, encoding)
    into = np.full(n, np.nan, np.float32)
    unpack(content, kind, into)
    assert into.tobytes() == vector.tobytes()


def test_so_many_bytes() -> None:
    n = 10_000
    assert [pack(declared(encoding, n), encoding).nbytes for encoding in ENCODINGS] == [4 * n, 2 * n, 2 * n, 8 * 100]


def test_what_is_not_of_the_arithmetic_would_lose_bits() -> None:
    """Negative control."""
    vector = np.random.default_rng(1).standard_normal(100).astype(np.float32)
    for encoding in (BFLOAT16, FLOAT16):
        into = np.zeros_like(vector)
        unpack(message(vector, encoding)[1], encoding, into)
        assert into.tobytes() != vector.tobytes()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_dense_vector_is_not_sent_as_a_sparse_one(dtype: type) -> None:
    vector = np.ones(100, dtype)
    kind, content = message(vector, SPARSE)
    assert (kind, len(content)) == (RAW, vector.nbytes)
    vector[::2] = 0
    vector[1] = 0
    kind, content = message(vector, SPARSE)
    into = np.ones_like(vector)
    unpack(content, kind, into)
    assert kind == SPARSE
    assert into.tobytes() == vector.tobytes()


@pytest.mark.parametrize("encoding", [RAW, BFLOAT16, FLOAT16])
def test_a_wrong_length_is_refused(encoding: str) -> None:
    with pytest.raises(ValueError, match="bytes"):
        unpack(np.zeros(7, np.uint8), encoding, np.zeros(3, np.float32))


@pytest.mark.parametrize("index", [[0, 0], [1, 0], [0, 3], [1 << 31, (1 << 32) - 1]])
def test_indices_that_do_not_rise_within_the_vector_are_refused(index: list[int]) -> None:
    content = np.concatenate([np.array(index, np.uint32), np.ones(len(index), np.float32).view(np.uint32)])
    into = np.full(3, 5, np.float32)
    with pytest.raises(ValueError, match="indices"):
        unpack(content.view(np.uint8), SPARSE, into)
    assert into.tolist() == [5, 5, 5]


def test_bytes_that_are_no_pairs_and_unknown_encodings_are_refused() -> None:
    with pytest.raises(ValueError, match="multiple"):
        unpack(np.zeros(9, np.uint8), SPARSE, np.zeros(3, np.float32))
    with pytest.raises(ValueError, match="encoding"):
        unpack(np.zeros(12, np.uint8), "gzip", np.zeros(3, np.float32))


def test_buffers_are_sent_raw() -> None:
    assert ranges(0, 10, 10, BFLOAT16) == [(0, 10, BFLOAT16)]
    assert ranges(4, 12, 10, BFLOAT16) == [(4, 10, BFLOAT16), (10, 12, RAW)]
    assert ranges(11, 12, 10, SPARSE) == [(11, 12, RAW)]
    assert ranges(3, 3, 10, SPARSE) == []


def test_every_arithmetic_has_its_encoding() -> None:
    assert [encoding_of(name) for name in ("exact", "bfloat16", "float16", "top_k")] == list(ENCODINGS)
