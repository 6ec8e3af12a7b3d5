"""The base model, its leaves wrapped so that each runs every row of a batch with that row's own selection."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from adapters.low_rank import AdapterFactors, LayerFactors, LowRankBatch
from adapters.replacements import is_replaceable
from adapters.targets import BaseModules

__all__ = ["AdaptedModel", "AdaptedModule", "AdapterFactors", "LayerFactors", "LowRankBatch"]


class AdaptedModule(nn.Module):
    """A leaf of the base model that runs every row with its own parameters and, if linear, adds its low-rank part."""

    def __init__(self, base_layer: nn.Module, name: str, model: AdaptedModel) -> None:
        super().__init__()
        self.base_layer = base_layer
        self._name = name
        # In a list, so that the module tree stays a tree: the model must not become a submodule of its own layer.
        self._model = [model]

    def forward(self, x: Tensor) -> Tensor:
        batch = self._model[0].batch
        if batch is None:
            plain: Tensor = self.base_layer(x)
            return plain
        replacements = batch.replacements(self._name, self.base_layer)
        output: Tensor = self.base_layer(x) if replacements is None else replacements.run(self.base_layer, x)
        mix = batch.mix(self._name)
        return output if mix is None else mix.add_to(output, x)

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

    def __init__(self, model: nn.Module, modules: BaseModules) -> None:
        self.model = model
        self.modules = modules
        self.batch: LowRankBatch | None = None
        self.pristine: dict[str, Tensor] = {}  # copies on the host of the parameters that a Merger changes
        self._leaves: dict[str, nn.Module] = {
            name: module for name, module in model.named_modules() if name in modules.layers or is_replaceable(module)
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

        Of a weight that is folded at the moment, the pristine one.
        """
        if name in self.pristine:
            return self.pristine[name]
        module, _, attribute = name.rpartition(".")
        try:
            owner = self._leaves.get(module) or self.model.get_submodule(module)
        except AttributeError:
            return None
        value = getattr(owner, attribute, None)
        return value if isinstance(value, Tensor) else None

    @contextmanager
    def using(self, batch: LowRankBatch | None) -> Iterator[None]:
        previous, self.batch = self.batch, batch
        try:
            yield
        finally:
            self.batch = previous
