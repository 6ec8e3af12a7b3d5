"""Loading a base for a task that pools, what its files say, and the test of how texts may be read together."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from adapters.layers import AdaptedModel
from adapters.targets import BaseModules
from service.engine.base_model import BaseModelError, LoadedBase, load_base
from service.engine.pooling.runner import embeddings
from service.engine.pooling.self_test import choose_pooling_runner
from service.engine.pooling.tokenizer import PairTokenizer
from service.engine.task import Pooling, Task
from tests.pooling_factory import (
    CONTEXT,
    PAD,
    POOL_ARCHS,
    VOCABULARY,
    PoolArch,
    save_pool_model,
    tiny_classifier,
    tiny_encoder,
    word_tokenizer,
)

WEIGHTS = "model.safetensors"
LETTERS = "abcdefghijklmnopqrstuvwxyz"
CUT = [
    ("abc", LETTERS), (LETTERS, "xy"), (LETTERS, None), ("ab", ""), ("", LETTERS), (LETTERS, LETTERS),
    (LETTERS, LETTERS[1:]), (LETTERS[1:], LETTERS), (LETTERS * 9, LETTERS), (LETTERS, LETTERS * 9),
]  # fmt: skip


def load(path: Path, task: Task, **options: Any) -> LoadedBase:
    return load_base(str(path), device="cpu", task=task, **options)


class TestHeads:
    @pytest.mark.parametrize("arch", POOL_ARCHS)
    def test_the_last_layer_beside_the_encoder(self, arch: PoolArch, tmp_path: Path) -> None:
        model = tiny_classifier(arch, num_labels=3)
        save_pool_model(model, arch, tmp_path / "whole")
        head = load(tmp_path / "whole", Task.CLASSIFY).adapted.head
        assert head is not None
        assert (head.output, head.labels, head.is_trained) == (
            {"bert": "classifier", "roberta": "classifier.out_proj"}.get(arch, "score"), 3, True,
        )  # fmt: skip

    @pytest.mark.parametrize("arch", POOL_ARCHS)
    def test_what_is_missing_is_zeros_and_one_base_is_the_same_twice(self, arch: PoolArch, tmp_path: Path) -> None:
        save_pool_model(tiny_classifier(arch).base_model, arch, tmp_path / "bare")
        torch.manual_seed(0)
        first = load(tmp_path / "bare", Task.CLASSIFY)
        torch.manual_seed(1)
        second = load(tmp_path / "bare", Task.CLASSIFY)
        assert first.fingerprint == second.fingerprint
        head = first.adapted.head
        assert head is not None
        assert f"{head.output}.weight" in head.untrained
        for name in head.untrained:
            own = first.adapted.tensor(name)
            assert own is not None
            assert not own.any(), name

    def test_weights_of_the_encoder_that_are_missing_are_an_error(self, tmp_path: Path) -> None:
        save_pool_model(tiny_classifier("bert"), "bert", tmp_path)
        kept = {k: v for k, v in load_file(tmp_path / WEIGHTS).items() if "layer.1.output.dense" not in k}
        save_file(kept, tmp_path / WEIGHTS, metadata={"format": "pt"})
        for task in (Task.CLASSIFY, Task.EMBED):
            with pytest.raises(BaseModelError, match=r"layer\.1\.output\.dense"):
                load(tmp_path, task)

    def test_a_missing_pooler_is_for_adapters_to_bring(self, tmp_path: Path) -> None:
        save_pool_model(tiny_classifier("bert"), "bert", tmp_path)
        kept = {k: v for k, v in load_file(tmp_path / WEIGHTS).items() if "pooler" not in k}
        save_file(kept, tmp_path / WEIGHTS, metadata={"format": "pt"})
        head = load(tmp_path, Task.CLASSIFY).adapted.head
        assert head is not None
        assert head.untrained == {"bert.pooler.dense.weight", "bert.pooler.dense.bias"}
        assert load(tmp_path, Task.EMBED).pooled is not None, "an embedding does not go through it"

    def test_labels_of_the_config(self, tmp_path: Path) -> None:
        save_pool_model(tiny_classifier("bert", id2label={0: "no", 1: "yes"}), "bert", tmp_path / "named")
        save_pool_model(tiny_classifier("bert"), "bert", tmp_path / "plain")
        named, plain = (load(tmp_path / name, Task.CLASSIFY).pooled for name in ("named", "plain"))
        assert named is not None
        assert plain is not None
        assert (named.labels, plain.labels) == (("no", "yes"), None)


class TestFiles:
    @pytest.fixture
    def base(self, tmp_path: Path) -> Path:
        return save_pool_model(tiny_encoder("bert"), "bert", tmp_path / "base")

    def read(self, base: Path, **options: Any) -> tuple[Pooling, bool]:
        pooled = load(base, Task.EMBED, **options).pooled
        assert pooled is not None
        return pooled.pooling, pooled.normalize

    def write(self, base: Path, name: str, value: Any) -> None:
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_text(json.dumps(value))

    @pytest.mark.parametrize(
        ("config", "pooling"),
        [
            ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, Pooling.CLS),
            ({"pooling_mode_mean_tokens": True, "word_embedding_dimension": 32}, Pooling.MEAN),
            ({"pooling_mode_lasttoken": True}, Pooling.LAST),
            ({"pooling_mode": "cls"}, Pooling.CLS),
        ],
    )
    def test_pooling(self, base: Path, config: dict[str, Any], pooling: Pooling) -> None:
        self.write(base, "1_Pooling/config.json", config)
        assert self.read(base) == (pooling, True)
        assert self.read(base, pooling=Pooling.LAST, normalize=False) == (Pooling.LAST, False)

    @pytest.mark.parametrize("config", [{"pooling_mode_max_tokens": True}, {"pooling_mode": "max"}, {}])
    def test_a_pooling_that_is_not_offered(self, base: Path, config: dict[str, Any]) -> None:
        self.write(base, "1_Pooling/config.json", config)
        with pytest.raises(BaseModelError, match="--pooling"):
            load(base, Task.EMBED)
        assert self.read(base, pooling=Pooling.CLS)[0] is Pooling.CLS

    def test_normalize(self, base: Path) -> None:
        modules = [
            {"type": "sentence_transformers.models.Transformer"},
            {"type": "sentence_transformers.models.Pooling"},
        ]
        self.write(base, "modules.json", modules)
        assert self.read(base)[1] is False
        self.write(base, "modules.json", [*modules, {"type": "sentence_transformers.models.Normalize"}])
        assert self.read(base)[1] is True

    def test_lengths(self, base: Path, tmp_path: Path) -> None:
        loaded = load(base, Task.EMBED)
        assert (loaded.context, loaded.usual_context) == (CONTEXT, CONTEXT)
        self.write(base, "sentence_bert_config.json", {"max_seq_length": 20})
        loaded = load(base, Task.EMBED)
        assert (loaded.context, loaded.usual_context) == (CONTEXT, 20)
        save_pool_model(tiny_encoder("roberta"), "roberta", tmp_path / "roberta")
        loaded = load(tmp_path / "roberta", Task.EMBED)
        assert loaded.context == CONTEXT, "its table begins behind the padding"

    def test_files_that_cannot_be_read(self, base: Path) -> None:
        (base / "modules.json").write_text("{")
        with pytest.raises(BaseModelError, match=r"modules\.json"):
            load(base, Task.EMBED)

    @pytest.mark.parametrize("arch", ["llama", "qwen2"])
    def test_decoders_take_the_last_token(self, arch: PoolArch, tmp_path: Path) -> None:
        save_pool_model(tiny_encoder(arch), arch, tmp_path)
        assert self.read(tmp_path) == (Pooling.LAST, True)


class TestTokenizer:
    def test_as_in_training(self) -> None:
        tokenizer, encoder = word_tokenizer("bert"), PairTokenizer(word_tokenizer("bert"))
        for text, pair in (("abc", None), ("abc", "de"), ("", None)):
            for limit in (None, 5):
                cut = {} if limit is None else {"truncation": True, "max_length": limit}
                encoded, expected = encoder.encode(text, pair, limit=limit), tokenizer(text, pair, **cut)
                assert list(encoded.ids) == expected["input_ids"]
                assert list(encoded.types or [0] * len(encoded.ids)) == expected["token_type_ids"]

    @pytest.mark.parametrize("side", ["left", "right"])
    @pytest.mark.parametrize("arch", POOL_ARCHS)
    def test_cut_as_the_tokenizer_itself_does(self, arch: PoolArch, side: str) -> None:
        """Whatever the file says of lengths, as sentence-transformers' do."""
        tokenizer = word_tokenizer(arch)
        tokenizer.truncation_side = side
        tokenizer.backend_tokenizer.enable_truncation(3)
        tokenizer.backend_tokenizer.enable_padding(length=9)
        encoder = PairTokenizer(tokenizer)
        for limit in range(5, 20):
            for text, pair in CUT:
                encoded = encoder.encode(text, pair, limit=limit)
                expected = tokenizer(text, pair, truncation=True, max_length=limit)
                assert list(encoded.ids) == expected["input_ids"]
                types = expected.get("token_type_ids")
                assert list(encoded.types or [0] * len(encoded.ids)) == (types or [0] * len(encoded.ids))

    @pytest.mark.parametrize("limit", [None, 5])
    def test_a_text_that_takes_long_holds_nobody_up(self, limit: int | None) -> None:
        encoder = PairTokenizer(word_tokenizer("bert"))
        slow = Slow(encoder._whole)
        encoder._whole = slow
        with ThreadPoolExecutor(1) as pool:
            waits = pool.submit(encoder.encode, "slow", limit=limit)
            assert slow.reading.wait(20)
            assert len(encoder.encode("abcdefgh", limit=limit).ids) == (limit or 10)
            assert not waits.done()
            slow.go_on.set()
            assert len(waits.result(20).ids) == (limit or 6)

    def test_a_limit_that_holds_no_text(self) -> None:
        with pytest.raises(ValueError, match="2 of them are special"):
            PairTokenizer(word_tokenizer("bert")).encode("abc", limit=2)

    def test_cutting_and_not_at_once(self) -> None:
        encoder = PairTokenizer(word_tokenizer("bert"))
        cases = [("abcdefgh" * 4, None if i % 2 else 5) for i in range(400)]
        with ThreadPoolExecutor(8) as pool:
            lengths = list(pool.map(lambda case: len(encoder.encode(case[0], limit=case[1]).ids), cases))
        assert lengths == [34 if i % 2 else 5 for i in range(400)]


class Slow:
    """A tokenizer that does not come to the end of the text `slow` before it is told to go on."""

    is_fast = True

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.reading, self.go_on = threading.Event(), threading.Event()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    @property
    def backend_tokenizer(self) -> Slow:
        return self

    def __call__(self, text: str, pair: str | None) -> Any:
        self._wait(text)
        return self._tokenizer(text, pair)

    def encode_batch_fast(self, texts: list[str], **options: Any) -> Any:
        self._wait(texts[0])
        return self._tokenizer.backend_tokenizer.encode_batch_fast(texts, **options)

    def _wait(self, text: str) -> None:
        if text == "slow":
            self.reading.set()
            assert self.go_on.wait(20)


class Odd(nn.Module):
    """An encoder that answers each token's embedding, unless it is asked in a way that it cannot take.

    `spoils` says when it answers wrongly: by the number of rows and whether there is padding.
    """

    def __init__(self, spoils: Any) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 8)
        self.spoils = spoils
        self.seen: list[Sequence[int]] = []

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        padded = attention_mask is not None and bool((attention_mask == 0).any())
        self.seen.append(input_ids.shape)
        states = self.embedding(input_ids)
        if self.spoils(len(input_ids), padded):
            states = states + 1
        return type("Output", (), {"last_hidden_state": states})


@pytest.mark.parametrize(
    ("spoils", "chosen"),
    [
        (lambda rows, padded: False, (True, True)),
        (lambda rows, padded: padded, (False, True)),
        (lambda rows, padded: rows > 1, (False, False)),
    ],
)
def test_how_texts_are_read_follows_from_what_is_right(spoils: Any, chosen: tuple[bool, bool]) -> None:
    model = Odd(spoils)
    adapted = AdaptedModel(model, BaseModules.of(model, model_type="odd"))
    runner, together = choose_pooling_runner(
        adapted, torch.device("cpu"), VOCABULARY, embeddings(Pooling.MEAN, normalize=False), PAD
    )
    assert (runner.ragged, together) == chosen


def test_a_model_that_cannot_read_a_text() -> None:
    class Broken(Odd):
        def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
            raise ValueError("decoder_input_ids are missing")

    model = Broken(None)
    adapted = AdaptedModel(model, BaseModules.of(model, model_type="odd"))
    readout = embeddings(Pooling.MEAN, normalize=False)
    with pytest.raises(BaseModelError, match="decoder_input_ids"):
        choose_pooling_runner(adapted, torch.device("cpu"), VOCABULARY, readout, PAD)


def test_what_stands_at_padding_is_nobodys() -> None:
    states = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    spoilt = states.clone()
    spoilt[1, 2:] = torch.nan
    output = type("Output", (), {"last_hidden_state": spoilt})
    expected = {
        Pooling.MEAN: [states[0].mean(0), states[1, :2].mean(0)],
        Pooling.CLS: [states[0, 0], states[1, 0]],
        Pooling.LAST: [states[0, 3], states[1, 1]],
    }
    for pooling, vectors in expected.items():
        for normalize in (False, True):
            answer = embeddings(pooling, normalize=normalize)(output, mask)
            wanted = torch.stack(vectors)
            torch.testing.assert_close(answer, F.normalize(wanted, dim=-1) if normalize else wanted)
