"""The classes that a request's selection tells apart, and what its logits say of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from service.api.deps import ServerState
from service.api.errors import ApiError
from service.api.label_files import own_labels
from service.engine.selection import Selection


@dataclass(frozen=True, slots=True)
class Classes:
    """`names` has one for each class; `problem_type` is transformers' word for how logits are read, if given."""

    names: tuple[str, ...]
    problem_type: str | None = None

    def probabilities(self, logits: Sequence[float]) -> list[float]:
        """Softmax; sigmoid of a single class, or several that may be at once; a regression as it is."""
        if self.problem_type == "regression":
            return list(logits)
        if self.problem_type == "multi_label_classification" or len(logits) == 1:
            return [_sigmoid(logit) for logit in logits]
        highest = max(logits)
        powers = [math.exp(logit - highest) for logit in logits]
        total = sum(powers)
        return [power / total for power in powers]


def classes_of(state: ServerState, selection: Selection) -> Classes:
    """The classes that a selection tells apart. Reads files: not for the event loop.

    Raises ApiError for the base without a trained head, and for a blend of heads that differ in their number.
    """
    head, serving = state.registry.head, state.pooled
    assert head is not None, "a classifier has a head"
    assert serving is not None, "a classifier pools"
    if selection.is_base and not head.is_trained:
        raise ApiError(
            "invalid_request",
            f"the base model has no trained {' and '.join(sorted(head.untrained))}, and cannot classify alone: name "
            "an adapter",
            param="adapter",
        )
    own = [own_labels(state.store.fetch(adapter.digest), head) for adapter in selection.adapters]
    if len({each.count for each in own}) > 1:
        named = zip(selection.adapters, own, strict=True)
        told = ", ".join(f"{adapter.name!r} has {each.count}" for adapter, each in named)
        raise ApiError(
            "invalid_request",
            f"heads are blended only where they have the same labels, and these differ in number: {told}",
            param="adapters",
        )
    count = own[0].count if own else head.labels
    if selection.adapters and count != head.labels and not any(adapter.weight for adapter in selection.adapters):
        raise ApiError(
            "invalid_request", "every adapter has the weight 0: nothing is left to classify with", param="adapters"
        )
    names = {each.names for each in own} - {None} or {serving.labels}
    agreed = names.pop() if len(names) == 1 else None
    types = {each.problem_type for each in own} - {None} or {serving.problem_type}
    fitting = agreed if agreed is not None and len(agreed) == count else tuple(f"LABEL_{i}" for i in range(count))
    return Classes(fitting, types.pop() if len(types) == 1 else None)


def _sigmoid(logit: float) -> float:
    return 1 / (1 + math.exp(-logit)) if logit >= 0 else 1 - 1 / (1 + math.exp(logit))
