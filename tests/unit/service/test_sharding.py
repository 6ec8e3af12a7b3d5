"""What --tensor-parallel cannot be combined with, and what it refuses of a model before any process is started."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

from service.assembly import build_server
from service.engine.base_model import BaseModelError
from service.engine.shards.check import check_splittable
from service.settings import Settings, SettingsError
from service.sharding import start_team
from tests.factories import tiny_config


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"task": "embed"}, "for --task generate, not embed"),
        ({"task": "seq2seq"}, "for --task generate, not seq2seq"),
        ({"quantization": "int8"}, "plain weights, not quantized ones"),
        ({"auto_merge": True}, "leave out one of them"),
    ],
)
def test_settings_that_mean_nothing_to_parts(tmp_path: Path, options: dict[str, Any], said: str) -> None:
    """Known before anything is loaded: there is no model."""
    settings = Settings(model=str(tmp_path / "none"), data_dir=tmp_path / "data", tensor_parallel=2, **options)
    with pytest.raises(SettingsError, match=said):
        build_server(settings)


def test_one_part_is_no_team(tmp_path: Path) -> None:
    with ExitStack() as opened:
        assert start_team(Settings(model=str(tmp_path / "none")), 1, opened) is None


def test_a_model_is_held_against_its_config_alone(tmp_path: Path) -> None:
    tiny_config("llama").save_pretrained(tmp_path)
    check_splittable(str(tmp_path), 2, "cpu")
    with pytest.raises(BaseModelError, match=r"cannot be cut into 4 parts: .* 2 key-value heads"):
        check_splittable(str(tmp_path), 4, "cpu")


def test_a_checkpoint_that_is_quantized(tmp_path: Path) -> None:
    tiny_config("llama").save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(BaseModelError, match=r"is quantized \(gptq\)"):
        check_splittable(str(tmp_path), 2, "cpu")


def test_more_parts_than_devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(BaseModelError, match="this machine shows 1 CUDA devices"):
        check_splittable(str(tmp_path), 2, "auto")
