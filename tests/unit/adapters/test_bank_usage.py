"""Which vectors of a bank an adapter uses, held against a count by hand of every tile of what PEFT has written."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from adapters.bank_usage import bank_usage
from adapters.checkpoint import TopKCheckpoint
from tests.factories import AdapterSpec, make_adapter, tiny_model
from tests.unit.adapters.support import compact

VECTORS = 32


@pytest.fixture(scope="module", params=[True, False], ids=["compact", "logits"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TopKCheckpoint:
    spec = AdapterSpec(num_vectors=VECTORS, topk=3, compact=request.param, target_modules=["q_proj", "up_proj"])
    return compact(make_adapter(tiny_model("llama"), spec, tmp_path_factory.mktemp("adapter") / "one"))


def by_hand(checkpoint: TopKCheckpoint) -> dict[tuple[str, int], list[float]]:
    """(layer, side) → the share of each vector."""
    indices, weights = checkpoint.indices.tolist(), checkpoint.full_weights().tolist()
    shares: dict[tuple[str, int], list[float]] = defaultdict(lambda: [0.0] * VECTORS)
    for layer, *sides in checkpoint.layout.spans():
        for side, rows in enumerate(sides):
            tiles = range(rows.start, rows.stop)
            for tile in tiles:
                for vector, weight in zip(indices[tile], weights[tile], strict=True):
                    shares[layer.name, side][vector] += weight / len(tiles)
    return shares


@pytest.mark.parametrize(
    ("most", "columns", "per_column"),
    [(1000, 32, 1), (32, 32, 1), (31, 16, 2), (16, 16, 2), (7, 7, 5), (5, 5, 7), (1, 1, 32)],
)
def test_columns_hold_what_their_vectors_are_given(
    checkpoint: TopKCheckpoint, most: int, columns: int, per_column: int
) -> None:
    usage = bank_usage(checkpoint, most)
    assert usage.vectors_per_column == per_column
    assert usage.shares.shape == (len(checkpoint.layout.layers), 2, columns)
    assert usage.layers == tuple(layer.name for layer in checkpoint.layout.layers)
    torch.testing.assert_close(
        usage.shares.sum(-1), torch.ones(len(usage.layers), 2, dtype=torch.float64), atol=1e-6, rtol=0
    )
    for (name, side), shares in by_hand(checkpoint).items():
        expected = [sum(shares[start : start + per_column]) for start in range(0, VECTORS, per_column)]
        got = usage.shares[usage.layers.index(name), side].tolist()
        assert got == pytest.approx(expected, abs=1e-6), (name, side)


def test_a_vector_is_used_if_any_tile_gives_it_weight(checkpoint: TopKCheckpoint) -> None:
    indices = torch.zeros_like(checkpoint.indices)
    indices[:, 1:] = torch.tensor([5, 6])
    weights = torch.zeros_like(checkpoint.weights)
    weights[:, 0] = 1.0  # the others are chosen and given nothing
    alone = replace(checkpoint, indices=indices, weights=weights)
    assert bank_usage(alone, 4).used_vectors == 1
    assert bank_usage(alone, 4).shares[..., 0].eq(1.0).all()
    weights[7] = torch.tensor([0.5, 0.0])
    assert bank_usage(alone, 4).used_vectors == 2
    used = {v for shares in by_hand(checkpoint).values() for v, share in enumerate(shares) if share > 0}
    assert bank_usage(checkpoint, 3).used_vectors == len(used)


def test_one_vector_a_tile(tmp_path: Path) -> None:
    one = compact(make_adapter(tiny_model("llama"), AdapterSpec(topk=1), tmp_path / "one"))
    usage = bank_usage(one, 8)
    assert usage.shares.sum(-1).eq(1.0).all()
    assert usage.used_vectors == len(one.indices.unique())
