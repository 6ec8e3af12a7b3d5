"""Quantized bases on a CPU: adapters beside them, in mixed batches, answer what PEFT answers over the same base."""

from __future__ import annotations

import queue
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from adapters.errors import MergeUnsupported, UnsupportedCheckpoint
from adapters.factors import AdapterFactors
from adapters.low_rank import LowRankBatch
from adapters.merge import Merger
from adapters.registry import AdapterRegistry
from adapters.store import AdapterStore
from service.engine import quantization
from service.engine.base_model import BaseModelError, LoadedBase, fingerprint_of, load_base, load_pretrained
from service.engine.build import EngineOptions, build_engine
from service.engine.engine import BatchEngine
from service.engine.events import Event, FailedEvent, FinishedEvent, TokenEvent
from service.engine.selection import SelectedAdapter, Selection
from service.engine.self_test import choose_runner
from service.engine.sequence import GenerationRequest, SamplingParams
from tests.factories import AdapterSpec, Arch, make_adapter, peft_greedy, peft_logits, save_model, tiny_model
from tests.unit.adapters.support import factors

pytest.importorskip("bitsandbytes")
pytest.importorskip("torchao")

CPU = torch.device("cpu")
TOKENS = 8
PROMPTS = [list(b"once upon"), list(b"q"), list(b"a longer prompt than the others"), list(b"and one more")]
CASES: list[tuple[Arch, str]] = [
    ("llama", "int8"), ("llama", "nf4"), ("qwen2", "int8"), ("qwen2", "nf4"), ("gpt2", "nf4"),
]  # fmt: skip


@dataclass(frozen=True)
class Bench:
    """A model on disk, how it is to be quantized, and two adapters that PEFT made of the plain model."""

    folder: Path
    quantization: str
    adapters: Mapping[str, Path]

    def load(self, dtype: str = "float32", **options: Any) -> LoadedBase:
        options = {"quantization": self.quantization, **options}
        return load_base(str(self.folder / "base"), dtype=dtype, device="cpu", **options)

    def reference(self, adapter: str | None, dtype: str = "float32") -> Any:
        """PEFT over a base that is quantized in the same way."""
        plain = load_pretrained(str(self.folder / "base"), dtype=dtype, device=CPU, quantization=self.quantization)
        return plain.model if adapter is None else PeftModel.from_pretrained(plain.model, self.adapters[adapter]).eval()

    @contextmanager
    def engine(self) -> Iterator[tuple[BatchEngine, dict[str, SelectedAdapter]]]:
        """A running engine over the quantized base, and the adapters as it knows them."""
        base = self.load()
        with ExitStack() as opened:
            store = AdapterStore(self.folder / f"data-{len(list(self.folder.iterdir()))}")
            opened.callback(store.close)
            registry = AdapterRegistry(store, base.adapted, base.identity, factor_budget=1 << 20, device=CPU)
            known = {}
            for name, path in self.adapters.items():
                with store.staging() as staged:
                    shutil.copytree(path, staged, dirs_exist_ok=True)
                    known[name] = SelectedAdapter(name, registry.register("", name, staged).digest)
            engine = build_engine(base, registry, EngineOptions(max_batch_size=4, prefill_tokens=8)).start()
            opened.callback(engine.stop)
            yield engine, known


def make_bench(folder: Path, arch: Arch, how: str, **specs: AdapterSpec) -> Bench:
    model = tiny_model(arch)
    save_model(model, folder / "base")
    return Bench(folder, how, {name: make_adapter(model, spec, folder / name) for name, spec in specs.items()})


@pytest.fixture(scope="module", params=CASES, ids=lambda case: "-".join(case))
def bench(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    arch, how = request.param
    second = AdapterSpec(seed=2, r=2, target_modules="all-linear")
    return make_bench(tmp_path_factory.mktemp(how), arch, how, one=AdapterSpec(seed=1), two=second)


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return save_model(tiny_model("llama"), tmp_path / "base")


# --- parity ---------------------------------------------------------------------------------------


def mixed_token_logits(base: LoadedBase, adapters: Sequence[AdapterFactors], rows: Sequence[Sequence[float]]) -> Tensor:
    """Of the last tokens of `PROMPTS`, run together with these weights a row, by the runner that the engine takes."""
    runner, batches = choose_runner(base.adapted, CPU, base.vocabulary, 1 << 26, base.context)
    assert batches
    runner.add(len(rows))
    return runner.extend(range(len(rows)), PROMPTS[: len(rows)], LowRankBatch(adapters, torch.tensor(rows)))


@pytest.fixture
def in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without bitsandbytes' kernel for CPUs with AVX512-BF16, which multiplies in bfloat16."""
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)


@pytest.mark.usefixtures("in_float32")
def test_a_mixed_batch_has_pefts_token_logits(bench: Bench) -> None:
    check_token_logits(bench, "float32", 1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_mixed_batch_has_pefts_token_logits_to_bfloat16s_rounding(bench: Bench, dtype: str) -> None:
    """With whatever kernels this CPU has."""
    check_token_logits(bench, dtype, 0.02)


def check_token_logits(bench: Bench, dtype: str, near: float) -> None:
    base = bench.load(dtype)
    adapters = [factors(bench.adapters[name]) for name in ("one", "two")]
    mixed = mixed_token_logits(base, adapters, [[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    for row, name in enumerate([None, "one", "two", "one"]):
        expected = peft_logits(bench.reference(name, dtype), PROMPTS[row])[-1].float()
        plain = peft_logits(bench.reference(None, dtype), PROMPTS[row])[-1].float()
        scale = expected.abs().max()
        assert float((mixed[row] - expected).abs().max() / scale) < near
        assert name is None or float((plain - expected).abs().max() / scale) > 0.1, "the adapter does something"


@pytest.mark.usefixtures("in_float32")
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_greedy_tokens_of_a_mixed_batch_are_pefts(bench: Bench) -> None:
    params = SamplingParams(max_new_tokens=TOKENS, temperature=0.0, ignore_eos=True)
    events: queue.Queue[Event] = queue.Queue()
    tokens: dict[str, list[int]] = {}
    asked: dict[str, tuple[str | None, list[int]]] = {}
    with bench.engine() as (engine, known):
        for number, name in enumerate([None, "one", "two", "one", "two", None]):
            prompt = PROMPTS[number % len(PROMPTS)]
            selection = Selection(() if name is None else (known[name],))
            asked[f"{number}"] = name, prompt
            engine.submit([GenerationRequest(f"{number}", tuple(prompt), params, selection)], events.put)
        ended = 0
        while ended < len(asked):
            event = events.get(timeout=60)
            assert not isinstance(event, FailedEvent), event
            if isinstance(event, TokenEvent):
                tokens.setdefault(event.request_id, []).extend(event.token_ids)
            ended += isinstance(event, FinishedEvent)
    for request, (name, prompt) in asked.items():
        assert tokens[request] == peft_greedy(bench.reference(name), prompt, TOKENS), (name, prompt)
    assert len({tuple(each) for each in tokens.values()}) == len(asked)


@pytest.mark.usefixtures("in_float32")
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("how", ["int8", "nf4"])
@pytest.mark.parametrize(
    "spec",
    [
        AdapterSpec(seed=3, target_modules=["q_proj", "lm_head"]),
        AdapterSpec(seed=4, target_modules=["q_proj"], modules_to_save=["lm_head"]),
        AdapterSpec(seed=5, target_modules=["q_proj", "v_proj"], bias="vblora_only"),
    ],
    ids=["lm_head targeted", "lm_head saved", "biases of quantized layers"],
)
def test_what_is_replaced_beside_quantized_weights(tmp_path: Path, how: str, spec: AdapterSpec) -> None:
    """lm_head stays unquantized; the biases of quantized layers are plain numbers."""
    bench = make_bench(tmp_path, "qwen2", how, own=spec)
    base = bench.load()
    with registered(bench, base) as adapter:
        mixed = mixed_token_logits(base, [adapter], [[1.0], [0.0], [1.0]])
    for row, name in enumerate(["own", None, "own"]):
        expected = peft_logits(bench.reference(name), PROMPTS[row])[-1]
        assert float((mixed[row] - expected).abs().max() / expected.abs().max()) < 1e-5


@contextmanager
def registered(bench: Bench, base: LoadedBase) -> Iterator[AdapterFactors]:
    with ExitStack() as opened:
        store = AdapterStore(bench.folder / "data")
        opened.callback(store.close)
        registry = AdapterRegistry(store, base.adapted, base.identity, factor_budget=1 << 20, device=CPU)
        with store.staging() as staged:
            shutil.copytree(bench.adapters["own"], staged, dirs_exist_ok=True)
            digest = registry.register("", "own", staged).digest
        yield registry.pin(digest)
        registry.unpin(digest)


def test_layers_that_no_kernel_tiles(tmp_path: Path) -> None:
    """Features that are multiples of neither 32 nor 64, which bitsandbytes' fused kernel would fail on."""
    model = tiny_model("llama", hidden_size=48, intermediate_size=80)
    base = load_base(str(save_model(model, tmp_path / "base")), device="cpu", quantization="nf4")
    assert choose_runner(base.adapted, CPU, base.vocabulary, 1 << 26, base.context)[1]


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["int8", "nf4"])
def test_a_saved_module_whose_weight_is_quantized_is_refused(tmp_path: Path, how: str) -> None:
    saved = AdapterSpec(seed=1, target_modules=["q_proj"], modules_to_save=["gate_proj"])
    bench = make_bench(tmp_path, "llama", how, own=saved)
    with pytest.raises(UnsupportedCheckpoint, match="holds quantized"), registered(bench, bench.load()):
        pass
    with registered(bench, bench.load(quantization="none")):
        pass


def test_nothing_is_folded(bench: Bench) -> None:
    base = bench.load(pack_weights=False)  # packed, they are no longer there to be looked at
    before = fingerprint_of(base.adapted.model)
    merger = Merger(base.adapted)
    with pytest.raises(MergeUnsupported, match="quantized"):
        merger.fold([(factors(bench.adapters["two"]), 1.0)])
    assert not merger.is_folded
    assert fingerprint_of(base.adapted.model) == before


def test_auto_merge_is_refused_at_start(bench: Bench, tmp_path: Path) -> None:
    base = bench.load()
    with ExitStack() as opened:
        store = AdapterStore(tmp_path / "data")
        opened.callback(store.close)
        registry = AdapterRegistry(store, base.adapted, base.identity, factor_budget=1 << 20, device=CPU)
        with pytest.raises(BaseModelError, match="auto_merge"):
            build_engine(base, registry, EngineOptions(auto_merge=True))


def test_what_quantizes_nothing_is_refused(tmp_path: Path) -> None:
    base = save_model(tiny_model("gpt2"), tmp_path / "base")
    with pytest.raises(BaseModelError, match=r"int8 quantizes no layer of GPT2LMHeadModel.*none, nf4"):
        load_base(str(base), device="cpu", quantization="int8")


@pytest.mark.parametrize(("how", "package"), [("int8", "torchao"), ("nf4", "bitsandbytes"), ("nf4", "accelerate")])
def test_a_missing_package_is_named_with_its_extra(
    llama: Path, monkeypatch: pytest.MonkeyPatch, how: str, package: str
) -> None:
    monkeypatch.setattr(quantization, "find_spec", lambda name: None if name == package else object())
    with pytest.raises(BaseModelError, match=rf"needs {package}: pip install 'vblora-serve\[quantization\]'"):
        load_base(str(llama), device="cpu", quantization=how)


# --- what is said of them -------------------------------------------------------------------------


@pytest.mark.parametrize(("how", "share"), [("int8", 0.4), ("nf4", 0.3)])
def test_counts_and_sizes(tmp_path: Path, how: str, share: float) -> None:
    """Of a model that is nearly all linear layers; nf4 packs two weights into a byte, and is counted as if not."""
    path = save_model(tiny_model("llama", hidden_size=256, intermediate_size=512), tmp_path / "base")
    plain, quantized = load_base(str(path), device="cpu"), load_base(str(path), device="cpu", quantization=how)
    assert plain.quantization is None
    assert quantized.quantization == how
    assert quantized.parameters == plain.parameters == sum(p.numel() for p in plain.adapted.model.parameters())
    assert plain.weight_bytes == 4 * plain.parameters
    assert 0.15 * plain.weight_bytes < quantized.weight_bytes < share * plain.weight_bytes
    assert quantized.modules == plain.modules or how == "nf4", "the class alone differs"
    assert quantized.modules.layers == plain.modules.layers


@pytest.mark.parametrize("tied", [False, True])
def test_shared_embeddings_count_once(tmp_path: Path, tied: bool) -> None:
    path = save_model(tiny_model("llama", tie_word_embeddings=tied), tmp_path / "base")
    plain, quantized = load_base(str(path), device="cpu"), load_base(str(path), device="cpu", quantization="nf4")
    assert quantized.parameters == plain.parameters
    assert plain.weight_bytes == 4 * plain.parameters


def test_fingerprints(bench: Bench) -> None:
    """They tell a base from one that is quantized otherwise or whose scales alone differ."""
    base = bench.load()
    assert base.fingerprint == bench.load().fingerprint
    assert base.fingerprint != bench.load(quantization="none").fingerprint
    other = bench.reference(None)
    assert fingerprint_of(other) == base.fingerprint
    layer = next(module for module in other.modules() if quantization.holds_quantized(module))
    scale = layer.weight.scale if bench.quantization == "int8" else layer.weight.quant_state.absmax
    scale.mul_(1.5)
    assert fingerprint_of(other) != base.fingerprint


# --- checkpoints that are quantized already -------------------------------------------------------


@pytest.mark.parametrize(("how", "named"), [("int8", "torchao"), ("nf4", "bitsandbytes-4bit")])
def test_a_quantized_checkpoint_is_loaded_as_it_is(llama: Path, tmp_path: Path, how: str, named: str) -> None:
    quantized = load_pretrained(str(llama), dtype="float32", device=CPU, quantization=how)
    saved = tmp_path / "quantized"
    shutil.copytree(llama, saved)
    (saved / "model.safetensors").unlink()
    quantized.model.save_pretrained(saved)
    base = load_base(str(saved), device="cpu")
    assert base.quantization == named
    assert base.parameters == load_base(str(llama), device="cpu").parameters
    expected = peft_logits(quantized.model, PROMPTS[2])
    torch.testing.assert_close(peft_logits(base.adapted.model, PROMPTS[2]), expected)
    with pytest.raises(BaseModelError, match="quantized already"):
        load_base(str(saved), device="cpu", quantization=how)


def of_eight_bits(llama: Path, saved: Path, threshold: float) -> LoadedBase:
    """A checkpoint that bitsandbytes has quantized to LLM.int8()."""
    shutil.copytree(llama, saved)
    config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=threshold)
    AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32, quantization_config=config).save_pretrained(saved)
    base = load_base(str(saved), device="cpu")
    assert base.quantization == "bitsandbytes-8bit"
    return base


@pytest.mark.parametrize(("threshold", "together"), [(0.0, True), (60.0, False)])
def test_outliers_that_the_self_test_does_not_meet(
    llama: Path, tmp_path: Path, threshold: float, together: bool
) -> None:
    base = of_eight_bits(llama, tmp_path / "quantized", threshold)
    assert choose_runner(base.adapted, CPU, base.vocabulary, 1 << 26, base.context)[1] is together


def test_rows_that_depend_on_their_neighbours_run_alone(llama: Path, tmp_path: Path) -> None:
    """LLM.int8() takes a column for an outlier if any row of the batch has one there."""
    base = of_eight_bits(llama, tmp_path / "quantized", 6.0)

    def first_row(prompts: list[list[int]]) -> Tensor:
        with torch.inference_mode():
            logits: Tensor = base.adapted.model(torch.tensor(prompts), use_cache=False).logits[0]
        return logits

    alone, together = first_row([PROMPTS[0]]), first_row([PROMPTS[0], list(b"neighbour")])
    assert float((alone - together).abs().max()) > 1e-3 * float(alone.abs().max()), "or batches would be right"
    assert not choose_runner(base.adapted, CPU, base.vocabulary, 1 << 26, base.context)[1]


def test_a_checkpoint_that_lost_its_quantization_is_said_to_be_plain(caplog: pytest.LogCaptureFixture) -> None:
    config = type("Config", (), {"quantization_config": {"quant_method": "fp8"}})()
    assert quantization.quantization_of(nn.Sequential(nn.Linear(4, 4)), config, "none") is None
    assert "dequantized the checkpoint (fp8)" in caplog.text
