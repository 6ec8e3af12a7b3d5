"""`vblora-serve blend A:0.7 B:0.3 --output DIR`: a weighted sum of adapters as one compact adapter that PEFT loads."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from adapters.binding import blend_origin
from adapters.blend import weighted_sum
from adapters.export import write_adapter
from adapters.lora import ServedCheckpoint
from adapters.members import BaseTensor
from adapters.parameters import LoRAParameterCount, ParameterCount
from adapters.reading import as_served
from adapters.staging import check_free
from adapters.store import digest_of_files
from service.api.adapter_files import ADAPTER_FILES
from service.commands import CommandError
from service.commands.adapter import read_directory
from service.commands.base import check_model
from service.commands.output import complain, say, show_json
from service.commands.progress import working


@dataclass(frozen=True, slots=True)
class WeightedDirectory:
    """An adapter directory and its weight, written `DIR:0.7`; without a number the weight is 1."""

    directory: Path
    weight: float = 1.0

    @classmethod
    def parse(cls, text: str) -> WeightedDirectory:
        directory, colon, weight = text.rpartition(":")
        try:
            return cls(Path(directory), float(weight)) if colon and directory else cls(Path(text))
        except ValueError:
            return cls(Path(text))


def run(members: Sequence[WeightedDirectory], *, output: Path, model: str | None, as_json: bool) -> int:
    """Writes the blend of the members to `output`. Raises AdapterError, FileExistsError or CommandError."""
    check_free(output)
    read = []
    for member in members:
        if not math.isfinite(member.weight):
            raise CommandError(f"the weight of {member.directory} is {member.weight}; give a finite number")
        read.append((_compact(member.directory), member.weight))
    needs_base = any(checkpoint.extras for checkpoint, _ in read) and model is not None
    with working("Blending"):
        base = _base(model, [checkpoint for checkpoint, _ in read]) if needs_base and model is not None else None
        blended = weighted_sum(read, base)
    parts = [
        {"name": member.directory.resolve().name, "digest": _digest(member.directory), "weight": member.weight}
        for member in members
    ]
    with working(f"Writing {output}"):
        write_adapter(blended, output, {"blend": json.dumps(parts)})
    count = blended.layout.parameters()
    warnings = _warnings([checkpoint for checkpoint, _ in read])
    if as_json:
        show_json({"output": str(output), "blend": parts, "parameters": count.to_dict(), "warnings": warnings})
        return 0
    say(f"Wrote {output}: {_shape(count)}")
    say(count.summary)
    for warning in warnings:
        complain(f"warning: {warning}")
    return 0


def _warnings(members: Sequence[ServedCheckpoint]) -> list[str]:
    """Members of different models may have no layer's name in common, and then no shape that contradicts another."""
    named = sorted({name for member in members if (name := member.config.base_model_name_or_path) is not None})
    if len(named) < 2:
        return []
    bases = ", ".join(map(repr, named))
    return [f"the configs name different base models ({bases}); the blend is of use only if these are the same weights"]


def _compact(directory: Path) -> ServedCheckpoint:
    if not directory.is_dir():
        raise CommandError(
            f"{directory} is not a directory; give adapter directories, each with its weight behind a colon"
        )
    return as_served(read_directory(directory))


def _shape(count: ParameterCount | LoRAParameterCount) -> str:
    if isinstance(count, LoRAParameterCount):
        return f"rank {count.r}, plain LoRA"
    return f"rank {count.r}, {count.num_vectors} vectors of {count.vector_length}, topk {count.topk}"


def _digest(directory: Path) -> str:
    """The digest that a server gives these files."""
    return digest_of_files({name: directory / name for name in ADAPTER_FILES if (directory / name).is_file()})


def _base(model: str, members: Sequence[ServedCheckpoint]) -> BaseTensor:
    """The base's parameters, as the task of the adapters has them."""
    check_model(model)
    with working(f"Loading {model}"):
        from service.engine.base_model import BaseModelError, load_base  # transformers: seconds to import
        from service.engine.task import Task

        task = Task.of_adapter(members[0].config.task_type)
        try:
            base = load_base(model, dtype="float32", device="cpu", task=task).adapted
            return partial(blend_origin, base, [checkpoint.extras for checkpoint in members])
        except BaseModelError as error:
            raise CommandError(str(error)) from error
