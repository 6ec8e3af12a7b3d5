"""What of a machine each replica gets."""

from __future__ import annotations

import os

import pytest
import torch

from service.cluster.resources import resources_of
from service.settings import Settings, SettingsError


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    return monkeypatch


def test_cpus_are_divided(machine: pytest.MonkeyPatch) -> None:
    machine.setattr(torch.cuda, "device_count", lambda: 0)
    assert resources_of(Settings(replicas=4)) == {"num_cpus": 4, "num_gpus": 0}
    assert resources_of(Settings(replicas=32)) == {"num_cpus": 1, "num_gpus": 0}


def test_every_part_of_every_replica_has_a_gpu(machine: pytest.MonkeyPatch) -> None:
    machine.setattr(torch.cuda, "device_count", lambda: 8)
    assert resources_of(Settings(replicas=8)) == {"num_cpus": 2, "num_gpus": 1}
    assert resources_of(Settings(replicas=2, tensor_parallel=4)) == {"num_cpus": 8, "num_gpus": 4}
    with pytest.raises(SettingsError, match="each replica needs 4"):
        resources_of(Settings(replicas=3, tensor_parallel=4))
    assert resources_of(Settings(replicas=3, tensor_parallel=4, device="cpu"))["num_gpus"] == 0
