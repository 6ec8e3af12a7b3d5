"""Damaged adapters over HTTP: each is answered in one of the promised ways, and the server is none the worse for it."""

from __future__ import annotations

import json
import os
import pickle
import struct
from collections import Counter
from pathlib import Path

import pytest

from tests.api.conftest import Server, error_of
from tests.unit.adapters.mutations import AdapterFiles, mutated

CASES_OF_EACH = 150


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.mark.parametrize("source", ["one", "logits"])
def test_damaged_uploads(source: str, server: Server, adapter_dirs: dict[str, Path]) -> None:
    files = {name: AdapterFiles.read(path) for name, path in adapter_dirs.items()}
    server.upload("kept", "two")
    kept = server.client.get("/v1/adapters").json()
    answers: Counter[int] = Counter()
    for case in range(CASES_OF_EACH):
        damaged = mutated(f"http {source} {case}", files[source], files["foreign"])
        answers[upload(server, damaged)] += 1
        assert server.client.get("/v1/adapters").json() == kept
        assert list((server.data_dir / "tmp").iterdir()) == []
    assert len(list((server.data_dir / "blobs" / "sha256").iterdir())) == 1
    assert {201, 422} <= answers.keys() <= {201, 415, 422}
    assert server.generate(adapter="kept").status_code == 200


FOREIGN = {
    "pickle": pickle.dumps({"a": [1.0] * 9}),
    "pickle, protocol 0": pickle.dumps({"a": [1.0] * 9}, protocol=0),
    "zip": b"PK\x03\x04" + b"\0" * 60,
    "tar": b"adapter_model.safetensors".ljust(257, b"\0") + b"ustar\x0000".ljust(255, b"\0"),
    "GGUF": b"GGUF" + struct.pack("<IQQ", 3, 1, 1),
}


@pytest.mark.parametrize("weights", FOREIGN.values(), ids=FOREIGN)
def test_other_formats_are_unsupported(weights: bytes, server: Server) -> None:
    files = {**server.form(), "weights": weights}
    response = server.client.post("/v1/adapters", data={"name": "fuzzed"}, files=files)
    error = error_of(response, 415, "unsupported_checkpoint")
    assert error["param"] == "adapter_model.safetensors"
    server.assert_nothing_left()


HOSTILE = {
    "a regular expression that never ends": {"target_modules": r"(?:(?:.|\w)+)+[!?]"},
    "a regular expression that takes all memory": {"target_modules": "(?:(?:a{1000}){1000}){1000}"},
    "a megabyte in the wrong place": {"r": "x" * 1_000_000},
    "a number of 400 digits": {"init_logits_std": 10**400},
    "an endless list": {"anything": [0] * 100_000},
}


@pytest.mark.parametrize("fields", HOSTILE.values(), ids=HOSTILE)
def test_hostile_configs_are_refused_in_a_short_answer(fields: dict[str, object], server: Server) -> None:
    form = server.form()
    config = json.dumps({**json.loads(form["config"]), **fields}).encode()
    response = server.client.post("/v1/adapters", data={"name": "fuzzed"}, files={**form, "config": config})
    error_of(response, 422, "bad_config")
    assert len(response.content) < 5_000
    server.assert_nothing_left()


def upload(server: Server, adapter: AdapterFiles) -> int:
    """Uploads; of what is taken, every view works and it can be deleted again. Returns the answer's status."""
    response = server.client.post(
        "/v1/adapters", data={"name": "fuzzed"}, files={"config": adapter.config, "weights": adapter.weights}
    )
    if response.status_code == 201:
        for path in ("/v1/adapters", "/v1/adapters/fuzzed", "/v1/adapters/fuzzed/parameters", "/v1/models"):
            assert server.client.get(path).status_code == 200
        assert server.client.delete("/v1/adapters/fuzzed").status_code == 204
    else:
        assert response.json().keys() == {"error"}
        error = response.json()["error"]
        assert error.keys() == {"message", "type", "param", "code"}
        assert error["message"]
        assert error["param"]
        assert error["type"] == "invalid_request_error"
    return response.status_code
