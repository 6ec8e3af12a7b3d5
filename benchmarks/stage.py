"""The stage of a benchmark: a random base model and adapters, loaded and registered the way a server does it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from shutil import copytree
from tempfile import TemporaryDirectory

import torch
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from adapters.checkpoint import LogitsCheckpoint, TopKCheckpoint
from adapters.config import VBLoRAConfig
from adapters.export import write_adapter
from adapters.registry import AdapterRegistry
from adapters.store import AdapterRecord, AdapterStore
from benchmarks.sizes import AdapterShape, ModelShape
from service.engine.base_model import DTYPES, LoadedBase, load_base
from service.engine.build import EngineOptions, build_engine
from service.engine.engine import BatchEngine
from service.engine.graphs.capture import GraphBackend
from service.engine.graphs.setup import GraphOptions
from service.engine.selection import SelectedAdapter, Selection
from service.engine.threads import compute_with, in_own_thread

TENANT = ""
FACTOR_BUDGET = 4 << 30

# Far stronger than a trained adapter's: one that is lost or given to the wrong row changes the next token.
_BANK_BOUND = 0.2
_LOGITS_STD = 1.0


@dataclass(frozen=True, slots=True, eq=False)
class Stage:
    """A loaded base and a store, in a directory that vanishes with the benchmark.

    `threads` is what each contender computes with, in turn: a thread of PyTorch's that waits for work beside another's
    slows both (`service.engine.threads`).
    """

    root: Path
    base: LoadedBase
    store: AdapterStore
    threads: int

    @property
    def base_directory(self) -> Path:
        return self.root / "base"

    def registry(self) -> AdapterRegistry:
        """A registry as after a restart: what the store holds is known, nothing of it is in memory."""
        return AdapterRegistry(
            self.store,
            self.base.adapted,
            self.base.identity,
            factor_budget=FACTOR_BUDGET,
            device=self.base.device,
        )


@contextmanager
def open_stage(shape: ModelShape, *, dtype: str, device: str, threads: int) -> Iterator[Stage]:
    compute_with(1)
    with TemporaryDirectory(prefix="vblora-benchmark-") as directory:
        root = Path(directory)
        write_base(shape, root / "base", dtype)
        base = in_own_thread(threads, partial(load_base, str(root / "base"), dtype=dtype, device=device))
        store = AdapterStore(root / "data")
        try:
            yield Stage(root, base, store, threads)
        finally:
            store.close()


@contextmanager
def running_engine(
    stage: Stage,
    registry: AdapterRegistry,
    max_batch_size: int,
    max_queue: int = 256,
    graphs: GraphOptions | None = None,
    graph_backend: GraphBackend | None = None,
) -> Iterator[BatchEngine]:
    options = EngineOptions(max_batch_size, max_queue, graphs=graphs or GraphOptions())
    build = partial(build_engine, stage.base, registry, options, graph_backend=graph_backend)
    engine = in_own_thread(stage.threads, build).start()
    compute_with(1)
    try:
        yield engine
    finally:
        engine.stop()


def write_base(shape: ModelShape, directory: Path, dtype: str) -> None:
    """A seeded random Llama that knows no end of text, and a tokenizer with one word per token."""
    config = llama_config(shape, dtype)
    torch.manual_seed(0)
    previous = torch.get_default_dtype()
    torch.set_default_dtype(DTYPES[dtype])
    try:
        LlamaForCausalLM(config).save_pretrained(directory)
    finally:
        torch.set_default_dtype(previous)
    word_tokenizer(shape.vocabulary).save_pretrained(directory)


def llama_config(shape: ModelShape, dtype: str) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=shape.context,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
        dtype=DTYPES[dtype],
    )


def word_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    words = models.WordLevel({f"w{token}": token for token in range(vocabulary)}, unk_token="w0")
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), unk_token="w0")


def random_adapter(base: LoadedBase, shape: AdapterShape, seed: int) -> TopKCheckpoint:
    config = VBLoRAConfig(
        r=shape.r,
        num_vectors=shape.num_vectors,
        vector_length=shape.vector_length,
        topk=shape.topk,
        target_modules=shape.targets,
        task_type="CAUSAL_LM",
        init_vector_bank_bound=_BANK_BOUND,
        init_logits_std=_LOGITS_STD,
    )
    generator = torch.Generator().manual_seed(seed)
    return LogitsCheckpoint.initialise(config, base.modules.selected_by(config), generator).to_topk()


def add_adapters(stage: Stage, shape: AdapterShape, count: int) -> dict[str, Path]:
    """Writes seeded adapters and registers them; their PEFT directories by name."""
    registry = stage.registry()
    directories = {f"adapter-{seed}": stage.root / "adapters" / str(seed) for seed in range(count)}
    for seed, (name, directory) in enumerate(directories.items()):
        write_adapter(random_adapter(stage.base, shape, seed), directory)
        register(stage.store, registry, name, directory)
    return directories


def register(store: AdapterStore, registry: AdapterRegistry, name: str, directory: Path) -> AdapterRecord:
    with store.staging() as staged:
        copytree(directory, staged, dirs_exist_ok=True)
        return registry.register(TENANT, name, staged)


def selections(stage: Stage, names: Sequence[str]) -> list[Selection]:
    """Each adapter alone, beside the base weights."""
    return [Selection((SelectedAdapter(name, stage.store.get(TENANT, name).digest),)) for name in names]
