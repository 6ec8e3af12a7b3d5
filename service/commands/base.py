"""The base model as offline commands need it: from its config, without weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from adapters.binding import BaseIdentity
from adapters.targets import BaseModules
from service.commands import CommandError
from service.commands.progress import working


@dataclass(frozen=True, slots=True)
class BaseSkeleton:
    """A base model's modules, the names that mean it, and whether it has an encoder beside its decoder."""

    modules: BaseModules
    identity: BaseIdentity
    is_encoder_decoder: bool = False

    @property
    def hub_id(self) -> str | None:
        """Its Hub id. A local path says where a model lies on one machine, which is nobody else's business."""
        return next((name for name in self.identity.names if "/" in name), None)


def read_base(model: str, task_type: str | None = None) -> BaseSkeleton:
    """Reads the config of a base model, as adapters of a PEFT `task_type` see it. Raises CommandError."""
    check_model(model)
    with working(f"Reading the config of {model}"):
        from service.engine.base_model import (  # transformers: seconds to import
            BaseModelError,
            identify,
            is_encoder_decoder,
            skeleton,
        )
        from service.engine.task import Task

        try:
            modules = skeleton(model, Task.of_adapter(task_type))
            return BaseSkeleton(modules, identify(model, None, ()), is_encoder_decoder(model))
        except BaseModelError as error:
            raise CommandError(str(error)) from error


def check_model(model: str) -> None:
    """Raises CommandError for what can be neither a directory nor a Hub id."""
    if not Path(model).is_dir() and (model.startswith((".", "/", "~")) or model.count("/") > 1):
        raise CommandError(f"there is no directory {model}; give the base model's directory or its Hub id")
