"""Texts read in one mixed batch against PEFT, each text alone: heads of several sizes, blends, the base, folded."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, TaskType, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from adapters.packed import own_value
from adapters.registry import AdapterRegistry
from adapters.store import AdapterStore
from service.engine.base_model import LoadedBase, load_base
from service.engine.build import build_engine
from service.engine.engine import BatchEngine
from service.engine.events import Event, FailedEvent, FinishedEvent
from service.engine.pooling.runner import PooledText
from service.engine.selection import Mode, SelectedAdapter, Selection
from service.engine.sequence import READ_ONCE, GenerationRequest
from service.engine.task import Pooling, Task
from tests.factories import untouched_rng
from tests.pooling_factory import (
    CLS,
    POOL_ARCHS,
    SEP,
    HeadSpec,
    PoolArch,
    make_pool_adapter,
    peft_loaded,
    peft_scores,
    save_pool_model,
    tiny_classifier,
    tiny_encoder,
    with_labels,
    word_tokenizer,
)

TOLERANCE = 2e-5
LABELS = [2, 3, 4, 5, 2, 3, 4, 5]
TEXTS = [[CLS, *range(10, 10 + length), SEP] for length in (3, 9, 1, 20, 5, 14, 2, 27)]


@dataclass
class Bench:
    """A base with adapters, and an engine over it that has not been started."""

    base: LoadedBase
    registry: AdapterRegistry
    engine: BatchEngine
    digests: dict[str, str] = field(default_factory=dict)
    batches: list[list[int]] = field(default_factory=list)  # the texts' lengths in each forward

    def register(self, name: str, adapter: Path) -> None:
        staged = self.registry.store.staging()
        with staged as directory:
            for file in adapter.iterdir():
                (directory / file.name).write_bytes(file.read_bytes())
            self.digests[name] = self.registry.register("", name, directory).digest
        self.registry.pin(self.digests[name])  # so that nothing has to be loaded when it is asked for

    def selection(self, mode: Mode = Mode.SWITCH, **weights: float) -> Selection:
        return Selection(tuple(SelectedAdapter(n, self.digests[n], w) for n, w in weights.items()), mode)

    def read(self, rows: Sequence[tuple[Selection, Sequence[int]]], types: Sequence[int] | None = None) -> list[Tensor]:
        """What the engine answers when all rows are there at once, before its first step."""
        answered: dict[str, Event] = {}
        done = threading.Event()

        def sink(event: Event) -> None:
            if isinstance(event, FinishedEvent | FailedEvent):
                answered[event.request_id] = event
                if len(answered) == len(rows):
                    done.set()

        pair = None if types is None else tuple(types)
        requests = [
            GenerationRequest(f"r{i}", tuple(ids), READ_ONCE, which, task=self.base.task, token_types=pair)
            for i, (which, ids) in enumerate(rows)
        ]
        self.engine.submit(requests, sink)
        self.engine.start()
        assert done.wait(60)
        events = [answered[request.request_id] for request in requests]
        assert all(isinstance(event, FinishedEvent) for event in events), events
        self.modes = [event.mode for event in events if isinstance(event, FinishedEvent)]
        return [torch.tensor(event.pooled) for event in events if isinstance(event, FinishedEvent)]


def make_bench(folder: Path, task: Task = Task.CLASSIFY, **options: Any) -> Bench:
    base = load_base(str(folder / "base"), device="cpu", task=task, **options)
    store = AdapterStore(folder / "data")
    registry = AdapterRegistry(store, base.adapted, base.identity, factor_budget=1 << 26, device=base.device)
    bench = Bench(base, registry, build_engine(base, registry))
    runner = bench.engine._worker._runner  # type: ignore[attr-defined]
    run = runner.run

    def watched(texts: Sequence[PooledText], batch: Any) -> Tensor:
        bench.batches.append([len(text.tokens) for text in texts])
        answer: Tensor = run(texts, batch)
        return answer

    runner.run = watched
    return bench


def family(model: PreTrainedModel, folder: Path, **spec: Any) -> dict[str, tuple[Path, int]]:
    """Eight adapters with 2 to 5 labels, every other one compact."""
    made = {}
    for i, labels in enumerate(LABELS):
        path = make_pool_adapter(model, HeadSpec(labels, compact=i % 2 == 0, seed=i, **spec), folder / f"a{i}")
        made[f"a{i}"] = path, labels
    return made


@pytest.mark.parametrize("arch", POOL_ARCHS)
def test_eight_heads_in_one_batch_are_pefts(arch: PoolArch, tmp_path: Path) -> None:
    model = tiny_classifier(arch)
    save_pool_model(model, arch, tmp_path / "base")
    adapters = family(model, tmp_path)
    bench = make_bench(tmp_path)
    for name, (path, _) in adapters.items():
        bench.register(name, path)
    rows = [(bench.selection(**{name: 1.0}), text) for name, text in zip(adapters, TEXTS, strict=True)]
    answers = bench.read(rows)
    bench.engine.stop()
    assert bench.batches == [sorted(map(len, TEXTS), reverse=True)], "not one batch"
    for (path, labels), text, answer in zip(adapters.values(), TEXTS, answers, strict=True):
        expected = peft_scores(model, path, labels, text)
        assert answer.shape == (labels,)
        torch.testing.assert_close(answer, expected, atol=TOLERANCE, rtol=TOLERANCE)
        torch.testing.assert_close(answer.softmax(-1), expected.softmax(-1), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("arch", POOL_ARCHS)
def test_a_base_without_a_head_serves_adapters_that_bring_theirs(arch: PoolArch, tmp_path: Path) -> None:
    """The base is the encoder alone, as it is published: what PEFT drew at random in its place must not matter."""
    model = tiny_classifier(arch)
    save_pool_model(model.base_model, arch, tmp_path / "base")
    adapters = family(model, tmp_path)
    bench = make_bench(tmp_path)
    assert bench.base.adapted.head is not None
    assert not bench.base.adapted.head.is_trained
    for name, (path, _) in adapters.items():
        bench.register(name, path)
    rows = [(bench.selection(**{name: 1.0}), text) for name, text in zip(adapters, TEXTS, strict=True)]
    answers = bench.read(rows)
    bench.engine.stop()
    for (path, labels), text, answer in zip(adapters.values(), TEXTS, answers, strict=True):
        torch.testing.assert_close(answer, peft_scores(model, path, labels, text), atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("arch", POOL_ARCHS)
def test_blends_and_the_base_beside_single_adapters(arch: PoolArch, tmp_path: Path) -> None:
    model = tiny_classifier(arch)
    save_pool_model(model, arch, tmp_path / "base")
    adapters = family(model, tmp_path)
    bench = make_bench(tmp_path)
    for name, (path, _) in adapters.items():
        bench.register(name, path)
    blends = [{"a0": 0.7, "a4": 0.4}, {"a1": 0.5, "a5": -0.3}, {}, {"a3": 1.0}]
    answers = bench.read([(bench.selection(**weights), text) for weights, text in zip(blends, TEXTS, strict=False)])
    bench.engine.stop()
    for weights, text, answer in zip(blends, TEXTS, answers, strict=False):
        expected = blended_scores(model, {adapters[name]: weight for name, weight in weights.items()}, text)
        torch.testing.assert_close(answer, expected, atol=5 * TOLERANCE, rtol=TOLERANCE)


@torch.inference_mode()
def blended_scores(model: PreTrainedModel, weights: dict[tuple[Path, int], float], text: Sequence[int]) -> Tensor:
    """By the dense weights: W0 + Σ w (W − W0), where a head with other labels than the base's has no W0."""
    if not weights:
        return peft_scores(model, None, 2, text)
    target = with_labels(model, next(iter(weights))[1])
    own = model.state_dict()
    members = [(dense(model, path, labels), weight) for (path, labels), weight in weights.items()]
    for name, parameter in target.named_parameters():
        origin = own[name] if own[name].shape == parameter.shape else torch.zeros_like(parameter)
        parts = [(member[name], weight) for member, weight in members if name in member]
        parameter.copy_(origin + sum(weight * (part - origin) for part, weight in parts))
    logits: Tensor = target(input_ids=torch.tensor([list(text)])).logits[0]
    return logits


def dense(model: PreTrainedModel, path: Path, labels: int) -> dict[str, Tensor]:
    """The parameters that an adapter changes, as PEFT computes them."""
    inner = peft_loaded(model, path, labels).base_model.model
    changed = {
        f"{name}.weight": module.base_layer.weight + module.get_delta_weight("default")
        for name, module in inner.named_modules()
        if hasattr(module, "get_delta_weight")
    }
    saved = load_file(path / "adapter_model.safetensors")
    prefix = "base_model.model."
    return changed | {k.removeprefix(prefix): v for k, v in saved.items() if k.startswith(prefix) and "vblora" not in k}


@pytest.mark.parametrize("arch", POOL_ARCHS)
def test_folded_it_answers_the_same(arch: PoolArch, tmp_path: Path) -> None:
    model = tiny_classifier(arch)
    save_pool_model(model, arch, tmp_path / "base")
    path = make_pool_adapter(model, HeadSpec(4, seed=9), tmp_path / "a")
    bench = make_bench(tmp_path)
    bench.register("a", path)
    adapted = bench.base.adapted
    layers = {name: adapted.base_layer(name) for name in adapted.modules.layers}
    pristine = {name: own_value(layer, "weight").clone() for name, layer in layers.items()}
    answers = bench.read([(bench.selection(Mode.MERGE, a=1.0), text) for text in TEXTS])
    bench.engine.stop()
    assert bench.modes == ["merge"] * len(TEXTS)
    changed = [name for name, layer in layers.items() if not torch.equal(own_value(layer, "weight"), pristine[name])]
    assert changed, "nothing was folded"
    for text, answer in zip(TEXTS, answers, strict=True):
        torch.testing.assert_close(answer, peft_scores(model, path, 4, text), atol=TOLERANCE, rtol=TOLERANCE)


def test_pairs_have_their_token_types(tmp_path: Path) -> None:
    model = tiny_classifier("bert")
    save_pool_model(model, "bert", tmp_path / "base")
    path = make_pool_adapter(model, HeadSpec(3, seed=2), tmp_path / "a")
    bench = make_bench(tmp_path)
    bench.register("a", path)
    text, types = [CLS, 20, 21, SEP, 30, 31, 32, SEP], [0, 0, 0, 0, 1, 1, 1, 1]
    (answer,) = bench.read([(bench.selection(a=1.0), text)], types)
    bench.engine.stop()
    expected = peft_scores(model, path, 3, text, token_type_ids=torch.tensor([types]))
    torch.testing.assert_close(answer, expected, atol=TOLERANCE, rtol=TOLERANCE)
    assert not torch.allclose(expected, peft_scores(model, path, 3, text), atol=1e-3), "types must matter"


def test_a_pooler_that_is_saved_counts(tmp_path: Path) -> None:
    model = tiny_classifier("bert")
    save_pool_model(model, "bert", tmp_path / "base")
    path = make_pool_adapter(model, HeadSpec(3, seed=2, modules_to_save=("pooler",)), tmp_path / "a")
    other = make_pool_adapter(model, HeadSpec(2, seed=3), tmp_path / "b")
    bench = make_bench(tmp_path)
    bench.register("a", path)
    bench.register("b", other)
    rows = [(bench.selection(a=1.0), TEXTS[0]), (bench.selection(b=1.0), TEXTS[1])]
    answers = bench.read(rows)
    bench.engine.stop()
    for (adapter, labels), text, answer in zip([(path, 3), (other, 2)], TEXTS, answers, strict=False):
        torch.testing.assert_close(answer, peft_scores(model, adapter, labels, text), atol=TOLERANCE, rtol=TOLERANCE)


def embedded(model: PreTrainedModel, path: Path | None, ids: Sequence[int], pooling: str, normalize: bool) -> Tensor:
    """PEFT's embedding of one text alone, by sentence-transformers' rules."""
    loaded = model if path is None else peft_loaded(model, path, None)
    with torch.inference_mode():
        states: Tensor = loaded(input_ids=torch.tensor([list(ids)])).last_hidden_state[0]
    vector = {"mean": states.mean(0), "cls": states[0], "last": states[-1]}[pooling]
    return vector / vector.norm() if normalize else vector


@pytest.mark.parametrize(("pooling", "normalize"), [("mean", True), ("cls", False), ("last", True)])
@pytest.mark.parametrize("arch", POOL_ARCHS)
def test_embeddings_in_one_batch_are_pefts(arch: PoolArch, pooling: str, normalize: bool, tmp_path: Path) -> None:
    model = tiny_encoder(arch)
    save_pool_model(model, arch, tmp_path / "base")
    paths = [make_pool_adapter(model, HeadSpec(None, compact=i % 2 == 0, seed=i), tmp_path / f"a{i}") for i in range(3)]
    bench = make_bench(tmp_path, Task.EMBED, pooling=Pooling(pooling), normalize=normalize)
    for i, path in enumerate(paths):
        bench.register(f"a{i}", path)
    rows = [({f"a{i % 4}": 1.0} if i % 4 < 3 else {}) for i in range(len(TEXTS))]
    answers = bench.read([(bench.selection(**weights), text) for weights, text in zip(rows, TEXTS, strict=True)])
    bench.engine.stop()
    assert len(bench.batches) == 1
    for i, (text, answer) in enumerate(zip(TEXTS, answers, strict=True)):
        expected = embedded(model, paths[i % 4] if i % 4 < 3 else None, text, pooling, normalize)
        torch.testing.assert_close(answer, expected, atol=TOLERANCE, rtol=TOLERANCE)


def test_without_a_padding_token_texts_of_one_length_run_together(tmp_path: Path) -> None:
    model = tiny_classifier("llama", pad_token_id=None)
    save_pool_model(model, "llama", tmp_path / "base")
    tokenizer = word_tokenizer("llama")
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path / "base")
    path = make_pool_adapter(model, HeadSpec(3, seed=1), tmp_path / "a")
    bench = make_bench(tmp_path)
    bench.register("a", path)
    texts = [*TEXTS[:3], TEXTS[0][::-1]]
    answers = bench.read([(bench.selection(a=1.0), text) for text in texts])
    bench.engine.stop()
    assert sorted(bench.batches) == [[3], [5, 5], [11]]
    for text, answer in zip(texts, answers, strict=True):
        torch.testing.assert_close(answer, peft_scores(model, path, 3, text), atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("arch", ["roberta", "llama"])
def test_plain_lora_heads_beside_vblora_ones(arch: PoolArch, tmp_path: Path) -> None:
    model = tiny_classifier(arch)
    save_pool_model(model, arch, tmp_path / "base")
    targets = ["query", "value"] if arch == "roberta" else ["q_proj", "v_proj"]
    config = LoraConfig(task_type=TaskType.SEQ_CLS, target_modules=targets, r=2, lora_alpha=8, init_lora_weights=False)
    with untouched_rng():
        torch.manual_seed(0)
        lora = get_peft_model(with_labels(model, 4), config).eval()
    lora.save_pretrained(str(tmp_path / "lora"))
    path = make_pool_adapter(model, HeadSpec(3, seed=5), tmp_path / "vblora")
    bench = make_bench(tmp_path)
    bench.register("lora", tmp_path / "lora")
    bench.register("vblora", path)
    rows = [(bench.selection(lora=1.0), TEXTS[0]), (bench.selection(vblora=1.0), TEXTS[1])]
    answers = bench.read(rows)
    bench.engine.stop()
    with torch.inference_mode():
        expected = lora(input_ids=torch.tensor([TEXTS[0]])).logits[0]
    torch.testing.assert_close(answers[0], expected, atol=TOLERANCE, rtol=TOLERANCE)
    torch.testing.assert_close(answers[1], peft_scores(model, path, 3, TEXTS[1]), atol=TOLERANCE, rtol=TOLERANCE)
