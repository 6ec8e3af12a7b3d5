"""`vblora-serve init`: a fresh adapter with full logits, which PEFT loads and trains, from the base's config alone."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from adapters.checkpoint import LogitsCheckpoint
from adapters.config import VBLoRAConfig
from adapters.export import write_adapter
from adapters.parameters import ParameterCount, Storage, count_parameters
from adapters.staging import check_free
from adapters.targets import DEFAULT_TARGETS, LayerShape, check_binding
from service.commands.base import BaseSkeleton, read_base
from service.commands.output import say, show_facts, show_json, show_layers
from service.commands.progress import working

_NAMES = re.compile(r"\s*[\w.-]+(\s*,\s*[\w.-]+)*\s*")


@dataclass(frozen=True, slots=True)
class InitOptions:
    """What a fresh adapter is to be. `fields` are those of its config; with `output` None only counts are wanted."""

    model: str
    fields: dict[str, Any]
    target_modules: str | None
    base_name: str | None
    seed: int
    output: Path | None
    as_json: bool


def run(options: InitOptions) -> int:
    """Writes the adapter, or with no `output` only says what it would be."""
    if options.output is not None:
        check_free(options.output)
    base = read_base(options.model)
    config, layers = plan(options, base)
    if options.output is not None:
        with working(f"Writing {options.output}"):
            generator = torch.Generator().manual_seed(options.seed)
            write_adapter(LogitsCheckpoint.initialise(config, layers, generator), options.output)
    _report(options, config, layers)
    return 0


def plan(options: InitOptions, base: BaseSkeleton) -> tuple[VBLoRAConfig, list[LayerShape]]:
    """The config of the adapter and the layers of `base` that it adapts. Raises CheckpointError."""
    config = VBLoRAConfig.from_dict(
        {
            **options.fields,
            "peft_type": "VBLORA",
            "task_type": "SEQ_2_SEQ_LM" if base.is_encoder_decoder else "CAUSAL_LM",
            "target_modules": _targets(options.target_modules),
            "base_model_name_or_path": options.base_name or base.hub_id,
        }
    )
    layers = base.modules.selected_by(config)
    if config.target_modules is None:
        # Spelled out, because another release of PEFT may have another default.
        config = replace(config, target_modules=DEFAULT_TARGETS[base.modules.model_type])
    check_binding(config, layers, base.modules)
    return config, layers


def _targets(text: str | None) -> list[str] | str | None:
    """Names if it reads as names with commas, else what it is: a regular expression or `all-linear`."""
    if text is None or text.lower() == "all-linear" or not _NAMES.fullmatch(text):
        return text
    return [name.strip() for name in text.split(",")]


def _report(options: InitOptions, config: VBLoRAConfig, layers: list[LayerShape]) -> None:
    full, compact = (count_parameters(config, layers, storage=storage) for storage in (Storage.LOGITS, Storage.TOPK))
    if options.as_json:
        show_json(
            {
                "output": None if options.output is None else str(options.output),
                "config": config.to_dict(),
                "layers": [layer.name for layer in layers],
                "parameters": full.to_dict(),
                "compact_parameters": compact.to_dict(),
            }
        )
        return
    say(f"{len(layers)} layers of {options.model}")
    show_layers(layers)
    say()
    show_facts(_counts(full, compact))
    if options.output is not None:
        say()
        say(f"Wrote {options.output}. To train it:")
        say(f"  model = PeftModel.from_pretrained(base_model, {str(options.output)!r}, is_trainable=True)")


def _counts(full: ParameterCount, compact: ParameterCount) -> list[tuple[str, str]]:
    return [
        ("full logits, as trained", f"{full.vblora_params:,} parameters"),
        ("compact, as served", f"{compact.vblora_params:,} parameters (float32-equivalent)"),
        ("plain LoRA of that rank", f"{full.lora_params:,} parameters"),
    ]
