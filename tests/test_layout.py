import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dptrain.layout import BLOCK, Layout, digest, segments

LAYOUT = Layout([("a.W", (2, 3)), ("a.b", (3,)), ("scalar", ())], [("n.mean", (2,), 0.1), ("n.variance", (2,), 0.5)])


def test_tensors_lie_one_after_the_other_parameters_first():
    assert (LAYOUT.parameters, LAYOUT.size) == (10, 14)
    vector = np.arange(14.0)
    views = LAYOUT.views(vector)
    np.testing.assert_array_equal(views["a.W"], [[0, 1, 2], [3, 4, 5]])
    np.testing.assert_array_equal(views["a.b"], [6, 7, 8])
    assert views["scalar"].shape == ()
    np.testing.assert_array_equal(views["n.variance"], [12, 13])


def test_views_share_memory_with_the_vector():
    vector = np.zeros(14)
    LAYOUT.views(vector)["a.b"][:] = 5
    np.testing.assert_array_equal(np.flatnonzero(vector), [6, 7, 8])


def test_leading_axes_stay():
    vectors = np.arange(28.0).reshape(2, 14)
    views = LAYOUT.views(vectors)
    assert views["a.W"].shape == (2, 2, 3)
    np.testing.assert_array_equal(views["a.b"][1], vectors[1, 6:9])
    assert np.shares_memory(views["a.W"], vectors)


def test_buffers_know_their_momentum():
    np.testing.assert_array_equal(LAYOUT.buffer_momentum(), [0.1, 0.1, 0.5, 0.5])
    assert Layout([("a", (3,))]).buffer_momentum().shape == (0,)


def test_a_name_can_only_be_used_once():
    with pytest.raises(ValueError, match="'a'"):
        Layout([("a", (1,))], [("a", (2,), 0.1)])


def test_the_description_tells_layouts_apart():
    assert LAYOUT.describe()[0] == ["a.W", [2, 3], None]
    assert Layout([("a", (6,))]).describe() != Layout([("a", (2, 3))]).describe()


@given(size=st.integers(0, 20 * BLOCK), parts=st.integers(1, 40))
def test_segments_cover_the_vector_at_block_borders(size, parts):
    found = segments(size, parts)
    assert len(found) == parts
    assert [i for i, _ in found][1:] == [j for _, j in found][:-1]
    assert (found[0][0], found[-1][1]) == (0, size)
    assert all(cut % BLOCK == 0 or cut == size for pair in found for cut in pair)
    lengths = [-(-(hi - lo) // BLOCK) for lo, hi in found]
    assert max(lengths) - min(lengths) <= 1


def test_the_digest_is_of_the_elements_bytes():
    vector = np.arange(5, dtype=np.float32)
    expected = "sha256:" + hashlib.sha256(vector.astype("<f4").tobytes()).hexdigest()
    assert digest(vector) == expected
    assert digest(vector.astype(">f4")) == expected
    assert digest(np.arange(10, dtype=np.float32)[::2] / 2) == expected
    assert digest(np.nextafter(vector, 9, dtype=np.float32)) != expected
    assert digest(vector.astype(np.float64)) != expected
