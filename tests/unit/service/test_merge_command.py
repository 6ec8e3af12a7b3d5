"""`vblora-serve merge`: transformers loads what it writes, and generates what the server and PEFT generate."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from adapters import sharded
from adapters.binding import replaced_parameters
from adapters.errors import InvalidSafetensors, InvalidSelection, MissingTensor, UnsupportedCheckpoint
from adapters.factors import AdapterFactors
from adapters.merge import Merger
from adapters.reading import read_adapter
from adapters.sharded import INDEX_FILE
from service.cli import main
from service.commands import CommandError, merge
from service.commands.blend import WeightedDirectory
from service.commands.merge import MergeOptions
from service.engine.base_model import load_base
from tests.factories import (
    AdapterSpec,
    Arch,
    byte_tokenizer,
    make_adapter,
    peft_greedy,
    peft_logits,
    peft_reference,
    rewrite,
    save_model,
    tiny_model,
)
from tests.lora_factory import make_lora
from tests.unit.adapters.support import PROMPT, adapted, alone, factors

ARCHS: list[Arch] = ["llama", "qwen2", "gpt2", "opt"]
ALL = [*ARCHS, "llama tied", "gpt2 untied"]
TOKENS = 12


def made(kind: str) -> PreTrainedModel:
    arch, _, tie = kind.partition(" ")
    return tiny_model(arch, **({"tie_word_embeddings": tie == "tied"} if tie else {}))  # type: ignore[arg-type]


def merged(
    output: Path, base: Path, *members: tuple[Path, float], dtype: str = "auto", shard_bytes: int = 1 << 30
) -> PreTrainedModel:
    """Merges, then loads the result as its users do: without a warning of weights that are missing or left over."""
    given = tuple(WeightedDirectory(path, weight) for path, weight in members)
    assert merge.run(MergeOptions(str(base), given, output, dtype, shard_bytes, (), as_json=False)) == 0
    model, info = AutoModelForCausalLM.from_pretrained(output, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


def greedy(model: PreTrainedModel) -> list[int]:
    return peft_greedy(model, PROMPT, TOKENS)


def served_greedy(base: Path, *members: tuple[Path, float]) -> list[int]:
    """What a server's model writes with the selection beside its weights."""
    model = load_base(str(base), dtype="float32", device="cpu").adapted
    present = [
        AdapterFactors(path.name, factors(path).layers, replaced_parameters(read_adapter(path).extras, model.tensor))
        for path, _ in members
    ]
    ids = list(PROMPT)
    with model.using(alone(*present, weights=[weight for _, weight in members])), torch.inference_mode():
        for _ in range(TOKENS):
            ids.append(int(model.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(PROMPT) :]


@pytest.mark.parametrize("kind", ALL)
def test_one_adapter_generates_what_peft_generates(kind: str, tmp_path: Path) -> None:
    model = made(kind)
    base = save_model(model, tmp_path / "base")
    adapter = make_adapter(model, AdapterSpec(seed=1, target_modules="all-linear"), tmp_path / "adapter")
    result = merged(tmp_path / "out", base, (adapter, 1.0))
    reference = peft_reference(model, adapter)
    torch.testing.assert_close(peft_logits(result, PROMPT), peft_logits(reference, PROMPT), rtol=0, atol=5e-4)
    assert greedy(result) == peft_greedy(reference, PROMPT, TOKENS) == served_greedy(base, (adapter, 1.0))
    assert greedy(result) != greedy(model)
    assert result.config.tie_word_embeddings == model.config.tie_word_embeddings


@pytest.mark.parametrize("kind", ALL)
def test_a_blend_with_saved_modules_and_biases_generates_what_the_server_generates(kind: str, tmp_path: Path) -> None:
    model = made(kind)
    base = save_model(model, tmp_path / "base")
    embedding = {"gpt2": "wte"}.get(kind.split()[0], "embed_tokens")
    norm = {"gpt2": "ln_1", "opt": "self_attn_layer_norm"}.get(kind.split()[0], "input_layernorm")
    specs = {
        "a": AdapterSpec(seed=1, bias="vblora_only", modules_to_save=[norm, "lm_head"]),
        "b": AdapterSpec(seed=2, r=2, topk=3, compact=False, vector_length=8, modules_to_save=[embedding]),
    }
    members = [
        (make_adapter(model, specs["a"], tmp_path / "a"), 0.7),
        (make_adapter(model, specs["b"], tmp_path / "b"), -0.4),
    ]
    result = merged(tmp_path / "out", base, *members)
    assert greedy(result) == served_greedy(base, *members)
    assert greedy(result) != greedy(model)
    assert result.config.tie_word_embeddings is False
    assert result.get_input_embeddings().weight is not result.get_output_embeddings().weight


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_plain_lora_alone_and_beside_vblora(kind: str, tmp_path: Path) -> None:
    model = made(kind)
    base = save_model(model, tmp_path / "base")
    vblora = make_adapter(model, AdapterSpec(seed=1), tmp_path / "vblora")
    lora = make_lora(model, tmp_path / "lora", target_modules="all-linear", lora_alpha=3, use_rslora=True)
    alone = merged(tmp_path / "alone", base, (lora, 1.0))
    reference = peft_reference(model, lora)
    torch.testing.assert_close(peft_logits(alone, PROMPT), peft_logits(reference, PROMPT), rtol=0, atol=5e-4)
    assert greedy(alone) == peft_greedy(reference, PROMPT, TOKENS) != greedy(model)
    both = merged(tmp_path / "both", base, (vblora, 0.6), (lora, -0.8))
    assert greedy(both) == served_greedy(base, (vblora, 0.6), (lora, -0.8))
    assert len({tuple(greedy(each)) for each in (model, alone, both)}) == 3


class TestTied:
    """An adapter on one side of a shared weight leaves the other as it was."""

    @pytest.fixture(params=ARCHS)
    def tied(self, request: pytest.FixtureRequest) -> PreTrainedModel:
        return tiny_model(request.param, tie_word_embeddings=True)

    def test_an_adapted_output_layer(self, tied: PreTrainedModel, tmp_path: Path) -> None:
        base = save_model(tied, tmp_path / "base")
        arch = tied.config.model_type
        first = "c_attn" if arch == "gpt2" else "q_proj"
        spec = AdapterSpec(seed=1, target_modules=[first, "lm_head"])
        adapter = make_adapter(tiny_model(arch, tie_word_embeddings=False), spec, tmp_path / "adapter")
        # trained on the untied model of the same weights, which stores an output layer of its own
        adapter = rewrite(adapter, tmp_path / "bare", tensors=_without_own_weights)
        result = merged(tmp_path / "out", base, (adapter, 1.0))
        assert torch.equal(result.get_input_embeddings().weight, tied.get_input_embeddings().weight)
        assert not torch.equal(result.get_output_embeddings().weight, tied.get_input_embeddings().weight)
        assert greedy(result) == served_greedy(base, (adapter, 1.0))
        config = json.loads((tmp_path / "out" / "config.json").read_text())
        assert config["tie_word_embeddings"] is False

    @pytest.mark.parametrize("side", ["input", "output"])
    def test_a_saved_side(self, tied: PreTrainedModel, side: str, tmp_path: Path) -> None:
        base = save_model(tied, tmp_path / "base")
        embedding = "wte" if tied.config.model_type == "gpt2" else "embed_tokens"
        spec = AdapterSpec(seed=1, modules_to_save=[embedding if side == "input" else "lm_head"])
        adapter = make_adapter(tied, spec, tmp_path / "adapter")
        result = merged(tmp_path / "out", base, (adapter, 1.0))
        own = tied.get_input_embeddings().weight
        changed = result.get_input_embeddings() if side == "input" else result.get_output_embeddings()
        kept = result.get_output_embeddings() if side == "input" else result.get_input_embeddings()
        assert torch.equal(kept.weight, own)
        assert not torch.equal(changed.weight, own)
        assert greedy(result) == served_greedy(base, (adapter, 1.0))

    def test_an_output_layer_that_peft_stores_unasked_unties_nothing(
        self, tied: PreTrainedModel, tmp_path: Path
    ) -> None:
        base = save_model(tied, tmp_path / "base")
        adapter = make_adapter(tied, AdapterSpec(seed=1, save_embedding_layers=True), tmp_path / "adapter")
        result = merged(tmp_path / "out", base, (adapter, 1.0))
        assert result.config.tie_word_embeddings
        assert result.get_input_embeddings().weight is result.get_output_embeddings().weight
        assert greedy(result) == served_greedy(base, (adapter, 1.0))


def _without_own_weights(tensors: dict[str, Any]) -> None:
    for key in [key for key in tensors if key.endswith("base_layer.weight")]:
        del tensors[key]


# --- one model and two adapters -------------------------------------------------------------------


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def base(model: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(model, tmp_path_factory.mktemp("model") / "base")


@pytest.fixture(scope="module")
def adapter(model: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(model, AdapterSpec(seed=1), tmp_path_factory.mktemp("adapters") / "one")


@pytest.fixture(scope="module")
def other(model: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    spec = AdapterSpec(seed=2, target_modules="all-linear", base_model_name_or_path="org/their-base")
    return make_adapter(model, spec, tmp_path_factory.mktemp("adapters") / "two")


def options(base: Path, output: Path, *members: Path, **changed: Any) -> MergeOptions:
    given = tuple(WeightedDirectory(path) for path in members)
    fields: dict[str, Any] = {"dtype": "auto", "shard_bytes": 1 << 30, "base_aliases": (), "as_json": True}
    return MergeOptions(model=str(base), members=given, output=output, **{**fields, **changed})


class TestTheDirectory:
    def test_what_is_reported(
        self, base: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        out = tmp_path / "out"
        words = [f"{adapter}:0.7", f"{adapter}:-0.2", "--model", str(base), "--output", str(out), "--dtype", "bfloat16"]
        assert main(["merge", *words, "--shard-size", "64KB", "--json"]) == 0
        report = json.loads(capsys.readouterr().out)
        assert [(each["name"], each["weight"]) for each in report["adapters"]] == [("one", 0.7), ("one", -0.2)]
        assert report["dtype"] == "bfloat16"
        assert not report["untied"]
        assert 0 < report["merge_error"] < 0.1
        assert report["files"] == sorted(path.name for path in out.glob("*.safetensors"))
        assert len(report["files"]) > 3
        assert AutoModelForCausalLM.from_pretrained(out).dtype is torch.bfloat16
        assert list(tmp_path.iterdir()) == [out]

        assert main(["merge", str(adapter), "--model", str(base), "--output", str(tmp_path / "again")]) == 0
        printed = capsys.readouterr()
        assert "rounding error" in printed.out
        assert "\x1b" not in printed.err

    def test_shards_are_no_larger_than_asked_for(self, base: Path, adapter: Path, tmp_path: Path) -> None:
        result = merged(tmp_path / "out", base, (adapter, 1.0), shard_bytes=50_000)
        index = json.loads((tmp_path / "out" / INDEX_FILE).read_text())
        sizes, seen = [], {}
        for name in set(index["weight_map"].values()):
            tensors = load_file(tmp_path / "out" / name)
            seen.update(dict.fromkeys(tensors, name))
            sizes.append((sum(tensor.nbytes for tensor in tensors.values()), len(tensors)))
        assert all(size <= 50_000 or count == 1 for size, count in sizes)
        assert seen == index["weight_map"]
        assert index["metadata"]["total_size"] == sum(size for size, _ in sizes)
        whole = merged(tmp_path / "whole", base, (adapter, 1.0))
        assert all(torch.equal(a, b) for a, b in zip(result.parameters(), whole.parameters(), strict=True))

    def test_tokenizer_and_generation_config_come_along(self, base: Path, adapter: Path, tmp_path: Path) -> None:
        source = shutil.copytree(base, tmp_path / "base")
        (source / "modeling_evil.py").write_text("raise SystemExit")
        (source / "pytorch_model.bin").write_bytes(b"x")
        (source / "LICENSE").write_text("free")
        merged(tmp_path / "out", source, (adapter, 1.0))
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
        assert tokenizer("mixed").input_ids == byte_tokenizer()("mixed").input_ids
        assert tokenizer.chat_template == byte_tokenizer().chat_template
        kept = {path.name for path in source.iterdir()} - {"modeling_evil.py", "pytorch_model.bin", "model.safetensors"}
        written = {path.name for path in (tmp_path / "out").iterdir()}
        assert written == kept | {INDEX_FILE, "model-00001-of-00001.safetensors"}

    def test_the_adapters_chat_template(
        self, base: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """As on a server: the adapters' own, if they agree."""
        mine, yours = (shutil.copytree(adapter, tmp_path / name) for name in ("mine", "yours"))
        (mine / "chat_template.jinja").write_text("mine {{ messages[0].content }}")
        merged(tmp_path / "out", base, (mine, 0.5), (adapter, 0.5))
        assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == "mine {{ messages[0].content }}"
        (yours / "chat_template.jinja").write_text("yours")
        capsys.readouterr()
        merged(tmp_path / "both", base, (mine, 0.5), (yours, 0.5))
        assert "different chat templates" in capsys.readouterr().err
        assert AutoTokenizer.from_pretrained(tmp_path / "both").chat_template == byte_tokenizer().chat_template

    def test_a_checkpoint_that_leaves_the_prefix_out(self, tmp_path: Path) -> None:
        """GPT-2's own, of the Hub, does, and holds buffers besides."""
        gpt2 = tiny_model("gpt2")
        base = save_model(gpt2, tmp_path / "base")
        adapter = make_adapter(gpt2, AdapterSpec(seed=1, modules_to_save=["lm_head"]), tmp_path / "adapter")
        expected = greedy(merged(tmp_path / "expected", base, (adapter, 1.0)))
        stored = load_file(base / "model.safetensors")
        bare = {name.removeprefix("transformer."): tensor for name, tensor in stored.items()}
        bare["h.0.attn.bias"] = torch.ones(1, 1, 4, 4, dtype=torch.uint8)
        save_file(bare, base / "model.safetensors", metadata={"format": "pt"})
        assert merge.run(options(base, tmp_path / "out", adapter)) == 0
        result = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
        assert greedy(result) == expected

    def test_a_base_that_is_sharded(self, model: PreTrainedModel, adapter: Path, tmp_path: Path) -> None:
        model.save_pretrained(tmp_path / "base", max_shard_size="60KB")
        assert not (tmp_path / "base" / "model.safetensors").exists()
        result = merged(tmp_path / "out", tmp_path / "base", (adapter, 1.0))
        assert greedy(result) == peft_greedy(peft_reference(model, adapter), PROMPT, TOKENS)


class TestRounding:
    @pytest.mark.parametrize("arch", ["llama", "gpt2"])
    def test_a_base_of_16_bits_is_folded_as_the_server_folds_it(self, arch: Arch, tmp_path: Path) -> None:
        model = tiny_model(arch).to(torch.bfloat16)
        base = save_model(model, tmp_path / "base")
        adapter = make_adapter(tiny_model(arch), AdapterSpec(seed=1, bank_bound=0.1), tmp_path / "adapter")
        server = adapted(model, torch.bfloat16)
        merger, selection = Merger(server), [(factors(adapter), 0.5)]
        merger.fold(selection)
        given = (WeightedDirectory(adapter, 0.5),)
        assert merge.run(MergeOptions(str(base), given, tmp_path / "out", "auto", 1 << 30, (), as_json=True)) == 0
        result = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        assert result.dtype is torch.bfloat16
        for name in selection[0][0].layers:
            theirs, ours = server.base_layer(name).weight, result.get_submodule(name).weight
            assert (theirs != ours).float().mean() < 1e-3, "a sum of four products may be rounded the other way"
            torch.testing.assert_close(ours, theirs, rtol=2**-7, atol=0)

    @pytest.mark.parametrize(("dtype", "least", "most"), [("float32", 0, 1e-5), ("bfloat16", 0.01, 0.5)])
    def test_the_error_is_that_of_the_worst_layer(
        self, dtype: str, least: float, most: float, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
        model: PreTrainedModel,
    ) -> None:  # fmt: skip
        small = make_adapter(model, AdapterSpec(seed=1, bank_bound=0.1), tmp_path / "small")
        assert merge.run(options(base, tmp_path / "out", small, dtype=dtype)) == 0
        report = json.loads(capsys.readouterr().out)
        result = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).requires_grad_(False)
        errors = {}
        for name, layer in factors(small).layers.items():
            change = (layer.b_t.double().T @ layer.a.double()).float()
            lost = result.get_submodule(name).weight - model.get_submodule(name).weight.detach() - change
            errors[name] = float(lost.norm() / change.norm())
        assert report["merge_error"] == pytest.approx(max(errors.values()), rel=0.05)
        assert least <= report["merge_error"] < most
        assert dtype == "float32" or report["merge_error_layer"] == max(errors, key=lambda name: errors[name])

    def test_a_large_tensor_is_folded_in_parts(
        self, base: Path, other: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        aliases = ("org/their-base",)
        assert merge.run(options(base, tmp_path / "whole", other, base_aliases=aliases)) == 0
        monkeypatch.setattr("adapters.merged_model._FOLDED_AT_ONCE", 1000)
        assert merge.run(options(base, tmp_path / "parts", other, base_aliases=aliases)) == 0
        whole, parts = (load_file(next((tmp_path / name).glob("*.safetensors"))) for name in ("whole", "parts"))
        for name, tensor in whole.items():
            torch.testing.assert_close(parts[name], tensor, rtol=0, atol=1e-6)


class TestRefusals:
    """One line says why, and nothing is left behind."""

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["/none"], "/none is not a directory"),
            (["{adapter}:inf"], "is inf; give a finite number"),
            (["{adapter}:nan"], "is nan; give a finite number"),
            (["{other}"], "add --base-alias org/their-base"),
            (["{base}"], "no adapter_config.json"),
            (["{adapter}", "--model", "/none/at/all"], "there is no directory /none/at/all"),
            (["{adapter}:1e30", "--dtype", "float16"], "overflows torch.float16 when folded into"),
        ],
    )
    def test_what_cannot_be_merged(
        self, words: list[str], message: str, base: Path, adapter: Path, other: Path, tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:  # fmt: skip
        given = [word.format(adapter=adapter, other=other, base=base) for word in words]
        model = [] if "--model" in given else ["--model", str(base)]
        assert main(["merge", *given, *model, "--output", str(tmp_path / "out")]) == 1
        printed = capsys.readouterr()
        assert message in printed.err
        assert (printed.out, printed.err.count("\n")) == ("", 1)
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize("size", ["0", "much", "-1GB"])
    def test_the_shard_size(self, size: str, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["merge", "a", "--model", "m", "--output", "o", f"--shard-size={size}"]) == 2
        assert "--shard-size is" in capsys.readouterr().err

    def test_nothing_is_overwritten(self, base: Path, adapter: Path) -> None:
        before = sorted(adapter.iterdir())
        with pytest.raises(FileExistsError):
            merge.run(options(base, adapter, adapter))
        assert sorted(adapter.iterdir()) == before

    def test_an_error_in_the_middle_leaves_nothing(
        self, base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "out").mkdir()
        write, files = sharded._write_file, []

        def full_disk(path: Path, *rest: Any) -> None:
            files.append(path)
            if len(files) == 3:
                raise OSError("no space")
            write(path, *rest)

        monkeypatch.setattr(sharded, "_write_file", full_disk)
        with pytest.raises(OSError, match="no space"):
            merge.run(options(base, tmp_path / "out", adapter, shard_bytes=50_000))
        assert files[0].parent.parent == tmp_path
        assert [list(path.iterdir()) for path in tmp_path.iterdir()] == [[]]

    def test_a_quantized_base(self, base: Path, adapter: Path, tmp_path: Path) -> None:
        source = shutil.copytree(base, tmp_path / "base")
        config = json.loads((source / "config.json").read_text())
        (source / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
        with pytest.raises(CommandError, match="quantized"):
            merge.run(options(source, tmp_path / "out", adapter))

    @pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
    def test_weights_that_are_quantized(self, dtype: torch.dtype, base: Path, adapter: Path, tmp_path: Path) -> None:
        source = shutil.copytree(base, tmp_path / "base")
        tensors = load_file(source / "model.safetensors")
        name = "model.layers.1.self_attn.v_proj.weight"
        save_file({**tensors, name: tensors[name].to(dtype)}, source / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises((InvalidSelection, UnsupportedCheckpoint), match="quantized"):
            merge.run(options(source, tmp_path / "out", adapter))

    def test_weights_under_other_names(self, base: Path, adapter: Path, tmp_path: Path) -> None:
        source = shutil.copytree(base, tmp_path / "base")
        tensors = load_file(source / "model.safetensors")
        renamed = {name.replace("v_proj.weight", "v_proj.qweight"): tensor for name, tensor in tensors.items()}
        save_file(renamed, source / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(InvalidSelection, match=r"v_proj\.weight', which the base's files do not hold"):
            merge.run(options(source, tmp_path / "out", adapter))

    def test_pickled_weights(self, base: Path, adapter: Path, tmp_path: Path) -> None:
        source = shutil.copytree(base, tmp_path / "base")
        (source / "model.safetensors").rename(source / "pytorch_model.bin")
        with pytest.raises(UnsupportedCheckpoint, match=r"pytorch_model\.bin.* are not read"):
            merge.run(options(source, tmp_path / "out", adapter))

    @pytest.mark.parametrize(
        ("index", "error"),
        [
            ({"weight_map": {"a": "../base/model.safetensors"}}, MissingTensor),
            ({"weight_map": {"a": "lost.safetensors"}}, MissingTensor),
            ({"weight_map": {"a": 1}}, InvalidSafetensors),
            ({}, InvalidSafetensors),
            ([], InvalidSafetensors),
        ],
    )
    def test_a_damaged_index(
        self, index: Any, error: type[Exception], base: Path, adapter: Path, tmp_path: Path
    ) -> None:
        source = shutil.copytree(base, tmp_path / "base")
        (source / "model.safetensors").rename(source / "other.safetensors")
        (source / INDEX_FILE).write_text(json.dumps(index))
        with pytest.raises(error):
            merge.run(options(source, tmp_path / "out", adapter))

    def test_a_damaged_file(self, base: Path, adapter: Path, tmp_path: Path) -> None:
        source = shutil.copytree(base, tmp_path / "base")
        whole = (source / "model.safetensors").read_bytes()
        (source / "model.safetensors").write_bytes(whole[:-100])
        with pytest.raises(InvalidSafetensors, match=r"model\.safetensors cannot be read"):
            merge.run(options(source, tmp_path / "out", adapter))


class TestFromTheHub:
    def test_the_snapshot_of_the_cache(
        self, base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        cached = tmp_path / "cache" / "models--org--name"
        commit = "0123456789abcdef0123456789abcdef01234567"
        shutil.copytree(base, cached / "snapshots" / commit)
        (cached / "refs").mkdir()
        (cached / "refs" / "main").write_text(commit)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        result = merged(tmp_path / "out", Path("org/name"), (adapter, 1.0))
        assert torch.equal(result.lm_head.weight, AutoModelForCausalLM.from_pretrained(base).lm_head.weight)

    def test_one_that_is_not_there(self, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        with pytest.raises(CommandError, match="cannot get the base model 'org/none' from the Hub"):
            merge.run(options(Path("org/none"), tmp_path / "out", adapter))


MEASURED = """
import re, sys
from pathlib import Path
from tests.unit.service.test_merge_command import options
from service.commands import merge
from safetensors.torch import load_file

def peak():
    # Not getrusage: its peak is inherited from the process that started this one.
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

small, small_adapter, large, large_adapter, out = map(Path, sys.argv[1:])
merge.run(options(small, out / "small", small_adapter))
before = peak()
merge.run(options(large, out / "large", large_adapter, dtype="bfloat16", shard_bytes=100 << 20))
merged = peak()
held = [tensor.clone() for path in large.glob("*.safetensors") for tensor in load_file(path).values()]
print(merged - before, peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of memory is read from Linux")
def test_memory_is_that_of_a_tensor_not_of_the_model(base: Path, adapter: Path, tmp_path: Path) -> None:
    """A model of 200 MB: merging takes what a few tensors take, where loading the files takes them all."""
    shape = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 22, "vocab_size": 4096}
    large = tiny_model("llama", num_attention_heads=8, **shape)
    large.save_pretrained(tmp_path / "large", max_shard_size="60MB")
    size = sum(path.stat().st_size for path in (tmp_path / "large").glob("*.safetensors"))
    assert size > 200e6
    spec = AdapterSpec(seed=1, vector_length=64, target_modules=["q_proj", "down_proj", "lm_head"])
    large_adapter = make_adapter(large, spec, tmp_path / "with-its-own-head")
    large_adapter = rewrite(large_adapter, tmp_path / "adapter", tensors=_without_own_weights)
    words = [base, adapter, tmp_path / "large", large_adapter, tmp_path / "out"]
    done = subprocess.run([sys.executable, "-c", MEASURED, *words], capture_output=True, text=True, check=True)
    merging, loading = map(int, done.stdout.split()[-2:])
    assert merging < size / 3
    assert loading > 0.9 * size, "what is measured grows with what is held"
