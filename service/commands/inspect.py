"""`vblora-serve inspect DIR`: validates an adapter as an upload would be, and says what it is."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from adapters.binding import check_base_name
from adapters.config import VBLoRAConfig
from adapters.errors import CheckpointError
from adapters.lora_config import LoRAConfig
from adapters.reading import AnyCheckpoint, is_resumable, read_adapter
from adapters.split_file import WEIGHTS_FILE, file_size
from adapters.targets import check_binding
from service.commands.adapter import check_directory
from service.commands.base import read_base
from service.commands.output import complain, say, show_counts, show_facts, show_json, show_layers
from service.commands.progress import working

EXTRAS_WARNING = "trained biases and saved modules are held against the base by the server that loads them, not here"


@dataclass(frozen=True, slots=True, eq=False)
class Inspection:
    """What was found in a directory. `base` is the model that it was held against, if one was given."""

    directory: Path
    checkpoint: AnyCheckpoint
    base: str | None
    warnings: tuple[str, ...]

    @property
    def resumable(self) -> bool:
        return is_resumable(self.checkpoint)

    @property
    def file_bytes(self) -> int:
        return file_size(self.directory / WEIGHTS_FILE)

    def to_dict(self) -> dict[str, Any]:
        layout = self.checkpoint.layout
        return {
            "adapter": self.directory.resolve().name,
            "config": self.checkpoint.config.to_dict(),
            "parameters": {**layout.parameters().to_dict(), "file_bytes": self.file_bytes},
            "resumable": self.resumable,
            "layers": [asdict(layer) for layer in layout.layers],
            "extras": [spec.key for spec in layout.extras],
            "base": self.base,
            "warnings": list(self.warnings),
        }


def run(directory: Path, *, model: str | None, as_json: bool) -> int:
    """Prints what is in `directory`; 1 and the reason if it is refused. Raises CommandError if it is no directory."""
    check_directory(directory)
    try:
        inspection = inspect(directory, model)
    except CheckpointError as error:
        return _refuse(error, as_json=as_json)
    if as_json:
        show_json(inspection.to_dict())
    else:
        _show(inspection)
    return 0


def inspect(directory: Path, model: str | None) -> Inspection:
    """Reads an adapter strictly and, with a `model`, holds it against that base. Raises CheckpointError."""
    with working(f"Reading {directory}"):
        checkpoint = read_adapter(directory)
    warnings = [EXTRAS_WARNING] if checkpoint.extras else []
    if model is not None:
        base = read_base(model, checkpoint.config.task_type)
        warnings += filter(None, [check_base_name(checkpoint.config.base_model_name_or_path, base.identity)])
        check_binding(checkpoint.config, checkpoint.layout.layers, base.modules)
    return Inspection(directory, checkpoint, model, tuple(warnings))


def _refuse(error: CheckpointError, *, as_json: bool) -> int:
    if as_json:
        show_json({"error": {"message": error.message, "code": error.code, "param": error.subject}})
    else:
        complain(f"refused ({error.code}): {error.message}")
    return 1


def _show(inspection: Inspection) -> None:
    config, layout = inspection.checkpoint.config, inspection.checkpoint.layout
    count = layout.parameters()
    targets = config.target_modules
    show_facts(
        [
            ("adapter", inspection.directory.resolve().name),
            ("trained on", config.base_model_name_or_path or "a base that the config does not name"),
            ("task", config.task_type),
            ("rank", config.r),
            *_own_facts(config),
            ("target modules", ", ".join(targets) if isinstance(targets, tuple) else targets or "the architecture's"),
            ("storage", f"{count.storage}, {inspection.file_bytes:,} bytes"),
            ("resumable", _resumable(inspection)),
            ("besides", ", ".join(spec.key for spec in layout.extras)),
        ]
    )
    say()
    say(f"{len(layout.layers)} layers" + (f", all of them in {inspection.base}" if inspection.base else ""))
    show_layers(layout.layers)
    say()
    show_counts(count)
    for warning in inspection.warnings:
        complain(f"warning: {warning}")


def _own_facts(config: VBLoRAConfig | LoRAConfig) -> list[tuple[str, object]]:
    if isinstance(config, VBLoRAConfig):
        what = f"{config.num_vectors} vectors of {config.vector_length}, top {config.topk} of them a tile"
        return [("vector bank", what)]
    scaled = f"alpha {config.lora_alpha:g}, divided by {'√rank' if config.use_rslora else 'the rank'}"
    own = len(config.rank_pattern), len(config.alpha_pattern)
    return [("plain LoRA", scaled), ("patterns", f"{own[0]} of ranks, {own[1]} of alphas" if any(own) else None)]


def _resumable(inspection: Inspection) -> str:
    if inspection.resumable:
        return "yes: training can go on from it"
    return "no: it was compact once, so it is for inference and merging"
