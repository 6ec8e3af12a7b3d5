"""The vector bank: the one table of vectors from which every factor of an adapter is composed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

DEFAULT_BOUND = 0.02


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class VectorBank:
    """An adapter's bank, shared by all its layers: `vectors` [num_vectors, vector_length], float32 or 16-bit float."""

    vectors: Tensor

    @classmethod
    def uniform(
        cls,
        num_vectors: int,
        vector_length: int,
        *,
        bound: float = DEFAULT_BOUND,
        generator: torch.Generator | None = None,
    ) -> VectorBank:
        """A fresh float32 bank, uniform in [-bound, bound] as in PEFT (0.02 by default; VB-LoRA paper, section 3.3).

        A bank of zeros would give zero gradients, and a large bound makes training unstable.
        """
        vectors = torch.empty(num_vectors, vector_length).uniform_(-bound, bound, generator=generator)
        return cls(vectors)

    @property
    def num_vectors(self) -> int:
        return self.vectors.shape[0]

    @property
    def vector_length(self) -> int:
        return self.vectors.shape[1]
