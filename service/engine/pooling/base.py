"""Loads a base model for a task that pools: a classifier, or an encoder alone, and what its files say of answers."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoModel, AutoModelForSequenceClassification
from transformers.utils import cached_file

from adapters.heads import ClassifierHead
from adapters.quantized import holds_quantized
from adapters.replacements import is_replaceable
from service.engine.task import Pooling, Task

log = logging.getLogger(__name__)

AUTO_CLASSES = {Task.CLASSIFY: AutoModelForSequenceClassification, Task.EMBED: AutoModel}

_POOLER = "pooler"
_LISTS_OF_PLAIN = ("llm_int8_skip_modules", "modules_to_not_convert")  # as bitsandbytes and the others call it
_POOLING_CONFIG = "1_Pooling/config.json"
_READ_POOLINGS = {
    "pooling_mode_mean_tokens": Pooling.MEAN,
    "pooling_mode_cls_token": Pooling.CLS,
    "pooling_mode_lasttoken": Pooling.LAST,
}


class Unservable(Exception):
    """A base that cannot do the task; the message says why and what to do."""


@dataclass(frozen=True, slots=True, eq=False)
class PooledBase:
    """What a base brings to its task besides the model.

    `labels` are its own names of classes, None where its config gives none; `problem_type` its config's. `pooling` and
    `normalize` are what its sentence-transformers files say, or what is usual for the architecture; `context` the most
    tokens that its table of positions has room for, `usual_context` those that these files would have texts cut to.
    `pad` is the token that fills rows up. An embedding has `width` numbers.
    """

    labels: tuple[str, ...] | None = None
    problem_type: str | None = None
    pooling: Pooling = Pooling.MEAN
    normalize: bool = True
    context: int | None = None
    usual_context: int | None = None
    pad: int | None = None
    width: int = 0


def kept_plain(task: Task, model: Any) -> list[str]:
    """The modules of a model, which may be on the meta device, that must not be quantized.

    Of a classifier all but the encoder, as adapters bring heads of their own; and poolers, which they may bring too, as
    some bases' files lack them.
    """
    poolers = [name for name, _ in model.named_modules() if name.rpartition(".")[2] == _POOLER]
    return [*_outside(model), *poolers] if task is Task.CLASSIFY else poolers


def leave_new_head(task: Task, model: Any, config: Any) -> None:
    """Has the head left as it is, where a checkpoint that is quantized already holds none: it is of another task.

    `config` is changed. Lists of what is left are written for the model that was quantized, and so name its own head.
    """
    if task is not Task.CLASSIFY or type(model).__name__ in (config.architectures or ()):
        return
    given = config.quantization_config
    for key in _LISTS_OF_PLAIN:
        if isinstance(given, dict) and key in given:
            given[key] = [*(given[key] or ()), *_outside(model)]


def _outside(model: Any) -> list[str]:
    """What a classifier has beside its encoder."""
    return [name for name, _ in model.named_children() if name != model.base_model_prefix]


def load_model(task: Task, model: str, *, dtype: Any, **quantized: Any) -> tuple[Any, frozenset[str]]:
    """The model, and the names of the parameters that its files lack, which are zeros.

    As they are drawn at random otherwise, one base would not be the same twice. `quantized` is what a quantized one is
    loaded with besides. Raises Unservable.
    """
    loaded, info = AUTO_CLASSES[task].from_pretrained(
        model, dtype=dtype, trust_remote_code=False, output_loading_info=True, **quantized
    )
    parameters = dict(loaded.named_parameters())
    missing = frozenset(info["missing_keys"]).intersection(parameters)
    encoder = "" if task is Task.EMBED else f"{loaded.base_model_prefix}."
    if lacking := sorted(name for name in missing if name.startswith(encoder) and _POOLER not in name):
        raise Unservable(f"its files lack {lacking[0]!r}" + (f" and {len(lacking) - 1} more" if lacking[1:] else ""))
    _check_plain(task, loaded)
    for name in missing:
        nn.init.zeros_(parameters[name])
    return loaded, missing


def _check_plain(task: Task, loaded: Any) -> None:
    """Raises Unservable where a checkpoint that is quantized already holds more than the encoder so."""
    for kept in kept_plain(task, loaded):
        for name, module in loaded.get_submodule(kept).named_modules(prefix=kept):
            if holds_quantized(module):
                raise Unservable(
                    f"{name!r} is quantized in this checkpoint, and adapters bring their own in its place: quantize it "
                    "without the head and the pooler (llm_int8_skip_modules or modules_to_not_convert), or give the "
                    "checkpoint it was made from, with --quantization"
                )


def head_of(model: Any, untrained: frozenset[str]) -> ClassifierHead:
    """The classification head of a model that no one has wrapped yet. Raises Unservable.

    It is what the model has beside its encoder; the last linear layer of it has a feature for each label.
    """
    encoder = f"{model.base_model_prefix}."
    linear = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not name.startswith(encoder)
    ]
    name, output = linear[-1] if linear else ("", None)
    if output is None or output.out_features != model.config.num_labels:
        raise Unservable(f"{type(model).__name__} has no linear layer with a feature for each label")
    for parameter in sorted(untrained):
        owner = parameter.rpartition(".")[0]
        if not is_replaceable(model.get_submodule(owner)):
            raise Unservable(f"its files lack {parameter!r}, which no adapter can bring")
    return ClassifierHead(name, output.out_features, tuple(dict(output.named_parameters())), untrained)


def describe(
    task: Task, model: str, config: Any, tokenizer: Any, loaded: Any, pooling: Pooling | None, normalize: bool | None
) -> PooledBase:
    """What the files beside a base's weights say, where they are not overruled. Raises Unservable."""
    text = config.get_text_config()
    pad = text.pad_token_id if text.pad_token_id is not None else tokenizer.pad_token_id
    context = _positions(loaded)
    if task is Task.CLASSIFY:
        _take_last_token(text, pad)
        return PooledBase(_labels(config), config.problem_type, context=context, pad=pad)
    pooling = pooling or _pooling(model) or (Pooling.LAST if _is_causal(loaded) else Pooling.MEAN)
    normalizes = _normalizes(model) if normalize is None else normalize
    return PooledBase(
        pooling=pooling,
        normalize=normalizes,
        context=context,
        usual_context=_sentence_length(model),
        pad=pad,
        width=text.hidden_size,
    )


def _take_last_token(text: Any, pad: int | None) -> None:
    """Decoders take the last token that is not padding for the whole text: told of none, the very last."""
    if text.pad_token_id is None:
        text.pad_token_id = -1 if pad is None else pad


def _labels(config: Any) -> tuple[str, ...] | None:
    """The config's names of classes; None where transformers made them up."""
    names = tuple(str(config.id2label[i]) for i in range(config.num_labels) if i in config.id2label)
    made_up = all(name == f"LABEL_{i}" for i, name in enumerate(names))
    return None if made_up or len(names) < config.num_labels else names


def _positions(model: nn.Module) -> int | None:
    """The tokens that a learned table of positions has room for, where it begins behind its padding (RoBERTa)."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and name.endswith("position_embeddings") and module.padding_idx is not None:
            return module.num_embeddings - module.padding_idx - 1
    return None


def _is_causal(model: nn.Module) -> bool:
    """Whether tokens see only those before them, so that the last one alone has seen the text."""
    return any(getattr(module, "is_causal", False) for module in model.modules())


def _pooling(model: str) -> Pooling | None:
    """What sentence-transformers' files say. Raises Unservable for a pooling that is not offered."""
    values = _json(model, _POOLING_CONFIG)
    if values is None:
        return None
    if isinstance(mode := values.get("pooling_mode"), str):
        modes = [mode]
    else:
        modes = [key for key, value in values.items() if key.startswith("pooling_mode_") and value is True]
    known = [_READ_POOLINGS.get(each) or _named(each) for each in modes]
    if len(known) != 1 or known[0] is None:
        raise Unservable(f"{_POOLING_CONFIG} asks for {' and '.join(modes) or 'nothing'}: choose one with --pooling")
    return known[0]


def _named(mode: str) -> Pooling | None:
    return {"mean": Pooling.MEAN, "cls": Pooling.CLS, "lasttoken": Pooling.LAST}.get(mode)


def _normalizes(model: str) -> bool:
    """As modules.json says if there is one; else embeddings are normalized."""
    modules = _json(model, "modules.json")
    if not isinstance(modules, list):
        return True
    return any(isinstance(each, dict) and str(each.get("type")).endswith(".Normalize") for each in modules)


def _sentence_length(model: str) -> int | None:
    values = _json(model, "sentence_bert_config.json")
    length = values.get("max_seq_length") if isinstance(values, dict) else None
    return length if isinstance(length, int) and length > 0 else None


def _json(model: str, name: str) -> Any:
    """A JSON file beside a model's weights, from its directory or the cache; None if there is none."""
    try:
        path = cached_file(
            model,
            name,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        return None if path is None else json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise Unservable(f"{name} cannot be read: {error}") from error
