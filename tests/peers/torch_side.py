"""The same tensors in PyTorch's layout and in ours: channels first there, last here; weights transposed."""

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed: pip install '.[peers]'")


def ours(tensor):
    """A PyTorch tensor of a weight, its gradient or a batch of activations as an array in our layout."""
    array = tensor.detach().numpy()
    if array.ndim == 4:
        return array.transpose(2, 3, 1, 0)
    return array.T if array.ndim == 2 else array


def images(array):
    """(rows, height, width, channels) as PyTorch wants it."""
    return torch.from_numpy(np.ascontiguousarray(array.transpose(0, 3, 1, 2)))


def rows_of(tensor):
    """Activations, (rows, ...), in our layout."""
    array = tensor.detach().numpy()
    return array.transpose(0, 2, 3, 1) if array.ndim == 4 else array


class ChannelsLast(torch.nn.Module):
    """What flatten sees with the channels last."""

    def forward(self, x):
        return x.permute(0, 2, 3, 1).flatten(1)


def relative(found, expected):
    """The largest difference, relative to the largest expected value."""
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max() / np.abs(expected).max())
