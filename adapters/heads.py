"""Classification heads: an adapter brings its own, with as many labels as it was trained for.

A head is what a classifier has beside its encoder. Its last layer has one feature for each label, and so it is the one
module whose shape an adapter may change. What the base's files lack of the head is zeros in the loaded model, and must
come with every adapter: where blends take the base's own part off, there is nothing to take off.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from adapters.errors import MissingTensor, ShapeMismatch, UnsupportedCheckpoint
from adapters.layout import extra_owner
from adapters.safetensors_header import TensorSpec
from adapters.targets import LayerShape

MAX_LABELS = 4096  # all rows of a batch get the width of the widest head


@dataclass(frozen=True, slots=True)
class ClassifierHead:
    """The head of a base model.

    `output` names the layer that has a feature for each label, of which the base's own has `labels`; `parameters` are
    that layer's ("weight", "bias"). `untrained` names every parameter of the model that the base's files lack.
    """

    output: str
    labels: int
    parameters: tuple[str, ...] = ("weight",)
    untrained: frozenset[str] = frozenset()

    @property
    def is_trained(self) -> bool:
        """Whether the base classifies on its own."""
        return not self.untrained

    def may_have(self, name: str, own: tuple[int, ...], shape: tuple[int, ...]) -> bool:
        """Whether an adapter's parameter `owner.attribute` may have this shape, where the base's own differs."""
        return name.rpartition(".")[0] == self.output and len(shape) == len(own) and shape[1:] == own[1:]


def parameter_name(key: str) -> str:
    """The base model's parameter that an extra replaces."""
    return f"{extra_owner(key)}.{key.rpartition('.')[2]}"


def label_count(extras: Iterable[TensorSpec], head: ClassifierHead) -> int:
    """How many labels an adapter tells apart: its own head's rows, or the base's where it brings none."""
    name = f"{head.output}.weight"
    return next((sum(spec.shape[:1]) for spec in extras if parameter_name(spec.key) == name), head.labels)


def check_head(layers: Iterable[LayerShape], extras: Collection[TensorSpec], head: ClassifierHead) -> None:
    """An adapter's head is whole, and one head. Raises MissingTensor, ShapeMismatch or UnsupportedCheckpoint."""
    if any(layer.name == head.output for layer in layers):
        raise UnsupportedCheckpoint(
            f"the adapter adapts {head.output!r}, the classification head: train it whole instead (PEFT's "
            "modules_to_save, which task_type SEQ_CLS sets)",
            subject=head.output,
        )
    brought = {parameter_name(spec.key): spec for spec in extras}
    for name in sorted(head.untrained - brought.keys()):
        raise MissingTensor(
            f"the base model has no trained {name}, and the adapter brings none: train it with task_type SEQ_CLS, or "
            "name the module in modules_to_save",
            subject=name,
        )
    own = {each: brought.get(f"{head.output}.{each}") for each in head.parameters}
    counts = {head.labels if spec is None else spec.shape[0] for spec in own.values()}
    if len(counts) > 1:
        raise ShapeMismatch(
            f"the parameters of {head.output!r} are for {' and '.join(map(str, sorted(counts)))} labels: a head with "
            "labels of its own is saved whole",
            subject=head.output,
        )
    if not 1 <= max(counts) <= MAX_LABELS:
        raise ShapeMismatch(
            f"{head.output!r} has {max(counts):,} labels; 1 to {MAX_LABELS:,} can be served", subject=head.output
        )
