"""Compiles the kernels to machine code for a Hopper GPU, which needs none: Triton brings ptxas.

    python -m tests.unit.adapters.kernels.compile_kernels

Run on its own: where Triton interprets (tests/conftest.py), it has no functions to compile. Prints each kernel and the
bytes of its code.
"""

from __future__ import annotations

from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from adapters.kernels import bank_direct, gathered
from adapters.kernels.blocks import FactorBlocks, TileBlocks

HOPPER = GPUTarget("cuda", 90, 32)
POINTERS = {
    "h": "*fp32",
    "weights": "*fp32",
    "row_weights": "*fp32",
    "indices": "*u8",
    "x": "*bf16",
    "out": "*bf16",
    "banks": "*bf16",
    "a": "*bf16",
    "b_t": "*bf16",
    **dict.fromkeys(("ranks", "places", "row_slots", "projection_of_tile", "ends"), "*i32"),
}


def compiled(kernel: Any, constants: dict[str, Any]) -> Any:
    """A 7B model's q, k and v, as the launch functions call it."""
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    signature = {name: "constexpr" if name in constants else POINTERS.get(name, "i32") for name in kernel.arg_names}
    return triton.compile(ASTSource(kernel, signature, constants), target=HOPPER, options={"num_warps": 4})


def main() -> None:
    shared = {"PROJECTIONS": 3, "MEMBERS": 2, "ADD": True}
    for rank, topk, length in ((4, 2, 256), (64, 8, 16), (5, 1, 96)):
        tiles = TileBlocks.of(rank=rank, vector_length=length, in_tiles=4096 // length)
        features = FactorBlocks.of(rank=rank, in_features=4096)
        of_tiles = {"BLOCK_R": tiles.ranks, "BLOCK_T": tiles.tiles, "BLOCK_L": tiles.features, "SPLITS": tiles.splits}
        of_factors = {"BLOCK_R": features.ranks, "BLOCK_F": features.features, "SPLITS": features.splits}
        for module, blocks in ((bank_direct, of_tiles), (gathered, of_factors)):
            for name in ("_shrink", "_expand"):
                constants = {**shared, **blocks, "RANK": rank, "TOPK": topk, "VECTOR_LENGTH": length}
                code = compiled(getattr(module, name), constants).asm["cubin"]
                print(f"{module.__name__}{name} rank {rank} topk {topk} vectors of {length}: {len(code)} bytes")


if __name__ == "__main__":
    main()
