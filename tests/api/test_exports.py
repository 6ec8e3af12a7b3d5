"""GET /v1/adapters/{name}/export: archives that unpack to what was uploaded, or to the same in another storage."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest
import torch

from adapters.checkpoint import LogitsCheckpoint, TopKCheckpoint, read_checkpoint
from adapters.errors import AdapterNotFound
from service.api.exports import ExportFormat, pack
from tests.api.conftest import Server, error_of
from tests.api.test_chat import bring_template


def unpack(server: Server, name: str, format: str, folder: Path) -> Path:
    response = server.client.get(f"/v1/adapters/{name}/export?format={format}")
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "application/x-tar"
    assert response.headers["x-adapter-digest"] == server.digest(name)
    assert response.headers["content-disposition"] == f'attachment; filename="{name}-{format}.tar"'
    with tarfile.open(fileobj=io.BytesIO(response.content)) as archive:
        archive.extractall(folder, filter="data")
    return folder / name


@pytest.mark.parametrize(("adapter", "storage"), [("one", "topk"), ("logits", "logits")])
def test_in_its_own_storage_it_is_what_was_uploaded(server: Server, adapter: str, storage: str, tmp_path: Path) -> None:
    server.upload("mine", adapter)
    directory = unpack(server, "mine", storage, tmp_path)
    form = server.form(adapter)
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == {
        "adapter_config.json": form["config"],
        "adapter_model.safetensors": form["weights"],
    }


@pytest.mark.parametrize("format", ["topk", "logits", "lora"])
def test_what_is_deleted_meanwhile_is_no_empty_archive(server: Server, format: ExportFormat) -> None:
    server.upload("mine")
    record = server.store.visible("", "mine")
    server.client.delete("/v1/adapters/mine")
    with pytest.raises(AdapterNotFound):
        pack(server.state, record, format)


def test_in_the_other_storage_it_computes_the_same(server: Server, tmp_path: Path) -> None:
    server.upload("compact", "one")
    server.upload("full", "logits")
    full = read_checkpoint(unpack(server, "compact", "logits", tmp_path))
    compact = read_checkpoint(unpack(server, "full", "topk", tmp_path))
    assert isinstance(full, LogitsCheckpoint)
    assert isinstance(compact, TopKCheckpoint)
    for name, exported in (("compact", full.to_topk()), ("full", compact)):
        own = server.registry.compact(server.digest(name))
        for (_, a, b), (_, other_a, other_b) in zip(own.factors(), exported.factors(), strict=True):
            torch.testing.assert_close((a, b), (other_a, other_b), rtol=1e-6, atol=1e-6)


def test_the_same_adapter_is_the_same_archive(server: Server) -> None:
    server.upload("mine")
    one, two = (server.client.get("/v1/adapters/mine/export?format=logits").content for _ in range(2))
    assert one == two


def test_the_chat_template_comes_along(server: Server, tmp_path: Path) -> None:
    bring_template(server, "mine", "{{ messages[0].content }}")
    directory = unpack(server, "mine", "logits", tmp_path)
    assert (directory / "chat_template.jinja").read_text() == "{{ messages[0].content }}"


def test_nothing_stays_behind(server: Server) -> None:
    server.upload("mine")
    assert server.client.get("/v1/adapters/mine/export?format=logits").status_code == 200
    assert list((server.data_dir / "tmp").iterdir()) == []


def test_what_is_refused(server: Server) -> None:
    error_of(server.client.get("/v1/adapters/nobody/export"), 404, "adapter_not_found")
    server.upload("mine")
    error_of(server.client.get("/v1/adapters/mine/export?format=gguf"), 400, "invalid_request")
    error_of(server.client.get("/v1/adapters/mine/export?form=topk"), 400, "invalid_request")
