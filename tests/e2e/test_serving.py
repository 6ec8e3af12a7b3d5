"""The main job as a user does it: a server process, adapters made by PEFT, HTTP; and PEFT says what is right."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from tests.factories import (
    AdapterSpec,
    Arch,
    make_adapter,
    peft_greedy,
    peft_reference,
    save_model,
    tiny_model,
    widen_adapter,
)
from tests.server import ROOT, Server

PROMPTS = [b"The quick brown fox", b"a", b"VB-LoRA composes every matrix", b"0123456789 and so on"]
TOKENS = 12

SPECS = {
    "compact": AdapterSpec(seed=1),
    "full": AdapterSpec(seed=2, compact=False, target_modules="all-linear"),
    "topk-1": AdapterSpec(seed=3, topk=1, r=2),
    "topk-4": AdapterSpec(seed=4, topk=4, num_vectors=300, vector_length=8),
    "compact-bf16": AdapterSpec(seed=5, dtype=torch.bfloat16),
    "compact-f16": AdapterSpec(seed=6, dtype=torch.float16),
    "full-bf16": AdapterSpec(seed=7, dtype=torch.bfloat16, compact=False),
    "one-layer": AdapterSpec(seed=8, target_modules="all-linear", r=3),
}


@dataclass(frozen=True)
class Case:
    server: Server
    model: PreTrainedModel
    adapters: dict[str, Path]

    def expected(self, name: str | None, prompt: bytes) -> list[int]:
        if name is None:
            return peft_greedy(self.model, list(prompt), TOKENS)
        adapter = self.adapters[name]
        # PEFT cannot load a compact checkpoint of 16 bits: it gets the same tensors widened.
        loadable = widen_adapter(adapter, adapter.parent / f"{name}-widened") if "16" in name else adapter
        return peft_greedy(peft_reference(self.model, loadable), list(prompt), TOKENS)


@pytest.fixture(scope="module", params=["llama", "qwen2", "gpt2"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    arch: Arch = request.param
    folder = tmp_path_factory.mktemp(arch)
    model = tiny_model(arch)
    save_model(model, folder / "base")
    adapters = {name: make_adapter(model, spec, folder / name) for name, spec in SPECS.items()}
    with Server("serve", "--model", str(folder / "base"), data_dir=folder / "data") as server:
        for name, adapter in adapters.items():
            response = server.upload(name, adapter)
            assert response.status_code == 201, response.text
        yield Case(server, model, adapters)


def test_greedy_tokens_are_pefts_for_every_form_in_one_mixed_flood(case: Case) -> None:
    wanted = [(name, prompt) for name in (None, *SPECS) for prompt in PROMPTS]

    def answer(job: tuple[str | None, bytes]) -> list[int]:
        name, prompt = job
        body = case.server.generate(list(prompt), adapter=name or "base", max_new_tokens=TOKENS, ignore_eos=True)
        assert [adapter["name"] for adapter in body["selection"]["adapters"]] == ([name] if name else [])
        tokens: list[int] = body["choices"][0]["token_ids"]
        return tokens

    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(answer, wanted))
    distinct = {tuple(tokens) for tokens in answers}
    assert len(distinct) > len(wanted) // 2, "adapters must be visible, or this proves nothing"
    for (name, prompt), tokens in zip(wanted, answers, strict=True):
        assert tokens == case.expected(name, prompt), f"{name} on {prompt!r}"


def test_streamed_text_and_tokens_are_those_of_the_plain_answer(case: Case) -> None:
    fields = {"adapter": "compact", "max_new_tokens": TOKENS, "ignore_eos": True}
    whole = case.server.generate("The quick", **fields)["choices"][0]
    body = {"prompt": "The quick", "temperature": 0, "stream": True, **fields}
    with case.server.http.stream("POST", "/v1/generate", json=body) as response:
        lines = [line for line in response.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    deltas = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    choices = [choice for delta in deltas for choice in delta["choices"]]
    assert [token for choice in choices for token in choice["token_ids"]] == whole["token_ids"]
    assert "".join(choice["text"] for choice in choices) == whole["text"]
    assert choices[-1]["finish_reason"] == "length"
    assert deltas[-1]["usage"]["completion_tokens"] == TOKENS


def test_a_seed_gives_the_same_text_alone_and_in_a_crowd(case: Case) -> None:
    def sampled(seed: int, adapter: str = "compact") -> list[int]:
        body = case.server.generate("Once", temperature=1.0, seed=seed, adapter=adapter, max_new_tokens=TOKENS)
        tokens: list[int] = body["choices"][0]["token_ids"]
        return tokens

    alone = [sampled(seed) for seed in range(4)]
    assert len({tuple(tokens) for tokens in alone}) > 1
    with ThreadPoolExecutor(12) as pool:
        crowd = [pool.submit(sampled, 100 + i, name) for i, name in enumerate(SPECS)]
        together = list(pool.map(sampled, range(4)))
        assert all(future.result() for future in crowd)
    assert together == alone


def test_a_blend_is_the_weighted_sum_of_deltas(case: Case) -> None:
    weights = {"compact": 0.7, "full": -0.4}
    reference = peft_reference(case.model, case.adapters["compact"])
    dense = {name: _deltas(case.model, case.adapters[name]) for name in weights}
    blended = reference.unload()
    modules = dict(blended.named_modules())
    with torch.no_grad():
        for name, weight in weights.items():
            for module, delta in dense[name].items():
                modules[module].weight += weight * delta
    adapters = [{"name": name, "weight": weight} for name, weight in weights.items()]
    for prompt in PROMPTS:
        body = case.server.generate(list(prompt), adapters=adapters, max_new_tokens=TOKENS, ignore_eos=True)
        assert body["choices"][0]["token_ids"] == peft_greedy(blended, list(prompt), TOKENS)


def _deltas(model: PreTrainedModel, adapter: Path) -> dict[str, torch.Tensor]:
    """Each adapted module's dense delta, as PEFT computes it, by the module's name in the base."""
    peft_model = peft_reference(model, adapter)
    layers = {name: m for name, m in peft_model.base_model.model.named_modules() if hasattr(m, "get_delta_weight")}
    return {name: layer.get_delta_weight("default").detach() for name, layer in layers.items()}


def test_merge_mode_gives_the_same_tokens_in_float32(case: Case) -> None:
    for prompt in PROMPTS[:2]:
        fields = {"adapter": "full", "max_new_tokens": TOKENS, "ignore_eos": True}
        switched = case.server.generate(list(prompt), **fields)
        merged = case.server.generate(list(prompt), mode="merge", **fields)
        assert merged["selection"]["mode"] == "merge"
        assert merged["choices"][0]["token_ids"] == switched["choices"][0]["token_ids"]
    base = case.server.generate(list(PROMPTS[0]), adapter="base", max_new_tokens=TOKENS, ignore_eos=True)
    assert base["choices"][0]["token_ids"] == case.expected(None, PROMPTS[0])


def test_an_unknown_adapter_is_a_404_and_never_a_base_answer(case: Case) -> None:
    for fields in ({"adapter": "nobody"}, {"adapters": [{"name": "compact"}, {"name": "nobody"}]}):
        response = case.server.http.post("/v1/generate", json={"prompt": "x", **fields})
        assert response.status_code == 404
        assert response.json()["error"]["code"] == "adapter_not_found"


def test_everything_acknowledged_survives_a_restart(tmp_path: Path) -> None:
    model = tiny_model("llama")
    save_model(model, tmp_path / "base")
    first = make_adapter(model, AdapterSpec(seed=1), tmp_path / "first")
    second = make_adapter(model, AdapterSpec(seed=2), tmp_path / "second")
    expected = peft_greedy(peft_reference(model, second), list(PROMPTS[0]), TOKENS)
    arguments = ("serve", "--model", str(tmp_path / "base"))
    with Server(*arguments, data_dir=tmp_path / "data") as server:
        old = server.upload("style", first).json()["digest"]
        server.upload("style", second, replace="true")
        assert server.http.post("/v1/adapters/style/activate").status_code == 200
        server.kill()
    with Server(*arguments, data_dir=tmp_path / "data") as server:
        record = server.http.get("/v1/adapters/style").json()
        assert record["active"] is True
        assert [version["digest"] for version in record["versions"]][-1] == old
        unnamed = server.generate(list(PROMPTS[0]), max_new_tokens=TOKENS, ignore_eos=True)
        assert unnamed["choices"][0]["token_ids"] == expected, "the active adapter is the default"
        pinned = server.generate("x", adapter=f"style@{old[:20]}")
        assert pinned["selection"]["adapters"][0]["digest"] == old
        assert server.stop() == 0


def test_adapters_of_another_base_are_listed_as_failed_and_the_server_starts(tmp_path: Path) -> None:
    small, wide = tiny_model("llama"), tiny_model("llama", hidden_size=128)
    save_model(small, tmp_path / "small")
    save_model(wide, tmp_path / "wide")
    adapter = make_adapter(small, AdapterSpec(), tmp_path / "adapter")
    with Server("serve", "--model", str(tmp_path / "small"), data_dir=tmp_path / "data") as server:
        server.upload("mine", adapter)
    with Server("serve", "--model", str(tmp_path / "wide"), data_dir=tmp_path / "data") as server:
        record = server.http.get("/v1/adapters/mine").json()
        assert record["state"] == "FAILED"
        assert "q_proj" in record["reason"]
        refused = server.http.post("/v1/generate", json={"prompt": "x", "adapter": "mine"})
        assert refused.status_code == 503
        assert "q_proj" in refused.json()["error"]["message"]
        assert server.generate("x", adapter="base")["choices"][0]["finish_reason"]


def test_adapters_come_in_by_every_way_that_the_operator_opens(tmp_path: Path) -> None:
    model = tiny_model("llama")
    save_model(model, tmp_path / "base")
    for name in ("watched", "later", "looked-up"):
        folder = "place" if name == "looked-up" else "adapters"
        make_adapter(model, AdapterSpec(seed=len(name)), tmp_path / folder / name)
    (tmp_path / "adapters" / "later").rename(tmp_path / "later")
    arguments = ("--adapters-dir", str(tmp_path / "adapters"), "--adapters-dir-interval-s", "0.05")
    places = ("--resolve", f"dir:{tmp_path / 'place'}")
    base = str(tmp_path / "base")
    with Server("serve", "--model", base, *arguments, *places, data_dir=tmp_path / "data") as server:
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda _: server.generate("x", adapter="looked-up"), range(8)))
        assert {answer["selection"]["adapters"][0]["name"] for answer in answers} == {"looked-up"}
        assert server.generate("x", adapter="watched")
        (tmp_path / "later").rename(tmp_path / "adapters" / "later")
        deadline = time.monotonic() + 60
        while server.http.get("/v1/adapters/later").status_code == 404:
            assert time.monotonic() < deadline, "a directory that appears is registered"
        assert server.generate("x", adapter="later")
        pushed = subprocess.run(
            [sys.executable, "-m", "service", "push", str(tmp_path / "adapters"), "--url", server.url, "--json"],
            cwd=ROOT, capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert json.loads(pushed.stdout)["unchanged"] == 2
        assert server.stop() == 0
    assert sum("registered an adapter adapter=looked-up" in line for line in server.log) == 1
