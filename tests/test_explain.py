"""Embeddings of whole images, and how many directions they use."""

import pytest
import torch

from decur_core import explain, losses, pretrain
from decur_core.data.store import Store


def test_effective_rank_counts_directions():
    make = torch.Generator().manual_seed(0)
    signals = torch.linalg.qr(torch.randn(400, 9, generator=make) - 0.0)[0]
    signals = signals - signals.mean(0)
    assert explain.effective_rank(signals[:, :1].repeat(1, 8)) == pytest.approx(1, abs=1e-3)
    assert explain.effective_rank(torch.randn(20000, 8, generator=make)) == pytest.approx(8, rel=1e-2)
    two = torch.cat([signals[:, :1].repeat(1, 4), signals[:, 1:2].repeat(1, 4)], dim=1)
    assert explain.effective_rank(two) == pytest.approx(2, rel=2e-2)


def test_embeddings_do_not_depend_on_the_batch_size_and_follow_the_store(tiny, pair_store):
    folder = pretrain.run(tiny(epochs=1), pair_store)
    store = Store(pair_store)
    one = explain.embeddings(folder, store, samples=30, batch_size=7)
    two = explain.embeddings(folder, store, samples=30, batch_size=64)
    for a, b in zip(one, two, strict=True):
        assert a.shape == (30, 8)
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert losses.cross_correlation(*one).shape == (8, 8)
    assert explain.embed_members({"run": folder}, pair_store, samples=4)["run"][0].shape == (4, 8)
