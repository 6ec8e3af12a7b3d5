"""Loads the base model: weights, tokenizer, and what adapters are held against."""

from __future__ import annotations

import hashlib
import re
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from adapters.binding import BaseIdentity
from adapters.layers import AdaptedModel
from adapters.merged_model import Architecture
from adapters.quantized import holds_quantized
from adapters.targets import BaseModules
from service.engine.context import context_of
from service.engine.packing import pack_model
from service.engine.pooling.base import (
    AUTO_CLASSES,
    PooledBase,
    Unservable,
    describe,
    head_of,
    kept_plain,
    leave_new_head,
    load_model,
)
from service.engine.quantization import (
    NONE,
    loading_arguments,
    method_of,
    prepare,
    quantization_of,
    stored_tensors,
    weight_bytes,
)
from service.engine.seq2seq.base import Seq2SeqBase
from service.engine.seq2seq.base import describe as describe_seq2seq
from service.engine.shards.cutting import cut_model, join_outputs
from service.engine.shards.plan import Shard, plan_of
from service.engine.task import Pooling, Task
from service.engine.tokenizer import TextTokenizer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# A snapshot in the Hugging Face cache: models--org--name/snapshots/<commit>
_CACHED = re.compile(r"models--([^/]+)--([^/]+)/snapshots/[^/]+/?$")


class BaseModelError(Exception):
    """The base model cannot be loaded; the message says why and what to do."""


@dataclass(frozen=True, slots=True, eq=False)
class LoadedBase:
    """A base model ready to serve adapters. `fingerprint` identifies its weights; `created` is a Unix time.

    `quantization` names how its weights are stored, None for plainly; `parameters` counts what they stand for, and
    `weight_bytes` what they take.
    """

    id: str
    model_type: str
    adapted: AdaptedModel
    tokenizer: TextTokenizer
    identity: BaseIdentity
    device: torch.device
    dtype: torch.dtype
    context: int
    vocabulary: int
    eos_token_ids: frozenset[int]
    parameters: int
    weight_bytes: int
    quantization: str | None
    fingerprint: str
    created: int
    task: Task = Task.GENERATE
    pooled: PooledBase | None = None  # of a task that pools
    seq2seq: Seq2SeqBase | None = None  # of an encoder-decoder

    @property
    def modules(self) -> BaseModules:
        return self.adapted.modules

    @property
    def usual_context(self) -> int:
        """What its files would have texts cut to, which may be less than it can read."""
        own = self.pooled or self.seq2seq
        return (own and own.usual_context) or self.context


@dataclass(frozen=True, slots=True, eq=False)
class Pretrained:
    """A model as transformers loads it, with nothing of ours around it: config, tokenizer, model in eval mode.

    `untrained` names the parameters that its files lack, which only a task that pools allows.
    """

    config: Any
    tokenizer: Any
    model: Any
    quantization: str | None = None
    untrained: frozenset[str] = frozenset()

    @property
    def vocabulary(self) -> int:
        """How many token ids the model knows, which may be more than the tokenizer's."""
        return int(self.model.get_input_embeddings().num_embeddings)

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """The generation config's, else the model config's, else the tokenizer's."""
        model = self.model
        own = (getattr(config, "eos_token_id", None) for config in (model.generation_config, model.config))
        for ids in (*own, self.tokenizer.eos_token_id):
            if ids is not None:
                return frozenset(ids if isinstance(ids, list) else [ids])
        return frozenset()


def load_pretrained(
    model: str,
    *,
    dtype: str,
    device: torch.device,
    quantization: str = NONE,
    task: Task = Task.GENERATE,
    at: torch.device | None = None,
) -> Pretrained:
    """Loads weights and tokenizer from a directory or by Hub id. Nothing of the model's own code is run.

    `dtype` auto is float32 on a CPU and the checkpoint's dtype on CUDA; of a quantized model it is what its activations
    and the layers that are left as they are have. With `at` the weights stay there, to be moved to the device later.
    Raises BaseModelError.
    """
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()  # a log is no place for one
    try:
        config = AutoConfig.from_pretrained(model, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
        wanted = _dtype(dtype, device)
        untrained: frozenset[str] = frozenset()
        _check_task(task, config)
        if task.pools:
            quantized = _pooling_arguments(task, model, config, quantization, wanted, device)
            loaded, untrained = load_model(task, model, dtype=wanted, **quantized)
        else:
            quantized = loading_arguments(config, quantization, wanted, device)
            loaded = _auto_class(task).from_pretrained(model, dtype=wanted, trust_remote_code=False, **quantized)
        loaded = (loaded if quantized else loaded.to(at or device)).eval().requires_grad_(False)
        how = quantization_of(loaded, config, quantization)
        prepare(loaded)
    except SafetensorError as error:
        raise BaseModelError(f"the weights of {model!r} are damaged, copy them anew: {error}") from error
    except (OSError, ValueError, KeyError, ImportError, Unservable) as error:
        raise BaseModelError(f"cannot load the base model {model!r}: {_reason(model, error)}") from error
    return Pretrained(config, tokenizer, loaded, how, untrained)


def _pooling_arguments(
    task: Task, model: str, config: Any, quantization: str, dtype: torch.dtype | str, device: torch.device
) -> dict[str, Any]:
    """What a model that pools is loaded with besides; nothing for one that is not quantized."""
    if quantization == NONE and method_of(config) is None:
        return {}
    empty, _ = without_weights(model, task)
    arguments = loading_arguments(config, quantization, dtype, device, kept_plain(task, empty))
    if quantization == NONE:
        leave_new_head(task, empty, config)
        arguments["config"] = config
    return arguments


def load_base(
    model: str,
    *,
    dtype: str = "auto",
    device: str = "auto",
    quantization: str = NONE,
    served_model_name: str | None = None,
    aliases: Iterable[str] = (),
    task: Task = Task.GENERATE,
    pooling: Pooling | None = None,
    normalize: bool | None = None,
    pack_weights: bool = True,
    shard: Shard | None = None,
) -> LoadedBase:
    """A base model made ready to serve adapters; see `load_pretrained`. Raises BaseModelError.

    `pooling` and `normalize` overrule what the model's files say of embeddings. `pack_weights` lays linear weights on a
    CPU out for oneDNN. With `shard` only that part is held, on the device of its number; what is told of the
    base is told of the whole.
    """
    where = pick_device(device) if shard is None else shard.device(pick_device(device))
    on_host = torch.device("cpu") if shard is not None else where  # what is cut before it goes to its device
    pretrained = load_pretrained(model, dtype=dtype, device=where, quantization=quantization, task=task, at=on_host)
    config, loaded = pretrained.config, pretrained.model
    pooled = head = seq2seq = plan = None
    try:
        plan = None if shard is None else plan_of(loaded, shard)
        if task.pools:
            head = head_of(loaded, pretrained.untrained) if task is Task.CLASSIFY else None
            pooled = describe(task, model, loaded.config, pretrained.tokenizer, loaded, pooling, normalize)
        if task is Task.SEQ2SEQ:
            seq2seq = describe_seq2seq(loaded)
    except Unservable as error:
        raise BaseModelError(f"{model!r} cannot serve --task {task}: {error}") from error
    identity = identify(model, served_model_name, aliases)
    fingerprint = fingerprint_of(loaded)
    counted = loaded if pretrained.quantization is None else without_weights(model, task)[0]
    modules = modules_of(loaded, config)
    parameters = sum(parameter.numel() for parameter in counted.parameters())
    stored_bytes = weight_bytes(loaded)
    if plan is not None:
        cut_model(loaded, plan.cuts)
        loaded.to(where)
    if pack_weights:
        pack_model(loaded)
    adapted = AdaptedModel(loaded, modules, head, None if plan is None else plan.cuts)
    if plan is not None:
        join_outputs(adapted, plan)
    name = served_model_name or served_name(model)
    return LoadedBase(
        id=name,
        model_type=config.model_type,
        adapted=adapted,
        tokenizer=TextTokenizer(pretrained.tokenizer, pretrained.vocabulary),
        identity=identity,
        device=where,
        dtype=loaded.dtype,
        context=context_of(config, pooled) if seq2seq is None else seq2seq.context,
        vocabulary=pretrained.vocabulary,
        eos_token_ids=frozenset() if task.pools else pretrained.eos_token_ids,
        parameters=parameters,
        weight_bytes=stored_bytes,
        quantization=pretrained.quantization,
        fingerprint=fingerprint,
        created=int(time.time()),
        task=task,
        pooled=pooled,
        seq2seq=seq2seq,
    )


def modules_of(model: Any, config: Any) -> BaseModules:
    """The modules of a transformers model as adapters see them; a model on the meta device will do."""
    return BaseModules.of(model, model_type=config.model_type, output_layer=model.get_output_embeddings())


def skeleton(model: str, task: Task = Task.GENERATE) -> BaseModules:
    """The modules of a base model from its config alone: no weights are read. Raises BaseModelError."""
    return modules_of(*without_weights(model, task))


def is_encoder_decoder(model: str) -> bool:
    """By its config alone. Raises BaseModelError."""
    try:
        return _is_encoder_decoder(AutoConfig.from_pretrained(model, trust_remote_code=False))
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise BaseModelError(f"cannot read the config of the base model {model!r}: {_reason(model, error)}") from error


def architecture(model: str, task: Task = Task.GENERATE) -> Architecture:
    """A base model on the meta device, from its config alone, as adapters are bound to it. Raises BaseModelError."""
    empty, config = without_weights(model, task)
    try:
        head = head_of(empty, frozenset()) if task is Task.CLASSIFY else None
    except Unservable as error:
        raise BaseModelError(f"{model!r} is no classifier: {error}") from error
    return Architecture.of(empty, modules_of(empty, config), empty.base_model_prefix, head)


def without_weights(model: str, task: Task) -> tuple[Any, Any]:
    """(the model on the meta device, its config)."""
    try:
        config = AutoConfig.from_pretrained(model, trust_remote_code=False)
        if task is Task.GENERATE and _is_encoder_decoder(config):
            task = Task.SEQ2SEQ  # PEFT's adapters may name no task
        with torch.device("meta"):
            return _auto_class(task).from_config(config, trust_remote_code=False), config
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise BaseModelError(f"cannot read the config of the base model {model!r}: {_reason(model, error)}") from error


def _reason(model: str, error: Exception) -> str:
    """What the library says, and first that a name which is no directory here was looked up on the Hub."""
    if Path(model).is_dir() or not isinstance(error, OSError):
        return str(error)
    return f"there is no such directory, and as a Hub id it is not to be had: {error}"


def _auto_class(task: Task) -> Any:
    """The class that transformers loads a base for this task with."""
    if task.pools:
        return AUTO_CLASSES[task]
    return AutoModelForSeq2SeqLM if task is Task.SEQ2SEQ else AutoModelForCausalLM


def _is_encoder_decoder(config: Any) -> bool:
    return bool(getattr(config, "is_encoder_decoder", False))


def _check_task(task: Task, config: Any) -> None:
    """Raises Unservable for an encoder-decoder that is to continue texts, and for a model that is none."""
    if task is Task.GENERATE and _is_encoder_decoder(config):
        raise Unservable(f"{config.model_type} models are encoder-decoders: start the server with --task seq2seq")
    if task is Task.SEQ2SEQ and not _is_encoder_decoder(config):
        raise Unservable(
            f"{config.model_type} models have no encoder and decoder: start the server with --task generate"
        )


def pick_device(device: str) -> torch.device:
    """`auto` is CUDA where there is one. Raises BaseModelError for a CUDA that is not there."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise BaseModelError(f"device is {device!r} but this PyTorch sees no CUDA device; use --device cpu")
    return torch.device(device)


def _dtype(dtype: str, device: torch.device) -> torch.dtype | str:
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else "auto"
    if dtype not in DTYPES:
        raise BaseModelError(f"dtype is {dtype!r}; it must be auto or one of {', '.join(DTYPES)}")
    return DTYPES[dtype]


def served_name(model: str) -> str:
    """What the base is called in the API: its Hub id, or the last part of its path."""
    if Path(model).exists():
        cached = _CACHED.search(str(Path(model).resolve()))
        return f"{cached[1]}/{cached[2]}" if cached else Path(model).resolve().name
    return model


def identify(model: str, served_model_name: str | None, aliases: Iterable[str]) -> BaseIdentity:
    """What an adapter's base_model_name_or_path may say to mean this base."""
    names = {served_name(model), *aliases} | ({served_model_name} if served_model_name else set())
    return BaseIdentity(frozenset(names), Path(model).resolve().name if Path(model).exists() else None)


def fingerprint_of(model: nn.Module) -> str:
    """16 hex digits over every parameter's name, shape, dtype and a sample of its values.

    Of a quantized model, over all that its weights are stored in, scales included; before it runs for the first time,
    when bitsandbytes may store them otherwise, and rounded.
    """
    digest = hashlib.sha256()
    quantized = any(holds_quantized(module) for module in model.modules())
    for name, parameter in stored_tensors(model) if quantized else sorted(model.named_parameters()):
        digest.update(f"{name}:{tuple(parameter.shape)}:{parameter.dtype};".encode())
        flat = parameter.detach().flatten()
        sample = flat[:: max(1, flat.numel() // 1024)].cpu().contiguous()
        digest.update(sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
