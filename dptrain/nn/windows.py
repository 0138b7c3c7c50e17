"""The windows of some images as a matrix (im2col), and zeros around images."""

import numpy as np

from dptrain.nn.layer import Array


def window_columns(x: Array, step: int, out: Array) -> Array:
    """(windows, elements of one), from images (n, height, width, channels) whose windows start every ``step`` pixels.

    Lies in ``out``, (extent, extent, channels, n, rows, columns), and is filled column by column: long runs where
    there are few channels.
    """
    extent, _, channels, _, rows, columns = out.shape
    for i in range(extent):
        for j in range(extent):
            pixels = x[:, i : i + step * rows : step, j : j + step * columns : step]
            np.copyto(out[i, j], pixels.transpose(3, 0, 1, 2))
    return out.reshape(extent * extent * channels, -1).T


def window_rows(x: Array, stride: int, out: Array) -> Array:
    """(windows, elements of one), from contiguous images (n, height, width, channels), every ``stride`` pixels.

    Lies in ``out``, (pool, pool, n, rows, columns, extent, extent * channels): first all windows that meet the first
    place of a pool of pool x pool outputs, then those of the second, and so on.
    """
    pool, _, _, _, _, extent, run = out.shape
    image, row, pixel, item = x.strides
    every = pool * stride
    strides = (stride * row, stride * pixel, image, every * row, every * pixel, row, item)
    np.copyto(out, np.ndarray(out.shape, x.dtype, x, 0, strides))
    return out.reshape(-1, extent * run)
