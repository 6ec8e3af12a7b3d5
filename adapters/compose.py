"""From top-k selections to factors: pure functions on tensors (VB-LoRA paper, section 3.2).

A *position* is one tile of A (rank row × input tile) or of B (output tile × rank column). Its tile is the mixture of
`k` bank vectors: `tile = Σ_k weight_k · bank[index_k]`. Everything here computes in float32.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor


def mixtures(indices: Tensor, weights: Tensor, bank: Tensor) -> Tensor:
    """The tile of every position, composed straight from indices and weights.

    indices [positions, k] any integer dtype; weights [positions, k]; bank [num_vectors, vector_length].
    Returns [positions, vector_length] float32. The gathered vectors are summed as they are read: nothing of size
    positions × k × vector_length is ever made.
    """
    return F.embedding_bag(indices.long(), bank.float(), per_sample_weights=weights.float(), mode="sum")


@lru_cache(maxsize=32)
def factor_order(r: int, layers: tuple[tuple[int, int], ...]) -> Tensor:
    """The order of positions in which tiles, one after the other, make up the factors A and Bᵀ of every layer.

    `layers` are (in_tiles, out_tiles). A checkpoint has A's positions [r, in_tiles], which is A [r, in_features]
    already, and B's [out_tiles, r], which PEFT transposes to [out_tiles, vector_length, r] and flattens to
    B [out_features, r]. Bᵀ is what a batched product reads; taking the positions in its order saves moving the tiles.
    """
    order = torch.arange(sum(r * (in_tiles + out_tiles) for in_tiles, out_tiles in layers))
    start = 0
    for in_tiles, out_tiles in layers:
        start += r * in_tiles
        of_b = order[start : start + r * out_tiles]
        of_b.copy_(of_b.reshape(out_tiles, r).T.flatten())
        start += len(of_b)
    return order


def delta(a: Tensor, b: Tensor, *, transposed: bool = False) -> Tensor:
    """`B @ A` [out, in], or its transpose [in, out] for a Conv1D, which stores its weight that way.

    a [r, in], b [out, r]. There is no alpha and no scaling in VB-LoRA.
    """
    product = b @ a
    return product.T if transposed else product


def remainder_weights(stored: Tensor) -> Tensor:
    """All k weights of each position, from the k - 1 that a compact checkpoint stores.

    stored [..., k - 1] any float dtype. Returns [..., k] float32: the last weight is `1 - sum`, computed in float32
    whatever the storage. By rounding the stored weights can sum to more than 1 (PEFT then takes the log of a negative
    number and answers NaN); the remainder is 0 there and the others are scaled back to 1, as the softmax over their
    logits does.
    """
    wide = stored.float()
    total = wide.sum(-1, keepdim=True)
    return torch.cat([wide / total.clamp_min(1.0), (1.0 - total).clamp_min(0.0)], dim=-1)


def select_topk(logits: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    """The top-k of each position and their softmax: PEFT's `_get_low_rank_matrix` without the gather.

    logits [..., num_vectors], where -inf marks a vector that is never chosen. Returns indices [..., topk] int64 and
    weights [..., topk] float32, heaviest first.
    """
    best, indices = logits.float().topk(topk, dim=-1)
    return indices, best.softmax(dim=-1)


def reconstruct_logits(indices: Tensor, weights: Tensor, num_vectors: int) -> Tensor:
    """Full logits from a compact position: -inf everywhere but `log(weight)` at the chosen indices.

    indices [..., k], weights [..., k]. Returns [..., num_vectors] float32, whose top-k softmax is `weights` again. A
    weight of exactly 0 becomes -inf, which is still right: the vector is chosen and contributes nothing.
    """
    logits = torch.full((*indices.shape[:-1], num_vectors), float("-inf"), device=indices.device)
    return logits.scatter_(-1, indices.long(), weights.float().log())
