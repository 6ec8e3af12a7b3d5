"""May this adapter run on this base model, and which of its parameters does it replace?"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adapters.cuts import Cuts
from adapters.errors import (
    BaseModelMismatch,
    InvalidSelection,
    NonFinite,
    ShapeMismatch,
    UnexpectedTensor,
    UnsupportedCheckpoint,
)
from adapters.heads import check_head, parameter_name
from adapters.layers import AdaptedModel
from adapters.layout import EMBEDDING_NAMES, extra_owner
from adapters.quantized import is_quantized
from adapters.reading import AnyLayout
from adapters.replacements import SHARED_BY_ROWS, origin
from adapters.safetensors_header import TensorSpec
from adapters.targets import check_binding

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True, slots=True)
class BaseIdentity:
    """What the loaded base answers to: Hub ids and aliases in full, and the last part of a local path.

    An adapter that names one of `names` was trained on this base. A local directory proves nothing about what
    is in it, so an adapter whose base has the same last part (`folder_name`) is taken with a warning.
    """

    names: frozenset[str]
    folder_name: str | None = None


def check_base_name(named: str | None, base: BaseIdentity) -> str | None:
    """Compares the base that an adapter's config names with the loaded one. Returns a warning, or None.

    Only a Hub id (`org/name`) that is not this base's is refused, with BaseModelMismatch: a local path, or no name at
    all, is no evidence.
    """
    if named is None:
        return "the config names no base model; shapes alone say that the adapter fits"
    if named.lower() in {name.lower() for name in base.names}:
        return None
    if not _HUB_ID.fullmatch(named):
        return f"the config names the base {named!r}, a local path or alias; shapes alone say that the adapter fits"
    if base.folder_name is not None and named.rsplit("/", 1)[-1].lower() == base.folder_name.lower():
        return f"the config names the base {named!r}; the loaded one was taken for it by its folder's name"
    ours = ", ".join(sorted(base.names)) or "a local model"
    raise BaseModelMismatch(
        f"the adapter was trained on {named!r} but this server runs {ours}; if they are the same weights, upload with "
        "allow_base_mismatch=true or start the server with --base-alias",
        subject="base_model_name_or_path",
    )


def check_layout(layout: AnyLayout, model: AdaptedModel) -> None:
    """The adapter's layers are the base's, and so are the modules of its extras. Raises CheckpointError.

    On a classifier the head may have labels of its own number.
    """
    check_binding(layout.config, layout.layers, model.modules)
    for spec in layout.extras:
        _check_extra(spec, model)
    if model.head is not None:
        check_head(layout.layers, layout.extras, model.head)


def _check_extra(spec: TensorSpec, model: AdaptedModel) -> None:
    owner, attribute = extra_owner(spec.key), spec.key.rpartition(".")[2]
    own = model.tensor(f"{owner}.{attribute}")
    if own is None:
        raise UnexpectedTensor(
            f"the file holds {spec.key!r}, but the base model has no {owner}.{attribute}", subject=spec.key
        )
    if owner.endswith(SHARED_BY_ROWS):
        raise UnsupportedCheckpoint(
            f"the adapter saves {owner!r}, which the model looks up once for all rows of a batch: nothing of one row's "
            "own can stand in its place: train without saving it",
            subject=spec.key,
        )
    if not model.can_replace(owner):
        raise UnsupportedCheckpoint(
            f"the adapter saves {owner!r}; of saved modules, linear layers, embeddings and norms can be served",
            subject=spec.key,
        )
    if is_quantized(own):
        raise UnsupportedCheckpoint(
            f"the adapter saves {owner!r}, whose {attribute} this server holds quantized: nothing can stand in its "
            "place; serve the base unquantized",
            subject=spec.key,
        )
    head = model.head
    shape = model.whole_shape(f"{owner}.{attribute}")
    assert shape is not None
    if head is not None and head.may_have(f"{owner}.{attribute}", shape, spec.shape):
        return
    if shape != spec.shape:
        resized = owner.rsplit(".", 1)[-1] in EMBEDDING_NAMES
        what = "the vocabulary was resized in training, which" if resized else "another shape"
        raise ShapeMismatch(
            f"{spec.key} has shape {list(spec.shape)} but the base's is {list(shape)}; {what} cannot be served",
            subject=spec.key,
        )


def check_range(extras: Mapping[str, Tensor], model: AdaptedModel) -> None:
    """Extras are finite in the base's dtype too, in which they are served: a float16 holds no 1e5. Raises NonFinite."""
    for key, tensor in extras.items():
        own = _own(key, model)
        if torch.finfo(tensor.dtype).max > torch.finfo(own.dtype).max and not tensor.to(own.dtype).isfinite().all():
            name = str(own.dtype).removeprefix("torch.")
            raise NonFinite(f"{key} holds numbers beyond the {name} that this server runs the base in", subject=key)


def replaced_parameters(
    extras: Mapping[str, Tensor], base_tensor: Callable[[str], Tensor | None], cuts: Cuts | None = None
) -> dict[str, dict[str, Tensor]]:
    """The parameters that an adapter's trained biases and saved modules replace, by module and attribute.

    `base_tensor` gives the base's own by name; values are in its dtype on its device. Those that equal the base's own
    (PEFT stores `lm_head` unasked when it is a target) replace nothing and are left out. Of layers that
    are cut, `cuts`, the parts held here.
    """
    replaced: dict[str, dict[str, Tensor]] = {}
    for key, tensor in extras.items():
        owner, attribute = extra_owner(key), key.rpartition(".")[2]
        cut = (cuts or {}).get(owner)
        part = tensor if cut is None else cut.parameter(attribute, tensor)
        if part is None:
            continue
        own = base_tensor(f"{owner}.{attribute}")
        assert own is not None, "the layout was checked"
        values = part.to(own)
        if not torch.equal(values, own):
            replaced.setdefault(owner, {})[attribute] = values
    return replaced


def blend_origin(model: AdaptedModel, extras: Sequence[Mapping[str, Tensor]], name: str) -> Tensor | None:
    """What a blend of adapters with these extras starts from in one parameter: the base's own, None if it has none.

    Zeros for classification heads with labels of another number. Raises InvalidSelection if they differ in that, and
    for a parameter of which only a part is here.
    """
    own = model.tensor(name)
    if name.rpartition(".")[0] in model.cuts:
        raise InvalidSelection(
            f"the adapters bring their own {name}, of which each device of --tensor-parallel holds a part: they "
            "cannot be blended into a new adapter here",
            subject="adapters",
        )
    if own is None or model.head is None or name.rpartition(".")[0] != model.head.output:
        return own
    return origin(own, [part for each in extras for key, part in each.items() if parameter_name(key) == name])


def _own(key: str, model: AdaptedModel) -> Tensor:
    own = model.tensor(f"{extra_owner(key)}.{key.rpartition('.')[2]}")
    assert own is not None, "the layout was checked"
    return own
