"""How a machine is divided between replicas."""

from __future__ import annotations

import os

import torch

from service.settings import Settings, SettingsError


def resources_of(settings: Settings) -> dict[str, int]:
    """What of this machine each replica gets, for all of its processes. Raises SettingsError where GPUs are too few."""
    gpus = 0 if settings.device == "cpu" else torch.cuda.device_count()
    each = settings.tensor_parallel
    if 0 < gpus < settings.replicas * each:
        raise SettingsError(
            f"replicas is {settings.replicas} and this machine has {gpus} GPUs: each replica needs {each}; set "
            "--device cpu to use none"
        )
    cpus = max(1, (os.cpu_count() or 1) // settings.replicas)
    return {"num_cpus": cpus, "num_gpus": each if gpus else 0}
