"""Starts the processes of `--tensor-parallel`, if the settings and the model allow it."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial

from service.engine.shards.check import check_splittable
from service.engine.shards.team import Team
from service.engine.task import Task
from service.logs import setup_logging
from service.settings import Settings, SettingsError


def check_settings(settings: Settings) -> None:
    """Raises SettingsError for settings that mean nothing to a model in parts."""
    if Task(settings.task) is not Task.GENERATE:
        raise SettingsError(f"tensor_parallel is for --task generate, not {settings.task}")
    if settings.quantization != "none":
        raise SettingsError("tensor_parallel cuts plain weights, not quantized ones: leave out one of the two")
    if settings.auto_merge:
        raise SettingsError("auto_merge folds adapters into weights, which tensor_parallel cuts: leave out one of them")


def start_team(settings: Settings, threads: int, opened: ExitStack) -> Team | None:
    """The processes with the other parts of the model, which begin to load; None where it is in one piece.

    Raises BaseModelError for a model that cannot be cut into so many parts.
    """
    assert settings.model is not None
    size = settings.tensor_parallel
    if size == 1:
        return None
    check_splittable(settings.model, size, settings.device)
    team = Team(
        settings.model,
        size,
        dtype=settings.dtype,
        device=settings.device,
        pack_weights=settings.pack_weights,
        threads=threads,
        prepare=partial(
            setup_logging, format=settings.log_format, level=settings.log_level, prompts=settings.log_prompts
        ),
    )
    opened.callback(team.close)
    return team
