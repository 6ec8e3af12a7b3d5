"""Weighted sums of adapters as ONE new compact adapter, exact: VB-LoRA is closed under them.

`Σ w_j · B_j @ A_j` is the product of the members' B and A stacked along the rank. A and B each take a factor of
`sqrt(|w_j|)`, which the member's rows of the bank take instead (B a sign-flipped copy of them where w_j < 0), so that
every tile is again a mixture of bank vectors. Nothing is densified, and what several members share is stored once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import torch
from torch import Tensor

from adapters.checkpoint import TopKCheckpoint, index_dtype, lower_to_sum_of_one
from adapters.config import VBLoRAConfig
from adapters.errors import InvalidSelection
from adapters.layout import AdapterLayout
from adapters.lora import ServedCheckpoint, stack_lora
from adapters.members import (
    BaseTensor,
    check_weights,
    extra_specs,
    joint_bias,
    joint_extras,
    joint_fields,
    joint_layers,
)
from adapters.parameters import Storage
from adapters.targets import LayerShape
from adapters.tensor_file import LARGEST_IN_FACTORS
from adapters.vector_bank import VectorBank

Member = tuple[TopKCheckpoint, float]

_UNUSED = -1  # an index that nothing hangs on: its weight is 0


def blend(members: Sequence[Member], base: BaseTensor | None = None) -> TopKCheckpoint:
    """`Σ weight · delta` of the members, as a compact checkpoint in float32 that PEFT loads.

    Ranks, bank sizes, vector lengths, topk, target modules and dtypes may differ. `base` gives the base model's
    parameters by name (as AdaptedModel.tensor does): needed where members bring trained biases or saved modules,
    which become `W0 + Σ weight · (W − W0)`.

    Raises InvalidSelection for no members, for a weight that is not finite, and for extras that cannot be blended;
    ShapeMismatch when the members are of different base models.
    """
    check_weights(members)
    layers = joint_layers(members)
    length = math.gcd(*(checkpoint.config.vector_length for checkpoint, _ in members))
    topk = max(checkpoint.config.topk for checkpoint, _ in members)
    sources, rows = _bank_rows(members, length)
    indices, weights = _stacked_positions(sources, layers, length, topk, nothing=len(rows) - 1)
    bank, indices, weights = _shared(rows, indices, weights)
    if not float(bank.abs().max()) <= LARGEST_IN_FACTORS:  # NaN where an infinite weight met a 0
        raise InvalidSelection("the weights are too large for these adapters: their banks overflow", subject="adapters")
    extras = joint_extras(members, layers, base)
    config = _config(members, layers, bank, topk)
    return TopKCheckpoint(
        AdapterLayout(config, Storage.TOPK, layers, extra_specs(extras)),
        VectorBank(bank),
        indices.to(index_dtype(config)),
        lower_to_sum_of_one(weights[:, :-1].contiguous()),
        extras,
    )


def weighted_sum(members: Sequence[tuple[ServedCheckpoint, float]], base: BaseTensor | None = None) -> ServedCheckpoint:
    """`Σ weight · delta` of adapters of any types: compact as long as all are VB-LoRA, else stacked as plain LoRA.

    Raises what `blend` raises.
    """
    compact = [(checkpoint, weight) for checkpoint, weight in members if isinstance(checkpoint, TopKCheckpoint)]
    return blend(compact, base) if len(compact) == len(members) else stack_lora(members, base)


@dataclass(frozen=True, slots=True)
class _Source:
    """One member: where its rows begin in the table of rows, as A and as B take them; `parts` of each of its tiles."""

    checkpoint: TopKCheckpoint
    rows_a: int
    rows_b: int
    parts: int


def _bank_rows(members: Sequence[Member], length: int) -> tuple[list[_Source], Tensor]:
    """Every member's rows [n, length], scaled, and at last a row of zeros."""
    sources, rows, start = [], [], 0
    for checkpoint, weight in members:
        own = checkpoint.bank.vectors.float().reshape(-1, length) * math.sqrt(abs(weight))
        rows.append(own)
        rows_a = rows_b = start
        start += len(own)
        if weight < 0:
            rows.append(-own)
            rows_b = start
            start += len(own)
        sources.append(_Source(checkpoint, rows_a, rows_b, checkpoint.config.vector_length // length))
    return sources, torch.cat([*rows, torch.zeros(1, length)])


def _stacked_positions(
    sources: Sequence[_Source], layers: Sequence[LayerShape], length: int, topk: int, *, nothing: int
) -> tuple[Tensor, Tensor]:
    """Indices and weights [positions, topk] of the stacked factors, packed as a layout's spans are.

    Where a member does not adapt a layer its A and its B are the row `nothing`. Indices of weight 0 are _UNUSED.
    """
    spans = [{layer.name: (a, b) for layer, a, b in source.checkpoint.layout.spans()} for source in sources]
    weights = [source.checkpoint.full_weights() for source in sources]
    packed = []
    for layer in layers:
        a_of_members, b_of_members = [], []
        for source, places, own in zip(sources, spans, weights, strict=True):
            r = source.checkpoint.config.r
            if layer.name in places:
                rows_a, rows_b = places[layer.name]
                indices = source.checkpoint.indices.long()
                a = _tiles(indices[rows_a], own[rows_a], source.rows_a, source.parts, topk).reshape(r, -1, topk, 2)
                # B's positions are [out_tiles, r]: a tile's parts are tiles after each other, for every rank.
                b = _tiles(indices[rows_b], own[rows_b], source.rows_b, source.parts, topk)
                b = b.reshape(-1, r, source.parts, topk, 2).transpose(1, 2).flatten(0, 1)
            else:
                a = _nothing(r, layer.in_features // length, topk, nothing)
                b = _nothing(layer.out_features // length, r, topk, nothing)
            a_of_members.append(a)
            b_of_members.append(b)
        packed += [torch.cat(a_of_members, 0).flatten(0, 1), torch.cat(b_of_members, 1).flatten(0, 1)]
    positions = torch.cat(packed)
    return positions[..., 0].long(), positions[..., 1].float()


def _tiles(indices: Tensor, weights: Tensor, first_row: int, parts: int, topk: int) -> Tensor:
    """Positions [positions · parts, topk, 2] of (row of the table, weight), in float64, which holds both exactly."""
    split = first_row + indices.unsqueeze(1) * parts + torch.arange(parts).unsqueeze(-1)  # [positions, parts, k]
    pairs = torch.stack([split.double(), weights.double().unsqueeze(1).expand_as(split)], -1).flatten(0, 1)
    unused = torch.tensor([float(_UNUSED), 0.0], dtype=torch.float64)
    return torch.cat([unused.expand(len(pairs), topk - pairs.shape[1], 2), pairs], 1)


def _nothing(first: int, second: int, topk: int, row: int) -> Tensor:
    position = torch.tensor([[float(_UNUSED), 0.0]] * (topk - 1) + [[float(row), 1.0]], dtype=torch.float64)
    return position.expand(first, second, topk, 2)


def _shared(rows: Tensor, indices: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(bank, indices, weights) with only rows that a position refers to, equal ones once, and indices distinct.

    The heaviest vector of a position comes last: its weight is not stored but what the others leave of 1.
    """
    indices = indices.where(weights > 0, _UNUSED)
    used, compacted = torch.unique(indices[indices >= 0], return_inverse=True)
    bank, shared = torch.unique(rows[used], dim=0, return_inverse=True)
    indices[indices >= 0] = shared[compacted]
    for first, second in combinations(range(indices.shape[1]), 2):
        twice = (indices[:, first] == indices[:, second]) & (indices[:, first] >= 0)
        weights[twice, second] += weights[twice, first]
        weights[twice, first] = 0.0
        indices[twice, first] = _UNUSED
    bank = torch.cat([bank, bank.new_zeros(max(0, indices.shape[1] - len(bank)), bank.shape[1])])
    indices = _filled(indices, len(bank))
    order = weights.argsort(dim=-1, stable=True)
    return bank, indices.gather(-1, order), weights.gather(-1, order)


def _filled(indices: Tensor, num_vectors: int) -> Tensor:
    """Unused places get indices that their position does not hold: they must differ, though nothing hangs on them."""
    topk = indices.shape[1]
    if not bool((indices == _UNUSED).any()):
        return indices
    candidates = torch.arange(min(num_vectors, 2 * topk))
    taken = (indices.unsqueeze(-1) == candidates).any(1)  # [positions, candidates]
    free = taken.long().argsort(dim=-1, stable=True)  # those not taken first
    unused = indices == _UNUSED
    nth = unused.long().cumsum(-1) - 1  # which of its position's unused places each is
    return indices.where(~unused, free.gather(-1, nth.clamp_min(0)))


def _config(members: Sequence[Member], layers: Sequence[LayerShape], bank: Tensor, topk: int) -> VBLoRAConfig:
    return replace(
        members[0][0].config,
        r=sum(checkpoint.config.r for checkpoint, _ in members),
        num_vectors=len(bank),
        vector_length=bank.shape[1],
        topk=topk,
        save_only_topk_weights=True,
        bias=joint_bias(members, VBLoRAConfig),
        **joint_fields(members, layers, VBLoRAConfig),
    )
