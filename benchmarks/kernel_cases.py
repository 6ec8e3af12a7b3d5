"""Random groups of projections with adapters in their tables: what kernels are checked on and timed on."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from adapters.checkpoint import TopKCheckpoint
from adapters.config import VBLoRAConfig
from adapters.kernels import reference
from adapters.kernels.delta import GroupDelta, Pair
from adapters.kernels.tables import BankTable, FactorTable, GroupShape, RowTable, SelectionTable
from adapters.layout import AdapterLayout
from adapters.parameters import Storage
from adapters.targets import LayerShape
from adapters.vector_bank import VectorBank

Selections = Sequence[Sequence[tuple[int, float]]]


@dataclass(frozen=True, slots=True)
class KernelCase:
    """A group, its tables and a batch. `dtype` is that of inputs and outputs, `table` that of banks and factors.

    `mixed`: adapters of all ranks and topk up to these, some without some projection, and rows of the base, of one
    adapter and of blends. Otherwise all are equal, and row i runs adapter i, counted round.
    """

    in_features: int
    out_features: tuple[int, ...]
    rank: int = 4
    num_vectors: int = 16
    vector_length: int = 16
    topk: int = 2
    slots: int = 4
    rows: int = 6
    members: int = 2
    dtype: torch.dtype = torch.float32
    table: torch.dtype = torch.float32
    mixed: bool = True

    @property
    def shape(self) -> GroupShape:
        return GroupShape(self.in_features, self.out_features)


@dataclass(frozen=True, slots=True, eq=False)
class KernelGroup:
    """A case's tensors. `checkpoints` are the adapters, by slot; `names` the modules of each that were put there."""

    case: KernelCase
    x: Tensor  # [rows, in_features]
    rows: RowTable
    selections: SelectionTable
    factors: FactorTable
    checkpoints: list[TopKCheckpoint]
    names: list[Sequence[str | None]]

    def delta(self, pair: Pair) -> GroupDelta:
        return GroupDelta(self.rows, selections=self.selections, factors=self.factors, choice=pair)

    def output(self) -> Tensor:
        return torch.full((len(self.x), self.case.shape.total_out), float("nan"), device=self.x.device).to(self.x.dtype)

    def written(self, pair: Pair) -> Tensor:
        output = self.output()
        self.delta(pair).write(output, self.x)
        return output

    def table(self, pair: Pair) -> SelectionTable | FactorTable:
        return self.selections if pair is Pair.BANK_DIRECT else self.factors

    def put(self, slot: int, checkpoint: TopKCheckpoint, names: Sequence[str | None]) -> None:
        """The adapter in both tables, its bank at the place of the slot's number."""
        self.selections.banks.put(slot, checkpoint.bank)
        self.selections.put(slot, checkpoint, names, place=slot)
        composed = {layer.name: (a, b_t) for layer, a, b_t in checkpoint.factors()}
        self.factors.put(slot, [None if name is None else composed[name] for name in names])

    def error(self, pair: Pair) -> float:
        """The largest difference from the reference in float64, over the largest value."""
        exact = reference.delta(self.x, self.table(pair), self.rows)
        return float((self.written(pair).double() - exact).abs().max() / exact.abs().max())


# Every size that is no multiple of a block, every type, and each end of what is allowed.
CHECKED: Mapping[str, KernelCase] = {
    "plain": KernelCase(64, (64, 32, 32)),
    "one projection": KernelCase(48, (80,), members=1),
    "rank 1, topk 1": KernelCase(32, (48, 16), rank=1, topk=1),
    "rank 64": KernelCase(32, (32,), rank=64, rows=3),
    "rank 5, topk 8": KernelCase(64, (32, 64), rank=5, topk=8),
    "tiles of 3": KernelCase(33, (15, 27), vector_length=3, num_vectors=20, topk=3),
    "tiles of 1": KernelCase(37, (19,), vector_length=1, rank=3),
    "tiles of 20": KernelCase(60, (40, 20, 80), vector_length=20, rank=2),
    "tiles of 320": KernelCase(640, (320, 640), vector_length=320, rank=2, rows=3),
    "more tiles than a block": KernelCase(1104, (1104,), vector_length=16, rank=2, rows=2),
    "many vectors": KernelCase(32, (32,), num_vectors=300),
    "more vectors than int16": KernelCase(8, (8,), num_vectors=33_000, vector_length=4, slots=2, rows=2),
    "blends of 4": KernelCase(32, (32, 16), members=4, slots=6),
    "bfloat16": KernelCase(64, (64, 32, 32), dtype=torch.bfloat16, table=torch.bfloat16),
    "float16": KernelCase(64, (64, 32, 32), dtype=torch.float16, table=torch.float16),
    "float32 banks, bfloat16 inputs": KernelCase(64, (32, 64), dtype=torch.bfloat16),
}

_SUMS = 3e-6  # what float32 sums may err by, of the largest output
_ROUNDING = {torch.float32: 0.0, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def tolerance(dtype: torch.dtype, device: torch.device | str) -> float:
    """Of the largest output: float32 sums, then one rounding. Triton's interpreter cuts bfloat16 off instead."""
    cuts_off = dtype is torch.bfloat16 and torch.device(device).type == "cpu"
    return _SUMS + _ROUNDING[dtype] * (2 if cuts_off else 1)


def build(case: KernelCase, *, device: str = "cpu", seed: int = 0, banks: BankTable | None = None) -> KernelGroup:
    """`banks` are another group's, whose adapters these then are; each slot's bank stays as it is."""
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    own = BankTable(case.slots, case.num_vectors, case.vector_length, dtype=case.table, device=device)
    selections = SelectionTable(case.shape, banks or own, slots=case.slots, rank=case.rank, topk=case.topk)
    factors = FactorTable(case.shape, slots=case.slots, rank=case.rank, dtype=case.table, device=device)
    rows = RowTable(case.rows, case.members, device=device)
    x = torch.randn(case.rows, case.in_features, generator=generator).to(device, case.dtype)
    group = KernelGroup(case, x, rows, selections, factors, [], [])
    for slot in range(case.slots):
        checkpoint = random_checkpoint(case, draw if case.mixed and slot else None, generator)
        if banks is not None and banks.vectors[slot].any():
            checkpoint = replace(checkpoint, bank=VectorBank(banks.vectors[slot].cpu()))
        names: list[str | None] = [layer.name for layer in checkpoint.layout.layers]
        if case.mixed and len(names) > 1 and slot % 2:
            names[draw.randrange(len(names))] = None
        group.put(slot, checkpoint, names)
        group.checkpoints.append(checkpoint)
        group.names.append(names)
    rows.set(mixed_rows(case, draw) if case.mixed else [[(row % case.slots, 1.0)] for row in range(case.rows)])
    return group


def random_checkpoint(case: KernelCase, draw: random.Random | None, generator: torch.Generator) -> TopKCheckpoint:
    """An adapter of the case's rank and topk, or, with `draw`, of any up to these."""
    config = VBLoRAConfig(
        r=draw.randint(1, case.rank) if draw else case.rank,
        num_vectors=case.num_vectors,
        vector_length=case.vector_length,
        topk=draw.randint(1, case.topk) if draw else case.topk,
        save_only_topk_weights=True,
        target_modules=tuple(f"p{i}" for i in range(len(case.out_features))),
    )
    length = case.vector_length
    layers = [LayerShape(f"p{i}", case.in_features, features) for i, features in enumerate(case.out_features)]
    tiles = [(case.in_features // length, features // length) for features in case.out_features]
    # Selections are drawn as such: full logits of a 7B model's layers would take gigabytes.
    positions = config.r * sum(a + b for a, b in tiles)
    indices = torch.rand(positions, config.topk, generator=generator).mul_(config.num_vectors // config.topk).long()
    indices += torch.arange(config.topk) * (config.num_vectors // config.topk)  # distinct, by stratum
    weights = torch.rand(positions, config.topk, generator=generator).softmax(-1)[:, :-1]
    bank = VectorBank.uniform(case.num_vectors, length, bound=1.0, generator=generator)
    return TopKCheckpoint(AdapterLayout(config, Storage.TOPK, tuple(layers)), bank, indices, weights)


def mixed_rows(case: KernelCase, draw: random.Random) -> Selections:
    """The base first, then the same adapter twice, then anything."""
    fixed: list[list[tuple[int, float]]] = [[], [(0, 1.0)], [(0, 1.0)]]
    others = [
        [(draw.randrange(case.slots), draw.uniform(-1.5, 1.5)) for _ in range(draw.randint(0, case.members))]
        for _ in range(case.rows - len(fixed))
    ]
    return (fixed + others)[: case.rows]
