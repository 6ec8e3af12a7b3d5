"""The example of the documentation trains a family whose bank is one, to the byte, and a server keeps it once."""

from __future__ import annotations

import importlib.util
import json
import shutil
from argparse import Namespace
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from types import ModuleType

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import PreTrainedModel

from adapters.store import AdapterStore
from tests.factories import peft_reference, save_model, tiny_model
from tests.unit.adapters.store_support import banks
from tests.unit.adapters.support import BANK, PROMPT, adapted, alone, factors, token_logits

ROOT = Path(__file__).parents[3]
WEIGHTS = "adapter_model.safetensors"
SIZES = "--num-vectors 24 --vector-length 16 --steps 3 --batch 2 --length 12"


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_family", ROOT / "examples" / "train_family.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def family(example: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three adapters, the last of them trained later and of another shape."""
    root = tmp_path_factory.mktemp("family")
    save_model(tiny_model("llama"), root / "base")
    for name in ("formal", "casual", "terse"):
        (root / f"{name}.txt").write_text(f"This is a {name} text. " * 20)

    def run(names: Sequence[str], *words: str) -> None:
        texts = [f"{name}={root / f'{name}.txt'}" for name in names]
        example.main(["--model", str(root / "base"), "--output", str(root / "family"), *SIZES.split(), *words, *texts])

    run(["formal", "casual"])
    run(["terse"], "--first", str(root / "family" / "formal"), "--r", "2", "--topk", "3", "--targets", "q_proj,o_proj")
    return root / "family"


def test_the_first_trains_its_bank_and_the_others_leave_it(example: ModuleType, family: Path) -> None:
    stored = {path.name: load_file(path / WEIGHTS) for path in family.iterdir()}
    assert stored.keys() == {"formal", "casual", "terse"}
    first = stored["formal"][BANK]
    for tensors in stored.values():
        assert torch.equal(tensors[BANK], first)
        assert tensors[BANK].dtype == first.dtype == torch.float32
    torch.manual_seed(0)
    config = example.adapter_config(example.parse(["--model", "", "--output", "", *SIZES.split(), "a=b"]))
    fresh = get_peft_model(tiny_model("llama"), config).base_model.vblora_vector_bank["default"]
    assert fresh.requires_grad
    assert not torch.equal(fresh.detach(), first), "the first one's was trained"
    joined = example.join_family(tiny_model("llama"), config, family / "formal")
    trained = {name for name, parameter in joined.named_parameters() if parameter.requires_grad}
    assert trained
    assert all("vblora_logits" in name for name in trained)


def test_each_learned_something_of_its_own(family: Path) -> None:
    weights = [load_file(family / name / WEIGHTS) for name in ("formal", "casual")]
    assert weights[0].keys() == weights[1].keys()
    assert any(not torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


def test_a_server_keeps_their_bank_once(family: Path, tmp_path: Path) -> None:
    with closing(AdapterStore(tmp_path / "data")) as store:
        for path in sorted(family.iterdir()):
            with store.staging() as staged:
                for name in ("adapter_config.json", WEIGHTS):
                    shutil.copyfile(path / name, staged / name)
                store.publish("", path.name, staged, {})
        assert list(banks(tmp_path / "data").values()) == [3]


@pytest.mark.parametrize("name", ["formal", "casual", "terse"])
def test_they_compute_what_peft_computes(family: Path, name: str) -> None:
    base = tiny_model("llama")
    expected = peft_reference(base, family / name)
    config = json.loads((family / name / "adapter_config.json").read_text())
    assert config["save_only_topk_weights"] is True
    with torch.inference_mode():
        logits = expected(input_ids=torch.tensor([PROMPT]), use_cache=False).logits
    torch.testing.assert_close(token_logits(adapted(base), [PROMPT], alone(factors(family / name))), logits)


def test_the_code_of_the_documentation(example: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it stands there; what it leaves to the reader is a base model and a loop of training."""
    section = (ROOT / "docs" / "adapters.md").read_text().split("## Families on one bank")[1]
    code = section.split("```python\n")[1].split("```")[0]
    tokens = torch.randint(256, (200,), generator=torch.Generator().manual_seed(0))

    def load_base() -> PreTrainedModel:
        return tiny_model("llama", hidden_size=256, num_key_value_heads=4)

    def train(model: PeftModel, name: str) -> None:
        example.train(model, tokens, Namespace(steps=2, batch=1, length=8))

    monkeypatch.chdir(tmp_path)
    exec(code, {"load_base": load_base, "train": train})
    stored = {path.name: load_file(path / WEIGHTS) for path in (tmp_path / "family").iterdir()}
    first, *others = (stored[name] for name in sorted(stored, key="formal".__ne__))
    assert len(others) >= 2
    for tensors in others:
        assert torch.equal(tensors[BANK], first[BANK])
        assert any(not torch.equal(tensors[key], first[key]) for key in first)
        assert any(key.endswith("_topk_weights") for key in tensors)
