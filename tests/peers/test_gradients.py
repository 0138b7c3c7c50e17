"""The declared arithmetics of gradients against PyTorch's types and selection."""

import numpy as np
import pytest

from dptrain.gradients import Rounded, TopK, elements_kept

from .torch_side import torch


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_rounding_is_pytorchs(name):
    drawn = np.random.default_rng(1).integers(0, 1 << 32, 500_000, np.uint32).view(np.float32)
    drawn = np.concatenate([drawn, np.random.default_rng(2).standard_normal(100_000).astype(np.float32)])
    drawn = drawn[~np.isnan(drawn)]
    with np.errstate(all="ignore"):
        ours = drawn.copy()
        Rounded(name).round(ours)
    theirs = torch.from_numpy(drawn).to(getattr(torch, name)).to(torch.float32).numpy()
    assert ours.tobytes() == theirs.tobytes()


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_sums_of_pytorchs_16_bit_tensors_are_ours(name):
    a, b = torch.randn(2, 10_000, generator=torch.Generator().manual_seed(3)).to(getattr(torch, name))
    total = a.to(torch.float32).numpy() + b.to(torch.float32).numpy()
    Rounded(name).round(total)
    assert total.tobytes() == (a + b).to(torch.float32).numpy().tobytes()


def test_what_is_kept_is_pytorchs_topk():
    v = np.random.default_rng(4).standard_normal(10_000).astype(np.float32)
    sent = v.copy()
    TopK(0.01).leaf(sent, None, None)
    chosen = torch.from_numpy(v).abs().topk(elements_kept(0.01, len(v))).indices.sort().values.numpy()
    assert np.flatnonzero(sent).tolist() == chosen.tolist()
    assert sent[chosen].tobytes() == v[chosen].tobytes()
