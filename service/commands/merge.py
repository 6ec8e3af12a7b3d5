"""`vblora-serve merge A:0.7 B:0.3 --model M --output DIR`: the base model with adapters folded into its weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapters.binding import BaseIdentity, check_base_name
from adapters.errors import AdapterError, BaseModelMismatch
from adapters.factors import AdapterFactors
from adapters.lora import ServedCheckpoint
from adapters.merged_model import Architecture, MergedModel, MergeReport
from adapters.reading import as_served
from adapters.sharded import ShardedWeights
from adapters.staging import check_free, staged_directory
from adapters.store import digest_of_files
from service.api.adapter_files import ADAPTER_FILES
from service.api.chat_files import chat_template_of
from service.commands import CommandError
from service.commands.adapter import read_directory
from service.commands.blend import WeightedDirectory
from service.commands.merged_classes import classes_config
from service.commands.model_files import (
    CHAT_TEMPLATE_FILE,
    carry_files,
    model_directory,
    read_model_config,
    write_model_config,
)
from service.commands.output import complain, say, show_facts, show_json
from service.commands.progress import transferring, working
from service.engine.base_model import DTYPES, BaseModelError, architecture, identify
from service.engine.task import Task


@dataclass(frozen=True, slots=True)
class MergeOptions:
    """What to merge and how to write it. `dtype` auto keeps each tensor's own."""

    model: str
    members: tuple[WeightedDirectory, ...]
    output: Path
    dtype: str
    shard_bytes: int
    base_aliases: tuple[str, ...]
    as_json: bool


@dataclass(frozen=True, slots=True, eq=False)
class _Member:
    """An adapter that was read, and what a server would call it by."""

    given: WeightedDirectory
    checkpoint: ServedCheckpoint
    digest: str


def run(options: MergeOptions) -> int:
    """Writes the merged model to `options.output`. Raises CommandError, AdapterError or FileExistsError."""
    check_free(options.output)
    directory = model_directory(options.model)
    config = read_model_config(directory)
    if "quantization_config" in config:
        raise CommandError(f"{options.model} is quantized: merge into the base that it was made from")
    members = [_read(member) for member in options.members]
    identity = identify(options.model, None, options.base_aliases)
    warnings = [warning for member in members if (warning := _check_name(member, identity, options.model))]

    task = _task_of(members)
    with working(f"Reading {options.model}"):
        base = _architecture(directory, task)
        model = MergedModel(ShardedWeights(directory), base, DTYPES.get(options.dtype))
        selection = [(_bind(member, model), member.given.weight) for member in members]
    with staged_directory(options.output) as staged:
        carry_files(directory, staged)
        warnings += _carry_chat_template(members, staged)
        untie = model.splits_shared(selection)
        merged = _merged_config(config, options.dtype, untie=untie)
        if task.pools:
            merged["architectures"] = [type(base.model.model).__name__]
        if model.head is not None:
            merged |= classes_config(config, [member.given.directory for member in members], model.head)
        write_model_config(merged, staged)
        with transferring(f"Writing {options.output}", model.nbytes) as advance:
            report = model.write(
                selection,
                staged,
                shard_bytes=options.shard_bytes,
                untied=_architecture(staged, task) if untie else None,
                advance=advance,
            )
    _report(options, members, report, untied=untie, warnings=warnings)
    return 0


def _read(member: WeightedDirectory) -> _Member:
    directory = member.directory
    if not math.isfinite(member.weight):
        raise CommandError(f"the weight of {directory} is {member.weight}; give a finite number")
    if not directory.is_dir():
        raise CommandError(
            f"{directory} is not a directory; give adapter directories, each with its weight behind a colon"
        )
    checkpoint = as_served(read_directory(directory))
    files = {name: directory / name for name in ADAPTER_FILES if (directory / name).is_file()}
    return _Member(member, checkpoint, digest_of_files(files))


def _check_name(member: _Member, identity: BaseIdentity, model: str) -> str | None:
    named = member.checkpoint.config.base_model_name_or_path
    try:
        warning = check_base_name(named, identity)
    except BaseModelMismatch as error:
        raise CommandError(
            f"{member.given.directory} was trained on {named!r}, and --model is {model!r}; if they are the same "
            f"weights, add --base-alias {named}"
        ) from error
    return None if warning is None else f"{member.given.directory}: {warning}"


def _bind(member: _Member, model: MergedModel) -> AdapterFactors:
    try:
        return model.factors(member.digest, member.checkpoint)
    except AdapterError as error:
        raise CommandError(f"{member.given.directory} is refused ({error.code}): {error.message}") from error


def _task_of(members: Sequence[_Member]) -> Task:
    """What the adapters were trained for. Raises CommandError if that differs."""
    tasks = {Task.of_adapter(member.checkpoint.config.task_type) for member in members}
    if len(tasks) > 1:
        raise CommandError(f"the adapters were trained for different tasks ({' and '.join(sorted(tasks))})")
    return tasks.pop()


def _architecture(directory: Path, task: Task) -> Architecture:
    try:
        return architecture(str(directory), task)
    except BaseModelError as error:
        raise CommandError(str(error)) from error


def _merged_config(config: dict[str, Any], dtype: str, *, untie: bool) -> dict[str, Any]:
    """The base's config with what the merge changes, also where it stands once more for the text part of a model."""
    merged = dict(config)
    if dtype != "auto":
        merged["torch_dtype" if "torch_dtype" in config else "dtype"] = dtype
    if untie:
        merged["tie_word_embeddings"] = False
    if isinstance(text := config.get("text_config"), dict):
        merged["text_config"] = _merged_config(text, dtype, untie=untie)
    return merged


def _carry_chat_template(members: Sequence[_Member], staged: Path) -> list[str]:
    """Chats run through the adapters' template if they bring one, as on a server. Returns warnings."""
    found = {chat_template_of(member.given.directory) for member in members} - {None}
    if len(found) > 1:
        return ["the adapters bring different chat templates: the base's own is kept"]
    for template in found:
        assert template is not None
        (staged / CHAT_TEMPLATE_FILE).write_text(template, encoding="utf-8")
    return []


def _report(
    options: MergeOptions, members: Sequence[_Member], report: MergeReport, *, untied: bool, warnings: Sequence[str]
) -> None:
    fold = report.fold
    if options.as_json:
        show_json(
            {
                "output": str(options.output),
                "model": options.model,
                "adapters": [
                    {
                        "name": member.given.directory.resolve().name,
                        "digest": member.digest,
                        "weight": member.given.weight,
                    }
                    for member in members
                ],
                "dtype": report.dtype,
                "files": list(report.files),
                "bytes": report.nbytes,
                "untied": untied,
                "merge_error": fold.merge_error,
                "merge_error_layer": fold.layer,
                "warnings": list(warnings),
            }
        )
        return
    say(f"Wrote {options.output}: {report.nbytes:,} bytes in {len(report.files)} file(s)")
    show_facts(
        [
            ("dtype", report.dtype),
            ("output embeddings", "untied from the input's: they differ now" if untied else None),
            (
                "rounding error",
                f"{fold.merge_error:.2g} of the adapters' change, in {fold.layer}" if fold.layer else None,
            ),
        ]
    )
    for warning in warnings:
        complain(f"warning: {warning}")
