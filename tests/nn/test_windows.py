import numpy as np
import pytest

from dptrain.nn.windows import window_columns, window_rows


def images(n, height, width, channels):
    return np.arange(float(n * height * width * channels)).reshape(n, height, width, channels)


def windows_of(x, starts, extent):
    """Every window by its definition, a row each."""
    return np.array([x[n, r : r + extent, c : c + extent].ravel() for n, r, c in starts])


@pytest.mark.parametrize(("extent", "step", "channels"), [(1, 1, 1), (2, 1, 3), (3, 2, 2)])
def test_by_columns_every_window_is_a_row(extent, step, channels):
    x = images(2, 7, 6, channels)
    rows, columns = ((side - extent) // step + 1 for side in x.shape[1:3])
    found = window_columns(x, step, np.empty((extent, extent, channels, 2, rows, columns)))
    starts = [(n, step * r, step * c) for n, r, c in np.ndindex(2, rows, columns)]
    np.testing.assert_array_equal(found, windows_of(x, starts, extent))


@pytest.mark.parametrize(("extent", "stride", "pool"), [(1, 1, 1), (3, 1, 2), (2, 2, 1), (2, 2, 2), (3, 1, 3)])
def test_by_rows_windows_of_one_place_in_a_pool_stay_together(extent, stride, pool):
    x = images(2, 11, 12, 5)
    rows, columns = (((side - extent) // stride + 1) // pool for side in x.shape[1:3])
    found = window_rows(x, stride, np.empty((pool, pool, 2, rows, columns, extent, extent * 5)))
    order = np.ndindex(pool, pool, 2, rows, columns)
    starts = [(n, stride * (pool * r + i), stride * (pool * c + j)) for i, j, n, r, c in order]
    np.testing.assert_array_equal(found, windows_of(x, starts, extent))
