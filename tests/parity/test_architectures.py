"""A part of the survey of architectures (`tests.survey`): what stands in docs/architectures.md, found again."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Phi3Config

from service.engine.base_model import load_base
from tests.factories import save_model
from tests.survey.__main__ import PAGE
from tests.survey.configs import SURVEYED, tiny_config
from tests.survey.survey import Finding, survey, tiny_base

SLOT = [
    "cohere", "deepseek_v3", "falcon", "gemma", "glm4", "gpt_neox", "gptj", "granite", "llama", "mixtral, no window",
    "olmo2", "opt", "phi", "phi3, longrope", "qwen2_moe", "qwen3", "smollm3", "stablelm",
]  # fmt: skip
ROWS = ["bloom", "cohere2", "falcon, ALiBi", "gemma2", "gemma3_text", "gpt_neo", "gpt_oss", "llama4_text", "mistral"]
REFUSED = {
    "jamba": "layers of other kinds (linear_attention)",
    "lfm2": "layers of other kinds (conv)",
    "mamba": "takes no cache of keys and values",
    "rwkv": "takes no cache of keys and values",
}


def documented(finding: Finding) -> str:
    """The row of the page."""
    what = (finding.kv, str(finding.layers)) if finding.outcome == "works" else (finding.detail,)
    return f"| {' | '.join((f'`{finding.architecture}`', *what))} |"


@pytest.mark.parametrize(("architecture", "kv"), [(a, "slot") for a in SLOT] + [(a, "rows") for a in ROWS])
def test_served_rightly(architecture: str, kv: str) -> None:
    finding = survey(architecture)
    assert (finding.outcome, finding.kv) == ("works", kv), finding.detail
    assert finding.layers >= 4
    assert documented(finding) in PAGE.read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize(("architecture", "reason"), REFUSED.items())
def test_refused_with_the_reason(architecture: str, reason: str) -> None:
    finding = survey(architecture)
    assert finding.outcome == "refused"
    assert reason in finding.detail
    assert documented(finding) in PAGE.read_text(encoding="utf-8").splitlines()


def test_the_page_has_every_architecture_and_none_is_wrong() -> None:
    text = PAGE.read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    assert sorted(row.split("`")[1] for row in rows) == sorted(SURVEYED)
    assert "0 are wrong" in text
    works, everything = text.split("## Refused")[0].count("| `"), len(SURVEYED)
    readme, changelog = ((PAGE.parents[1] / name).read_text(encoding="utf-8") for name in ("README.md", "CHANGELOG.md"))
    assert f"[{works} of {everything} text decoders and variants]" in readme
    assert f"{works} work, {everything - works} are refused at start" in changelog


def test_the_survey_finds_a_wrong_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slots for a model with windows are right in the short texts of the self-test alone."""
    monkeypatch.setattr("service.engine.self_test._slides", lambda adapted, context: False)
    finding = survey("mistral")
    assert (finding.outcome, finding.kv) == ("wrong", "slot")
    assert "instead of" in finding.detail


class TestLongRope:
    """Beyond the length that the model was first trained on, a batch's longest row decides for all."""

    def test_the_context_ends_where_positions_are_turned_otherwise(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        base = load_base(str(save_model(tiny_base("phi3, longrope"), tmp_path / "base")), device="cpu")
        assert base.context == 24
        assert "beyond 24 tokens" in caplog.text

    @torch.inference_mode()
    def test_what_it_guards_against(self) -> None:
        """Else the limit could go: the same row answers otherwise beside a longer one."""
        model: Any = copy.deepcopy(tiny_base("phi3, longrope"))
        row = list(range(40, 60))
        alone = model(torch.tensor([row]), use_cache=False).logits[0, -1]
        positions = torch.tensor([[*range(20)], [*range(10, 30)]])
        beside = model(torch.tensor([row, row]), position_ids=positions, use_cache=False).logits[0, -1]
        assert float((alone - beside).abs().max()) > 0.01 * float(alone.abs().max())

    def test_other_scaling_is_not_limited(self, tmp_path: Path) -> None:
        for number, architecture in enumerate(("llama, YaRN", "llama, dynamic NTK", "phi3")):
            base = load_base(str(save_model(tiny_base(architecture), tmp_path / f"{number}")), device="cpu")
            assert base.context == 256
        assert isinstance(tiny_config("phi3"), Phi3Config)
