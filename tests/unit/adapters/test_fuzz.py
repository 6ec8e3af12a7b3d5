"""Thousands of damaged adapters through the real registration: taken and sound, or refused with a reason.

Every case runs `AdapterRegistry.register` on a real store, and what it takes is pinned, composed and deleted again.
Only the fsyncs are left out, of the store's files and of its database: they would take most of the time.
"""

from __future__ import annotations

import json
import math
import os
import resource
import struct
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from adapters.binding import BaseIdentity
from adapters.config import VBLoRAConfig
from adapters.errors import LONGEST_MESSAGE, LONGEST_SUBJECT, AdapterTooLarge, CheckpointError
from adapters.factors import AdapterFactors
from adapters.layers import AdaptedModel
from adapters.registry import AdapterRegistry
from adapters.safetensors_header import DTYPE_BYTES
from adapters.store import AdapterStore
from tests.factories import AdapterSpec, make_adapter, tiny_model
from tests.lora_factory import make_lora
from tests.unit.adapters.mutations import AdapterFiles, mutated
from tests.unit.adapters.support import BANK, Q0, adapted

CASES_OF_EACH = 1000
MOST_MEMORY = 512 << 20  # bytes of address space that all cases together may add
MOST_SECONDS = 5  # of processor time for one case; a slow regular expression alone may take one
BASE = tiny_model("qwen2", num_hidden_layers=1)
KEYS = [Q0, f"{Q0.removesuffix('A')}B"]
EXTRAS = ["base_model.model.lm_head.weight", "base_model.model.model.layers.0.self_attn.q_proj.base_layer.bias"]

REFUSALS = {
    "unsupported_checkpoint", "invalid_safetensors", "bad_config", "missing_tensor", "unexpected_tensor",
    "shape_mismatch", "bad_index", "bad_weights", "non_finite", "no_target_matched", "base_model_mismatch",
}  # fmt: skip

SOURCES = {
    "compact": AdapterSpec(topk=3, bias="vblora_only"),
    "compact bf16": AdapterSpec(dtype=torch.bfloat16, modules_to_save=["lm_head"]),
    "compact f16": AdapterSpec(dtype=torch.float16, topk=1, target_modules=r".*\.(q|k)_proj", num_vectors=300),
    "full": AdapterSpec(compact=False, modules_to_save=["norm"], exclude_modules=["v_proj"]),
    "full bf16": AdapterSpec(compact=False, dtype=torch.bfloat16, bias="all"),
    "full f16": AdapterSpec(
        compact=False, dtype=torch.float16, target_modules=["q_proj"], layers_to_transform=[0], layers_pattern="layers"
    ),
}

PLAIN: dict[str, dict[str, Any]] = {
    "lora": {"bias": "lora_only", "rank_pattern": {"q_proj": 6}, "alpha_pattern": {r".*\.v_proj": 3}},
    "lora bf16": {"dtype": torch.bfloat16, "use_rslora": True, "target_modules": "all-linear"},
}


@pytest.fixture(scope="module")
def model() -> AdaptedModel:
    return adapted(BASE)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, AdapterFiles]:
    root = tmp_path_factory.mktemp("sources")
    written = [make_adapter(BASE, spec, root / name) for name, spec in SOURCES.items()]
    written += [make_lora(BASE, root / name, **fields) for name, fields in PLAIN.items()]
    return {path.name: AdapterFiles.read(path) for path in written}


@pytest.fixture(scope="module")
def registry(model: AdaptedModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[AdapterRegistry]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        store = AdapterStore(tmp_path_factory.mktemp("store") / "data")
        store._database.connection.execute("PRAGMA synchronous = OFF")
        yield AdapterRegistry(
            store, model, BaseIdentity(frozenset({"org/base"})), factor_budget=1 << 24, device=torch.device("cpu")
        )
        store.close()


@contextmanager
def bounded_memory(more: int = MOST_MEMORY) -> Iterator[None]:
    """Whoever takes more address space than this inside fails with a MemoryError, which no test allows."""
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (taken + more, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def verdict(registry: AdapterRegistry, adapter: AdapterFiles) -> tuple[str, AdapterFactors] | CheckpointError:
    """What becomes of an adapter, by the only two ways there are: (digest, factors), or a refusal with its reason."""
    started = time.thread_time()
    try:
        return taken(registry, adapter)
    except CheckpointError as refusal:
        check_refusal(refusal)
        return refusal
    finally:
        assert time.thread_time() - started < MOST_SECONDS
        assert registry.store.count("") == 0
        assert registry.resident_bytes() == (0, 0)


def taken(registry: AdapterRegistry, adapter: AdapterFiles) -> tuple[str, AdapterFactors]:
    with registry.store.staging() as staged:
        adapter.write(staged)
        digest = registry.register("", "fuzzed", staged).digest
    try:
        factors = registry.pin(digest)
        assert all(tensor.isfinite().all() for tensor in tensors_of(factors))
        registry.unpin(digest)
    finally:
        registry.store.delete("", "fuzzed")
        registry.forget_deleted([digest])
    return digest, factors


def check_refusal(refusal: CheckpointError) -> None:
    assert refusal.code in REFUSALS
    assert refusal.subject, refusal.message
    assert 10 < len(refusal.message) <= LONGEST_MESSAGE
    assert len(refusal.subject) <= LONGEST_SUBJECT
    assert refusal.message.isprintable()
    f"{refusal.message}{refusal.subject}".encode()


def tensors_of(factors: AdapterFactors) -> Iterator[Tensor]:
    for layer in factors.layers.values():
        yield from (layer.a, layer.b_t)
    for parameters in factors.replaced.values():
        yield from parameters.values()


def outputs(factors: AdapterFactors) -> dict[str, Any]:
    """All that an adapter changes in a forward, in a form that compares by value."""
    layers = {name: (layer.a.tolist(), layer.b_t.tolist()) for name, layer in factors.layers.items()}
    replaced = {
        f"{module}.{attribute}": tensor.tolist()
        for module, parameters in factors.replaced.items()
        for attribute, tensor in parameters.items()
    }
    return {**layers, **replaced}


def test_what_peft_wrote_is_taken(registry: AdapterRegistry, files: dict[str, AdapterFiles]):
    for adapter in files.values():
        assert not isinstance(verdict(registry, adapter), CheckpointError)


@pytest.mark.parametrize("source", [*SOURCES, *PLAIN])
def test_damaged_files_are_refused_or_sound(source: str, registry: AdapterRegistry, files: dict[str, AdapterFiles]):
    """And none that computes something else than the original goes by the original's digest."""
    original = verdict(registry, files[source])
    assert not isinstance(original, CheckpointError)
    expected = outputs(original[1])
    others = [name for name in SOURCES if name != source]
    seen: Counter[str] = Counter()
    with bounded_memory():
        for case in range(CASES_OF_EACH):
            other = files[others[case % len(others)]]
            result = verdict(registry, mutated(f"{source} {case}", files[source], other))
            if isinstance(result, CheckpointError):
                seen[result.code] += 1
            else:
                digest, factors = result
                same = outputs(factors) == expected
                assert same or digest != original[0]
                seen["the same" if same else "another"] += 1
    assert min(seen["the same"], seen["another"]) > 0
    assert len(seen) > 6, "mutations reach all parts of the validation"


real_keys = st.sampled_from([BANK, *KEYS, f"{KEYS[0]}_topk_indices", f"{KEYS[0]}_topk_weights", *EXTRAS])
keys = real_keys | st.text(max_size=8) | st.just("__metadata__")
sizes = st.sampled_from([0, 1, 2, 3, 4, 16, 32, 2**31, 2**47, 2**60, 2**64, -1, True, 1.0, None, "4"])
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "F16", "U8", "I64", "F64", "BOOL", "F8_E4M3", 4]),
        "shape": st.lists(sizes, max_size=4),
        "data_offsets": st.lists(sizes, min_size=1, max_size=3),
    },
    optional={"strides": st.none()},
)


@st.composite
def laid_out(draw: st.DrawFn) -> tuple[dict[str, Any], bytes]:
    """A header whose offsets are right, for tensors of small shapes of any kind, and their bytes."""
    header: dict[str, Any] = {}
    data = b""
    for key in draw(st.lists(real_keys | st.text(max_size=8), unique=True, max_size=8)):
        dtype = draw(st.sampled_from(["F32", "BF16", "F16", "U8", "I64"]))
        shape = draw(st.sampled_from([[32, 16], [4, 4, 32], [4, 4, 2], [4, 4, 1], [8], [4, 0, 2], []]))
        size = math.prod(shape) * DTYPE_BYTES[dtype]
        header[key] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + size]}
        data += draw(st.sampled_from([b"\0", b"\1", b"\x7f", b"\xff", b"?"])) * size
    return header, data


values = st.recursive(
    st.sampled_from([None, True, 0, 1, 2, 4, 16, 32, -1, 2**31, 2**64, 0.5, 1e308, "", "q_proj", ".*", "(", "all"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["a", "b"]), inner, max_size=2),
    max_leaves=4,
)
fields = st.dictionaries(
    st.sampled_from([*VBLoRAConfig().to_dict(), "fan_in_fan_out", "auto_mapping"]), values, max_size=4
)


@settings(max_examples=600, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(header=st.dictionaries(keys, entries | values, max_size=6).map(lambda header: (header, b"\0" * 64)) | laid_out())
def test_headers_made_of_nearly_valid_parts(
    header: tuple[dict[str, Any], bytes], registry: AdapterRegistry, files: dict[str, AdapterFiles]
):
    text = json.dumps(header[0]).encode("utf-8", "surrogatepass")
    adapter = AdapterFiles(files["compact"].config, struct.pack("<Q", len(text)) + text + header[1])
    with bounded_memory():
        verdict(registry, adapter)


@settings(max_examples=600, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=fields, source=st.sampled_from(list(SOURCES)))
def test_configs_made_of_nearly_valid_values(
    changes: dict[str, Any], source: str, registry: AdapterRegistry, files: dict[str, AdapterFiles]
):
    config = {**json.loads(files[source].config), **changes}
    with bounded_memory():
        verdict(registry, AdapterFiles(json.dumps(config).encode(), files[source].weights))


HUGE = {
    "a bank of 2^60 vectors": ({BANK: [2**60, 16]}, {}),
    "a bank as large as its config says": (
        {BANK: [2**31 - 1, 2**31 - 1]}, {"num_vectors": 2**31 - 1, "vector_length": 2**31 - 1},
    ),
    "a rank of 2^31": ({BANK: [32, 16], KEYS[0]: [2**31 - 1, 4, 32], KEYS[1]: [4, 2**31 - 1, 32]}, {"r": 2**31 - 1}),
}  # fmt: skip


@pytest.mark.parametrize(("shapes", "fields"), HUGE.values(), ids=HUGE)
@pytest.mark.parametrize("honest_offsets", [True, False])
def test_a_claim_allocates_nothing(
    honest_offsets: bool,
    shapes: dict[str, list[int]],
    fields: dict[str, int],
    registry: AdapterRegistry,
    files: dict[str, AdapterFiles],
):
    header: dict[str, Any] = {}
    position = 0
    for key, shape in shapes.items():
        size = 4 * math.prod(shape) if honest_offsets else 0
        header[key] = {"dtype": "F32", "shape": shape, "data_offsets": [position, position + size]}
        position += size
    text = json.dumps(header).encode()
    config = {**json.loads(files["full"].config), **fields}
    adapter = AdapterFiles(json.dumps(config).encode(), struct.pack("<Q", len(text)) + text)
    with bounded_memory(32 << 20):
        refusal = verdict(registry, adapter)
    assert isinstance(refusal, CheckpointError)
    assert refusal.code == "invalid_safetensors"


def test_a_small_file_that_composes_to_much_is_refused_unread(registry: AdapterRegistry):
    """A rank of a million takes two bytes of indices a row, and half a kilobyte of factors."""
    rows, module = 1_000_000, KEYS[0].removesuffix("A")
    shapes = {
        BANK: ("F32", [2, 64]),
        f"{module}A_topk_indices": ("U8", [rows, 1, 1]),
        f"{module}A_topk_weights": ("F32", [rows, 1, 0]),
        f"{module}B_topk_indices": ("U8", [1, rows, 1]),
        f"{module}B_topk_weights": ("F32", [1, rows, 0]),
    }
    header: dict[str, Any] = {}
    position = 0
    for key, (dtype, shape) in shapes.items():
        size = math.prod(shape) * DTYPE_BYTES[dtype]
        header[key] = {"dtype": dtype, "shape": shape, "data_offsets": [position, position + size]}
        position += size
    text = json.dumps(header).encode()
    config = VBLoRAConfig(
        r=rows, num_vectors=2, vector_length=64, topk=1, save_only_topk_weights=True, target_modules=("q_proj",)
    )
    adapter = AdapterFiles(config.to_json().encode(), struct.pack("<Q", len(text)) + text + b"\0" * position)
    with bounded_memory(64 << 20), pytest.raises(AdapterTooLarge):
        taken(registry, adapter)
    assert registry.store.count("") == 0
