from __future__ import annotations

import pytest
import torch

from adapters.vector_bank import VectorBank


def test_fresh_bank_is_uniform_within_the_papers_bound():
    bank = VectorBank.uniform(256, 64, generator=torch.Generator().manual_seed(0))
    assert (bank.num_vectors, bank.vector_length, bank.vectors.dtype) == (256, 64, torch.float32)
    assert 0.0199 < bank.vectors.abs().max() <= 0.02
    assert bank.vectors.std().item() == pytest.approx(0.02 / 3**0.5, rel=0.02)
    assert bank.vectors.mean().item() == pytest.approx(0, abs=5e-4)


def test_a_seed_and_a_bound_decide_it():
    first, second = (VectorBank.uniform(4, 8, bound=0.5, generator=torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(first.vectors, second.vectors)
    assert 0.1 < first.vectors.abs().max() <= 0.5
