"""The plugin keeps to vLLM's published interface, and what it hands over loads there and computes the same.

With vLLM installed, the same tests run on its own classes.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import logging
import multiprocessing
import shutil
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from adapters.reading import as_served, read_adapter
from adapters.store import digest_of
from tests.factories import AdapterSpec, make_adapter, peft_logits, peft_reference, rewrite, tiny_model
from tests.lora_factory import make_lora
from tests.unit.adapters.support import PROMPT
from tests.unit.vblora_vllm import fake_vllm
from tests.unit.vblora_vllm.fake_vllm import Models, loadable_deltas
from vblora_vllm.settings import PluginSettings

ROOT = Path(__file__).parents[3]
BASE = "org/tiny-llama"
LLAMA = tiny_model("llama")
LINEAR = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"}
ATTENTION = ["q_proj", "v_proj"]
RANK = 16  # vLLM's --max-lora-rank, unless it is told another

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture(autouse=True, params=["published", "installed"])
def vllm(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """vLLM's interface: the one of these tests, and that of vLLM itself where it is installed."""
    if request.param == "installed":
        pytest.importorskip("vllm.lora.resolver", reason="vLLM is not installed")
    else:
        for name, module in fake_vllm.modules().items():
            monkeypatch.setitem(sys.modules, name, module)
    sys.modules.pop("vblora_vllm.resolver", None)
    yield
    sys.modules.pop("vblora_vllm.resolver", None)


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory of adapters that the environment names."""
    path = tmp_path / "library"
    path.mkdir()
    monkeypatch.setenv("VBLORA_VLLM_ADAPTERS", str(path))
    monkeypatch.setenv("VBLORA_VLLM_CACHE", str(tmp_path / "cache"))
    return path


def entry_point() -> EntryPoint:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    ((name, value),) = project["entry-points"]["vllm.general_plugins"].items()
    return EntryPoint(name, value, "vllm.general_plugins")


def server(model: str = BASE) -> Models:
    """vLLM with the plugin loaded as vLLM loads it."""
    sys.modules["vllm.lora.resolver"].LoRAResolverRegistry.resolvers.clear()
    entry_point().load()()
    return Models(model)


def resolved(name: str, models: Models | None = None) -> Path:
    """Where the directory is that vLLM is handed for a name."""
    request = asyncio.run((models or server()).resolve(name))
    assert request is not None
    return Path(request.lora_path)


def refusal(name: str, model: str = BASE) -> str:
    with pytest.raises(ValueError, match="is refused") as caught:
        asyncio.run(server(model).resolve(name))
    return str(caught.value)


def assert_same_deltas(source: Path, path: Path, rank: int = RANK, tolerance: float = 1e-5) -> None:
    """The loader computes the adapter's own deltas, without a tensor left out."""
    deltas = loadable_deltas(path, linear=LINEAR, max_lora_rank=rank)
    own = {layer.name: b_t.T @ a for layer, a, b_t in as_served(read_adapter(source)).factors()}
    assert deltas.keys() == own.keys()
    for module, delta in own.items():
        torch.testing.assert_close(deltas[module], delta, rtol=tolerance, atol=tolerance)


VBLORA_FORMS: dict[str, dict[str, Any]] = {
    "compact": {"target_modules": "all-linear"},
    "full logits": {"compact": False},
    "bf16": {"dtype": torch.bfloat16},
    "regex": {"target_modules": r".*\.1\..*(v_proj|up_proj)"},
    "one layer": {"layers_to_transform": [1]},
    "biases of a base that has none": {"bias": "vblora_only"},
    "lm_head": {"target_modules": ["lm_head", "q_proj"]},
}


@pytest.mark.parametrize("form", VBLORA_FORMS)
def test_vb_lora_is_handed_over_as_its_exact_lora(form: str, library: Path) -> None:
    spec = AdapterSpec(**{"target_modules": ATTENTION, **VBLORA_FORMS[form]})
    source = make_adapter(LLAMA, spec, library / "sql")
    path = resolved("sql")
    assert_same_deltas(source, path)
    if spec.dtype is torch.float32:  # PEFT cannot load 16-bit compact ones
        theirs = peft_logits(peft_reference(LLAMA, source), PROMPT)
        torch.testing.assert_close(peft_logits(peft_reference(LLAMA, path), PROMPT), theirs, rtol=0, atol=1e-4)
        assert not torch.allclose(theirs, peft_logits(LLAMA, PROMPT), atol=0.1), "the adapter is visible"


LORA_FORMS: dict[str, dict[str, Any]] = {
    "alpha": {"lora_alpha": 3},
    "rslora": {"lora_alpha": 5, "use_rslora": True},
    "patterns": {"rank_pattern": {"q_proj": 7}, "alpha_pattern": {"v_proj": 2}, "use_rslora": True},
    "biases of a base that has none": {"bias": "lora_only"},
    "bf16": {"dtype": torch.bfloat16},
}


@pytest.mark.parametrize("form", LORA_FORMS)
def test_plain_lora_is_handed_over_too(form: str, library: Path) -> None:
    source = make_lora(LLAMA, library / "sql", target_modules=ATTENTION, **LORA_FORMS[form])
    path = resolved("sql")
    assert_same_deltas(source, path)
    first, second = (load_file(directory / "adapter_model.safetensors") for directory in (source, path))
    if form != "patterns":
        assert all(torch.equal(first[key], second[key]) for key in first | second)
    theirs = peft_logits(peft_reference(LLAMA, source), PROMPT)
    torch.testing.assert_close(peft_logits(peft_reference(LLAMA, path), PROMPT), theirs, rtol=0, atol=1e-4)


def test_an_adapter_is_converted_once(library: Path, tmp_path: Path) -> None:
    make_adapter(LLAMA, AdapterSpec(), library / "sql")
    shutil.copytree(library / "sql", library / "twin")
    path = resolved("sql")
    stamp = path.stat().st_mtime_ns
    assert resolved("sql") == resolved("twin") == path
    assert path.stat().st_mtime_ns == stamp
    assert path.name == digest_of(library / "sql").removeprefix("sha256:")
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_a_changed_adapter_is_another_directory_and_another_id(library: Path) -> None:
    make_adapter(LLAMA, AdapterSpec(), library / "sql")
    models = server()
    first = asyncio.run(models.resolve("sql"))
    own = importlib.import_module("vblora_vllm.resolver").int_id
    old = digest_of(library / "sql")
    shutil.rmtree(library / "sql")
    make_adapter(LLAMA, AdapterSpec(seed=1), library / "sql")
    assert asyncio.run(models.resolve("sql")) is first, "vLLM asks again only once it has been unloaded"
    models.loaded.clear()
    second = asyncio.run(models.resolve("sql"))
    assert first is not None
    assert second is not None
    assert first.lora_path != second.lora_path
    assert Path(first.lora_path).is_dir(), "vLLM may still have to read it again"
    assert first.lora_int_id != second.lora_int_id
    new = digest_of(library / "sql")
    ids = {own("sql", old), own("sql", new), own("sqm", old)}
    assert len(ids) == 3
    assert all(0 < number < 2**31 for number in ids)
    assert own("sql", old) == own("sql", old)


@pytest.mark.parametrize(
    "name", ["nobody", "../sql", "/etc", "sql/../sql", ".", "..", "", "a" * 200, "org/sql", "link", "file", "no-config"]
)
def test_names_without_an_adapter_are_left_to_other_resolvers(name: str, library: Path, tmp_path: Path) -> None:
    make_adapter(LLAMA, AdapterSpec(), tmp_path / "sql")
    (library / "link").symlink_to(tmp_path / "sql")
    (library / "file").write_text("")
    (library / "no-config").mkdir()
    assert asyncio.run(server().resolve(name)) is None
    assert not (tmp_path / "cache").exists()


def nan_bank(tensors: dict[str, Tensor]) -> None:
    tensors["base_model.vblora_vector_bank"][0, 0] = float("nan")


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "damaged": ({"tensors": nan_bank}, "non_finite"),
    "another type": ({"config": {"peft_type": "ADALORA"}}, "unsupported_checkpoint"),
    "another base": ({"config": {"base_model_name_or_path": "org/other"}}, "base_model_mismatch"),
    "no tensors": ({"tensors": lambda tensors: tensors.clear()}, "missing_tensor"),
}


@pytest.mark.parametrize("why", REFUSED)
def test_a_refused_adapter_says_why(why: str, library: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    change, code = REFUSED[why]
    rewrite(make_adapter(LLAMA, AdapterSpec(), tmp_path / "source"), library / "sql", **change)
    with caplog.at_level(logging.WARNING, logger="vllm.vblora"):
        message = refusal("sql")
    assert f"'sql' is refused ({code})" in message
    assert f"adapter sql is refused ({code})" in caplog.text
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_a_file_that_is_missing_is_a_refusal(library: Path) -> None:
    make_adapter(LLAMA, AdapterSpec(), library / "sql")
    (library / "sql" / "adapter_model.safetensors").unlink()
    assert "missing_tensor" in refusal("sql")


@pytest.mark.parametrize(
    "fields",
    [
        {"modules_to_save": ["lm_head"]},
        {"bias": "vblora_only", "arch": "qwen2"},
        {"save_embedding_layers": True},
    ],
    ids=str,
)
def test_what_vllm_has_no_place_for_is_refused_not_dropped(fields: dict[str, Any], library: Path) -> None:
    model = tiny_model(fields.pop("arch", "llama"))
    make_adapter(model, AdapterSpec(**fields), library / "sql")
    assert "vblora-serve merge" in refusal("sql")


def test_variants_of_lora_are_refused(library: Path) -> None:
    make_lora(LLAMA, library / "sql", target_modules=ATTENTION, use_dora=True)
    assert "use_dora" in refusal("sql")


@pytest.mark.parametrize(
    ("model", "accepted"),
    [
        (BASE, True),
        ("ORG/Tiny-LLaMA", True),
        ("org/other", False),
        ("models/tiny-llama", True),
        ("models/another", False),
        ("hub/models--org--tiny-llama/snapshots/0123456789abcdef", True),
    ],
)
def test_the_base_must_be_the_adapters(model: str, accepted: bool, library: Path, tmp_path: Path) -> None:
    """A directory proves nothing, but its name may be the base's; vLLM offline gives a snapshot's path."""
    if "/" in model and model.split("/")[0] in ("models", "hub"):
        (tmp_path / model).mkdir(parents=True)
        model = str(tmp_path / model)
    make_adapter(LLAMA, AdapterSpec(base_model_name_or_path=BASE), library / "sql")
    if accepted:
        assert resolved("sql", server(model)).is_dir()
    else:
        message = refusal("sql", model)
        assert f"VBLORA_VLLM_BASE_ALIAS={BASE}" in message


def test_an_alias_says_that_it_is_the_base(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_adapter(LLAMA, AdapterSpec(base_model_name_or_path=BASE), library / "sql")
    monkeypatch.setenv("VBLORA_VLLM_BASE_ALIAS", f"org/third, {BASE}")
    path = resolved("sql", server("org/other"))
    assert json.loads((path / "adapter_config.json").read_text())["base_model_name_or_path"] == BASE


def test_a_base_that_is_not_named_is_a_warning(library: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_adapter(LLAMA, AdapterSpec(), library / "sql")
    make_adapter(LLAMA, AdapterSpec(base_model_name_or_path=BASE), library / "named")
    with caplog.at_level(logging.WARNING, logger="vllm.vblora"):
        models = server()
        assert resolved("named", models) != resolved("sql", models)
    (record,) = caplog.records
    assert record.getMessage().startswith("adapter sql: its config names no base")


def test_a_cached_adapter_is_still_held_against_the_base(library: Path) -> None:
    make_adapter(LLAMA, AdapterSpec(base_model_name_or_path=BASE), library / "sql")
    assert resolved("sql").is_dir()
    assert "base_model_mismatch" in refusal("sql", "org/other")


def test_an_adapter_that_changes_meanwhile_is_not_cached(
    library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_adapter(LLAMA, AdapterSpec(), library / "sql")
    other = make_adapter(LLAMA, AdapterSpec(seed=1), tmp_path / "other")

    def read_late(directory: Path) -> Any:
        shutil.copytree(other, directory, dirs_exist_ok=True)
        return read_adapter(directory)

    monkeypatch.setattr("vblora_vllm.library.read_adapter", read_late)
    assert "changed while it was read" in refusal("sql")
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_requests_at_once_are_served_from_one_directory(library: Path) -> None:
    names = [f"a{i}" for i in range(6)]
    make_adapter(LLAMA, AdapterSpec(), library / "a0")
    for name in names[1:]:
        shutil.copytree(library / "a0", library / name)
    models = server()

    async def all_at_once() -> set[str]:
        return {request.lora_path for request in await asyncio.gather(*map(models.resolve, names)) if request}

    (path,) = asyncio.run(all_at_once())
    assert_same_deltas(library / "a0", Path(path))
    assert len(list(Path(path).parent.iterdir())) == 1, "no half-written directory is left"


def convert_in_this_process(settings: PluginSettings, start: Any, results: Any) -> None:
    from vblora_vllm.library import Library

    library = Library(settings)
    directory = library.find("sql")
    assert directory is not None
    start.wait()
    results.put(str(library.convert(directory, BASE).path))


def test_processes_at_once_write_one_directory(library: Path, tmp_path: Path) -> None:
    source = make_adapter(LLAMA, AdapterSpec(), library / "sql")
    settings = PluginSettings(library, tmp_path / "cache")
    context = multiprocessing.get_context("spawn")
    start, results = context.Barrier(3), context.Queue()
    processes = [context.Process(target=convert_in_this_process, args=(settings, start, results)) for _ in range(3)]
    for process in processes:
        process.start()
    paths = {results.get(timeout=120) for _ in processes}
    for process in processes:
        process.join(timeout=60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    (path,) = paths
    assert_same_deltas(source, Path(path))
    assert len(list(Path(path).parent.iterdir())) == 1


def test_what_cannot_be_written_is_an_error(library: Path, tmp_path: Path) -> None:
    make_adapter(LLAMA, AdapterSpec(), library / "sql")
    (tmp_path / "cache").write_text("a file where the cache should be")
    with pytest.raises(OSError, match="cache"):
        asyncio.run(server().resolve("sql"))


class TestRegistration:
    def test_once_however_often(self, library: Path) -> None:
        server()
        registry = sys.modules["vllm.lora.resolver"].LoRAResolverRegistry
        first = dict(registry.resolvers)
        entry_point().load()()
        assert registry.resolvers == first
        assert list(registry.get_supported_resolvers()) == ["VB-LoRA Resolver"]

    def test_without_a_directory_it_does_nothing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("VBLORA_VLLM_ADAPTERS", raising=False)
        server()
        assert not sys.modules["vllm.lora.resolver"].LoRAResolverRegistry.resolvers
        assert "vblora_vllm.resolver" not in sys.modules

    def test_a_directory_that_is_none_keeps_vllm_from_starting(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("VBLORA_VLLM_ADAPTERS", "/nowhere")
        with pytest.raises(ValueError, match="VBLORA_VLLM_ADAPTERS is '/nowhere'"):
            server()

    def test_it_is_a_resolver_of_vllms(self, library: Path) -> None:
        server()
        (resolver,) = sys.modules["vllm.lora.resolver"].LoRAResolverRegistry.resolvers.values()
        assert isinstance(resolver, sys.modules["vllm.lora.resolver"].LoRAResolver)


def test_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    environ = {"VBLORA_VLLM_ADAPTERS": str(tmp_path), "XDG_CACHE_HOME": "/var/cache"}
    settings = PluginSettings.from_environ(environ)
    assert settings == PluginSettings(tmp_path, Path("/var/cache/vblora-serve/vllm"))
    monkeypatch.chdir(tmp_path)
    relative = PluginSettings.from_environ({"VBLORA_VLLM_ADAPTERS": ".", "VBLORA_VLLM_CACHE": "cache"})
    assert relative is not None
    assert relative.adapters == tmp_path
    assert relative.cache == tmp_path / "cache"
    home = PluginSettings.from_environ({"VBLORA_VLLM_ADAPTERS": "."})
    assert home is not None
    assert home.cache == Path.home() / ".cache" / "vblora-serve" / "vllm"
