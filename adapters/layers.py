"""The base model, its leaves wrapped so that each runs every row of a batch with that row's own selection."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Protocol

from torch import Tensor, nn

from adapters.cuts import Cuts
from adapters.heads import ClassifierHead
from adapters.packed import own_value
from adapters.replacements import SHARED_BY_ROWS, RowReplacements, is_replaceable
from adapters.targets import BaseModules


class Batch(Protocol):
    """What one forward adds to the layers: a LowRankBatch, or decode kernels over their tables."""

    def replacements(self, name: str, module: nn.Module) -> RowReplacements | None:
        """Which rows run a module of the base with other parameters, None if none does."""
        ...

    def add_delta(self, name: str, output: Tensor, x: Tensor) -> Tensor:
        """`output + Δ(x)` of one layer, in place where it can be."""
        ...

    def forget_input(self) -> None:
        """Between forwards: the next one's tensors may be the same objects with other contents."""
        ...


class AdaptedModule(nn.Module):
    """A leaf of the base model that runs every row with its own parameters and, if linear, adds its low-rank part."""

    def __init__(self, base_layer: nn.Module, name: str, model: AdaptedModel) -> None:
        super().__init__()
        self.base_layer = base_layer
        self._name = name
        # In a tuple, where modules do not count as submodules: the tree must stay a tree, and be quick to read.
        self._held = (base_layer, model)

    def forward(self, x: Tensor) -> Tensor:
        base_layer, model = self._held
        batch = model.batch
        if batch is None:
            plain: Tensor = base_layer(x)
            return plain
        replacements = batch.replacements(self._name, base_layer)
        output: Tensor = base_layer(x) if replacements is None else replacements.run(base_layer, x)
        return batch.add_delta(self._name, output, x)

    def __getattr__(self, name: str) -> Tensor | nn.Module:
        # Models read `weight`, `bias` or `in_features` of their own layers.
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base_layer"), name)  # type: ignore[no-any-return]


class AdaptedModel:
    """A base model whose leaves take part in low-rank batches.

    Wraps every Linear, Conv1D, Embedding and norm of `model` in place. The thread that owns the model sets the batch
    for each forward:

        with adapted.using(LowRankBatch(factors, weights)):
            model(...)
    """

    def __init__(
        self, model: nn.Module, modules: BaseModules, head: ClassifierHead | None = None, cuts: Cuts | None = None
    ) -> None:
        """`cuts` says of which layers `model` holds only a part; `modules` are those of the whole model."""
        self.model = model
        self.modules = modules
        self.cuts: Cuts = cuts or {}
        self.head = head  # of a classifier
        self.batch: Batch | None = None
        self.pristine: dict[str, Tensor] = {}  # copies on the host of the parameters that a Merger changes
        self.moved: set[str] = set()  # modules with a parameter in another place than at load: a Merger's doing
        self.siblings: Mapping[str, Sequence[str]] = {}  # of a linear layer, those that read the same input
        self._leaves: dict[str, nn.Module] = {
            name: module
            for name, module in model.named_modules()
            if name in modules.layers or (is_replaceable(module) and not name.endswith(SHARED_BY_ROWS))
        }
        for name, leaf in self._leaves.items():
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, AdaptedModule(leaf, name, self))

    def base_layer(self, name: str) -> nn.Module:
        """The base model's own leaf, as it was before wrapping."""
        return self._leaves[name]

    @property
    def wrapped(self) -> int:
        """How many leaves take part in batches."""
        return len(self._leaves)

    def can_replace(self, name: str) -> bool:
        """Whether the parameters of this module may differ from row to row."""
        return name in self._leaves

    def tensor(self, name: str) -> Tensor | None:
        """The base model's parameter or buffer called `name` (`lm_head.weight`), None if it has none.

        The part of it that is held here; of a weight that is folded at the moment, the pristine one.
        """
        if name in self.pristine:
            return self.pristine[name]
        module, _, attribute = name.rpartition(".")
        try:
            owner = self._leaves.get(module) or self.model.get_submodule(module)
        except AttributeError:
            return None
        value = getattr(owner, attribute, None)
        return own_value(owner, attribute) if isinstance(value, Tensor) else None

    def whole_shape(self, name: str) -> tuple[int, ...] | None:
        """The shape of `tensor(name)` in the whole model."""
        own, (owner, _, attribute) = self.tensor(name), name.rpartition(".")
        if own is None or owner not in self.cuts:
            return None if own is None else tuple(own.shape)
        return self.cuts[owner].whole_shape(attribute, tuple(own.shape))

    @contextmanager
    def using(self, batch: Batch | None) -> Iterator[None]:
        previous, self.batch = self.batch, batch
        try:
            yield
        finally:
            self.batch = previous
            if batch is not None:
                batch.forget_input()

    @contextmanager
    def finding_siblings(self) -> Iterator[None]:
        """Learns from the forward inside which linear layers read the same input: they are given the same tensor."""
        seen: list[tuple[str, Tensor]] = []
        hooks = [
            self.model.get_submodule(name).register_forward_pre_hook(partial(_note_input, seen, name))
            for name in self.modules.layers
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        self.siblings = _siblings(seen)


def _note_input(seen: list[tuple[str, Tensor]], name: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    seen.append((name, inputs[0]))


def _siblings(seen: Sequence[tuple[str, Tensor]]) -> dict[str, tuple[str, ...]]:
    """Runs of neighbours that were given the very same tensor. A layer that ran twice has none: its inputs differ."""
    runs: list[list[str]] = []
    previous: Tensor | None = None
    for name, x in seen:
        if x is not previous:
            runs.append([])
        runs[-1].append(name)
        previous = x
    often = {name for name, times in Counter(name for name, _ in seen).items() if times > 1}
    return {name: tuple(run) for run in runs for name in run if not often & set(run)}
