"""A server whose engine is fake and whose store, registry, tokenizer and adapters are real."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from fastapi import FastAPI
from starlette.testclient import TestClient

from adapters.binding import BaseIdentity
from adapters.layers import AdaptedModel
from adapters.registry import AdapterRegistry
from adapters.store import AdapterStore
from adapters.targets import BaseModules
from service.api.deps import ApiSettings, BaseInfo, ServerState
from service.api.guidance import Guidance
from service.api.keys import ApiKey, KeyRing
from service.app import create_app
from service.engine.tokenizer import TextTokenizer
from tests.factories import EOS_ID, AdapterSpec, byte_tokenizer, make_adapter, tiny_model
from tests.fakes import FakeEngine, FakeMetrics

BASE = "tiny-llama"
ALIAS = "org/tiny-llama"


@dataclass(frozen=True)
class Base:
    """The model that all servers share: nothing here changes it."""

    adapted: AdaptedModel
    modules: BaseModules


@pytest.fixture(scope="session")
def base() -> Base:
    model = tiny_model("llama")
    modules = BaseModules.of(model, model_type="llama", output_layer=model.get_output_embeddings())
    return Base(AdaptedModel(model, modules), modules)


@pytest.fixture(scope="session")
def adapter_dirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Adapter directories as PEFT writes them."""
    folder, model = tmp_path_factory.mktemp("adapters"), tiny_model("llama")
    specs = {
        "one": AdapterSpec(seed=1),
        "two": AdapterSpec(seed=2),
        "logits": AdapterSpec(seed=3, compact=False),
        "foreign": AdapterSpec(seed=4, base_model_name_or_path="other/base"),
    }
    return {name: make_adapter(model, spec, folder / name) for name, spec in specs.items()}


class Server:
    """One app, a client of it, and everything behind it."""

    def __init__(
        self,
        base: Base,
        adapter_dirs: dict[str, Path],
        data_dir: Path,
        settings: ApiSettings,
        engine: FakeEngine | None = None,
        keys: Iterable[ApiKey] = (),
    ) -> None:
        self.data_dir = data_dir
        self.engine = engine or FakeEngine()
        self.metrics = FakeMetrics()
        self.store = AdapterStore(data_dir, reserved=settings.base_names)
        identity = BaseIdentity(settings.base_names)
        self.registry = AdapterRegistry(
            self.store, base.adapted, identity, factor_budget=1 << 24, device=torch.device("cpu")
        )
        info = BaseInfo(
            id=BASE,
            model_type="llama",
            parameters=12345,
            dtype="float32",
            device="cpu",
            fingerprint="0123456789abcdef",
            modules=base.modules,
            created=1700000000,
            kv_backend="slot",
            weight_bytes=49380,
            eos_token_ids=frozenset({EOS_ID}),
        )
        tokenizer = TextTokenizer(byte_tokenizer(), vocabulary=272)
        guidance = Guidance(tokenizer.underlying, vocabulary=272, eos_token_ids={EOS_ID})
        self.state = ServerState(
            settings,
            self.store,
            self.registry,
            self.engine,
            tokenizer,
            info,
            self.metrics,
            guidance,
            keys=KeyRing(keys),
        )
        self.app: FastAPI = create_app(self.state)
        self.client = TestClient(self.app)
        self._dirs = adapter_dirs

    def form(self, adapter: str = "one") -> dict[str, bytes]:
        """The files of an upload."""
        directory = self._dirs[adapter]
        return {
            "config": (directory / "adapter_config.json").read_bytes(),
            "weights": (directory / "adapter_model.safetensors").read_bytes(),
        }

    def upload(self, name: str, adapter: str = "one", query: str = "", **fields: str) -> httpx.Response:
        files = self.form(adapter)
        return self.client.post(f"/v1/adapters{query}", data={"name": name, **fields}, files=files)

    def digest(self, name: str) -> str:
        return self.store.get("", name).digest

    def generate(self, **fields: Any) -> httpx.Response:
        return self.client.post("/v1/generate", json={"prompt": "hi", "max_new_tokens": 12, **fields})

    def assert_nothing_left(self) -> None:
        """No trace of a refused upload: nothing listed, nothing staged, no files kept."""
        assert self.client.get("/v1/adapters").json() == {"data": [], "next": None}
        assert list((self.data_dir / "tmp").iterdir()) == []
        assert list((self.data_dir / "blobs" / "sha256").iterdir()) == []


@pytest.fixture
def make_server(base: Base, adapter_dirs: dict[str, Path], tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """Makes servers; keyword arguments are ApiSettings, and `keys`."""
    servers: list[Server] = []

    def make(keys: Iterable[ApiKey] = (), **overrides: Any) -> Server:
        settings = replace(ApiSettings(BASE, frozenset({BASE, ALIAS})), **overrides)
        servers.append(Server(base, adapter_dirs, tmp_path / f"data{len(servers)}", settings, keys=keys))
        return servers[-1]

    yield make
    for server in servers:
        server.engine.gate.set()
        server.store.close()


@pytest.fixture
def server(make_server: Callable[..., Server]) -> Server:
    return make_server()


def error_of(response: httpx.Response, status: int, code: str) -> dict[str, Any]:
    """The error of a response, once its whole envelope is as promised."""
    assert response.status_code == status, response.text
    assert set(response.json()) == {"error"}
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == code, error
    assert error["message"]
    assert response.headers["x-request-id"]
    return error
