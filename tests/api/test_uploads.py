"""POST /v1/adapters with a form: read as it arrives, refused as early as it can be, and never half stored."""

from __future__ import annotations

import asyncio
import errno
import json
import os
from collections.abc import Callable

import httpx
import pytest
from starlette.types import Message

from adapters.store.files import uploaded_files
from service.api.chat_files import chat_template_of
from tests.api.asgi import exchange
from tests.api.conftest import Server, error_of
from tests.unit.adapters.store_support import uploaded

FORM = {"content-type": "multipart/form-data; boundary=XX"}


def part(name: str, data: bytes = b"x") -> bytes:
    return f'--XX\r\nContent-Disposition: form-data; name="{name}"; filename="f"\r\n\r\n'.encode() + data + b"\r\n"


def post(server: Server, body: bytes, headers: dict[str, str] = FORM) -> httpx.Response:
    return server.client.post("/v1/adapters", content=body, headers=headers)


def whole(server: Server, *order: str) -> bytes:
    """A form with those parts, in that order."""
    values = {"name": b"sql", "activate": b"true", **server.form()}
    return b"".join(part(name, values[name]) for name in order) + b"--XX--\r\n"


def test_an_upload_is_answered_with_the_adapter(server: Server) -> None:
    response = server.upload("sql")
    assert response.status_code == 201
    body = response.json()
    assert body == server.client.get("/v1/adapters").json()["data"][0]
    assert (body["name"], body["digest"], body["base"]) == ("sql", server.digest("sql"), "tiny-llama")
    assert (body["state"], body["active"], body["storage"]) == ("STORED", False, "topk")


def test_what_is_stored_is_what_was_sent(server: Server) -> None:
    server.upload("sql")
    directory = server.store.path(server.digest("sql"))
    stored = {path.name: uploaded(path) for path in uploaded_files(directory)}
    form = server.form()
    assert stored == {"adapter_config.json": form["config"], "adapter_model.safetensors": form["weights"]}
    assert list((server.data_dir / "tmp").iterdir()) == []


def test_full_logits_can_be_uploaded(server: Server) -> None:
    body = server.upload("trained", "logits").json()
    assert (body["storage"], body["resumable"]) == ("logits", True)


@pytest.mark.parametrize("order", [("weights", "config", "name"), ("activate", "name", "weights", "config")])
def test_parts_may_come_in_any_order(server: Server, order: tuple[str, ...]) -> None:
    response = post(server, whole(server, *order))
    assert response.status_code == 201
    assert response.json()["active"] == ("activate" in order)


@pytest.mark.parametrize(("activate", "mode"), [("true", "switch"), ("switch", "switch"), ("merge", "merge")])
def test_an_upload_may_activate(server: Server, activate: str, mode: str) -> None:
    body = server.upload("sql", activate=activate).json()
    assert (body["active"], body["mode"]) == (True, mode)
    assert body.get("merge_error") == (0.25 if mode == "merge" else None)


def test_an_unknown_activate_is_refused(server: Server) -> None:
    assert error_of(server.upload("sql", activate="now"), 400, "invalid_request")["param"] == "activate"
    server.assert_nothing_left()


def test_the_same_name_again_is_a_conflict_unless_it_replaces(server: Server) -> None:
    server.upload("sql", "one")
    first = server.digest("sql")
    assert error_of(server.upload("sql", "two"), 409, "adapter_exists")["param"] == "sql"
    assert server.digest("sql") == first
    replaced = server.upload("sql", "two", query="?replace=true")
    assert replaced.status_code == 201
    assert replaced.json()["digest"] != first


def test_another_base_is_refused_unless_allowed(server: Server) -> None:
    error = error_of(server.upload("far", "foreign"), 422, "base_model_mismatch")
    assert error["param"] == "base_model_name_or_path"
    server.assert_nothing_left()
    assert server.upload("far", "foreign", query="?allow_base_mismatch=true").status_code == 201


@pytest.mark.parametrize("query", ["?repalce=true", "?replace=perhaps"])
def test_the_query_is_checked(server: Server, query: str) -> None:
    assert error_of(server.upload("sql", query=query), 400, "invalid_request")["param"] == query[1:8]
    server.assert_nothing_left()


NO_NAMES = [
    "", " ", ".", "..", "...", ".hidden", "-x", "_x", "a/b", "a\\b", "../a", "a\0", "a\n", "a\nb", "a b", " a", "a ",
    "a:1", "a@b", "a+b", "a%2fb", "x" * 129, "x" * 1024, "base", "tiny-llama", "org/tiny-llama",
    "ü", "a\u0301", "аdmin", "ａ", "１", "a\u200b", "\ufeffa", "a\u202eb",
]  # fmt: skip


@pytest.mark.parametrize("name", ["a", "0", "A.b_c-d", "a..b", "a.", "x" * 128, "Base", "con", "sha256", "lock"])
def test_a_name_is_taken_as_it_is(server: Server, name: str) -> None:
    response = server.upload(name)
    assert (response.status_code, response.json()["name"]) == (201, name)
    assert server.client.get(f"/v1/adapters/{name}").json()["name"] == name
    stored = [path.name for path in (server.data_dir / "blobs" / "sha256").iterdir()]
    assert stored == [server.digest(name).removeprefix("sha256:")], "no path is made of a name"


def test_names_differ_by_case(server: Server) -> None:
    for name in ("sql", "SQL"):
        assert server.upload(name).status_code == 201
    server.client.delete("/v1/adapters/SQL")
    assert server.client.get("/v1/adapters/sql").status_code == 200


@pytest.mark.parametrize("name", NO_NAMES)
@pytest.mark.anyio
async def test_a_wrong_name_is_refused_before_the_weights_are_read(server: Server, name: str) -> None:
    async with exchange(server.app, "POST", "/v1/adapters", headers=FORM) as client:
        client.send_body(part("name", name.encode()) + b"--XX\r\n", more=True)
        assert await client.status() == 400
        assert await client.error_code() == "invalid_request"
        assert client.reads == 1
    server.assert_nothing_left()


@pytest.mark.parametrize("missing", ["name", "config", "weights"])
def test_a_missing_part_is_named(server: Server, missing: str) -> None:
    parts = [name for name in ("name", "config", "weights") if name != missing]
    error = error_of(post(server, whole(server, *parts)), 400, "invalid_request")
    assert error["param"] == missing
    server.assert_nothing_left()


@pytest.mark.parametrize(("extra", "word"), [("wieghts", "unknown"), ("name", "twice"), ("weights", "twice")])
def test_an_unknown_or_repeated_part_is_named(server: Server, extra: str, word: str) -> None:
    body = whole(server, "name", "config", "weights").removesuffix(b"--XX--\r\n") + part(extra) + b"--XX--\r\n"
    error = error_of(post(server, body), 400, "invalid_request")
    assert error["param"] == extra
    assert word in error["message"]
    server.assert_nothing_left()


@pytest.mark.parametrize(
    ("body", "headers"),
    [
        (b"", FORM),
        (b"--XX--\r\n", FORM),
        (b"no form at all", FORM),
        (part("name", b"sql"), FORM),
        (b"--XX\r\nContent-Disposition: form-data\r\n\r\nx\r\n--XX--\r\n", FORM),
        (b"--XX\r\nX-Long: " + b"x" * 9000 + b"\r\n\r\nx\r\n--XX--\r\n", FORM),
        (part("name", b"x" * 2000), FORM),
        (b"", {"content-type": "multipart/form-data"}),
        (b"", {"content-type": "multipart/form-data; boundary=" + "x" * 3000}),
        (b"PK", {"content-type": "application/zip"}),
        (b"name=sql", {"content-type": "application/x-www-form-urlencoded"}),
        (b"x", {}),
    ],
)
def test_what_is_no_form_is_refused(server: Server, body: bytes, headers: dict[str, str]) -> None:
    error_of(post(server, body, headers), 400, "invalid_request")
    server.assert_nothing_left()


@pytest.mark.parametrize(
    ("config", "status", "code"),
    [
        ({"peft_type": "ADALORA"}, 415, "unsupported_checkpoint"),
        ({"peft_type": "LORA"}, 422, "missing_tensor"),
        ({"r": 0}, 422, "bad_config"),
        ({"num_vectors": 64}, 422, "shape_mismatch"),
        ({"target_modules": ["nothing"]}, 422, "unexpected_tensor"),
    ],
)
def test_a_refused_checkpoint_leaves_nothing(server: Server, config: dict[str, object], status: int, code: str) -> None:
    form = server.form()
    form["config"] = json.dumps({**json.loads(form["config"]), **config}).encode()
    error_of(server.client.post("/v1/adapters", data={"name": "bad"}, files=form), status, code)
    server.assert_nothing_left()
    error_of(server.generate(adapter="bad"), 404, "adapter_not_found")


def test_weights_that_are_no_safetensors_are_refused(server: Server) -> None:
    form = {**server.form(), "weights": b"not safetensors"}
    error_of(server.client.post("/v1/adapters", data={"name": "bad"}, files=form), 422, "invalid_safetensors")
    form["weights"] = b"PK\x03\x04" + b"x" * 100
    error_of(server.client.post("/v1/adapters", data={"name": "bad"}, files=form), 415, "unsupported_checkpoint")
    server.assert_nothing_left()


def test_a_refused_replacement_leaves_the_old_version(server: Server) -> None:
    server.upload("sql")
    before = server.client.get("/v1/adapters/sql").json()
    form = {**server.form(), "weights": b"not safetensors"}
    server.client.post("/v1/adapters?replace=true", data={"name": "sql"}, files=form)
    assert server.client.get("/v1/adapters/sql").json() == before


def test_a_config_too_large_is_refused(server: Server) -> None:
    form = {**server.form(), "config": b" " * (1 << 20) + b"{}"}
    response = server.client.post("/v1/adapters", data={"name": "sql"}, files=form)
    assert error_of(response, 413, "payload_too_large")["param"] == "config"
    server.assert_nothing_left()


@pytest.mark.parametrize(
    ("part", "content", "file"),
    [
        ("tokenizer_config", b'{"chat_template": "x"}', "tokenizer_config.json"),
        ("chat_template", b"x", "chat_template.jinja"),
    ],
)
def test_the_files_of_the_chat_are_stored_and_count(server: Server, part: str, content: bytes, file: str) -> None:
    server.upload("plain")
    response = server.client.post("/v1/adapters", data={"name": "chatty"}, files={**server.form(), part: content})
    assert response.status_code == 201
    stored = server.store.path(response.json()["digest"])
    assert (stored / file).read_bytes() == content
    assert chat_template_of(stored) == "x"
    assert response.json()["digest"] != server.digest("plain")


@pytest.mark.parametrize(
    ("part", "content"), [("tokenizer_config", b"[]"), ("tokenizer_config", b"{"), ("chat_template", b"{% if %}")]
)
def test_files_of_the_chat_that_cannot_be_used_are_refused(server: Server, part: str, content: bytes) -> None:
    response = server.client.post("/v1/adapters", data={"name": "sql"}, files={**server.form(), part: content})
    error_of(response, 422, "bad_config")
    server.assert_nothing_left()


@pytest.mark.parametrize("part", ["tokenizer_config", "chat_template"])
def test_files_of_the_chat_that_are_too_large_are_refused(server: Server, part: str) -> None:
    files = {**server.form(), part: b" " * ((1 << 20) + 1)}
    response = server.client.post("/v1/adapters", data={"name": "sql"}, files=files)
    assert error_of(response, 413, "payload_too_large")["param"] == part
    server.assert_nothing_left()


def test_a_full_disk_is_507(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("service.api.uploads._FilePart.write", full)
    error_of(server.upload("sql"), 507, "storage_full")
    server.assert_nothing_left()


@pytest.mark.parametrize("function", ["mkdir", "fsync", "rename"])
def test_a_disk_that_fills_up_later_is_507_too(server: Server, monkeypatch: pytest.MonkeyPatch, function: str) -> None:
    server.upload("sql", activate="true")
    before = server.client.get("/v1/adapters/sql").json()

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, function, full)
        error_of(server.upload("sql", "two", "?replace=true"), 507, "storage_full")
        error_of(server.upload("new", "two"), 507, "storage_full")
    assert server.client.get("/v1/adapters/sql").json() == before
    assert server.store.count("") == 1
    assert list((server.data_dir / "tmp").iterdir()) == []
    assert server.upload("sql", "two", "?replace=true").status_code == 201


@pytest.mark.anyio
async def test_a_body_that_declares_too_much_is_not_read(make_server: Callable[..., Server]) -> None:
    server = make_server(max_upload_bytes=1000)
    headers = {**FORM, "content-length": "1001"}
    async with exchange(server.app, "POST", "/v1/adapters", headers=headers) as client:
        assert await client.status() == 413
        assert await client.error_code() == "payload_too_large"
        assert client.reads == 0


@pytest.mark.anyio
async def test_a_body_that_becomes_too_large_is_not_read_on(make_server: Callable[..., Server]) -> None:
    server = make_server(max_upload_bytes=1000)
    async with exchange(server.app, "POST", "/v1/adapters", headers=FORM) as client:
        client.send_body(part("name", b"sql"), more=True)
        client.send_body(part("weights", b"x" * 1000), more=True)
        assert await client.status() == 413
        assert await client.error_code() == "payload_too_large"
        assert client.reads == 2
    server.assert_nothing_left()


HEADER = b'--XX\r\nContent-Disposition: form-data; name="weights"; filename="f"\r\n'
ENDLESS = {
    "preamble": (b"", b"\r\n" + b"x" * 998),
    "preamble of line ends": (b"", b"\r\n" * 500),
    "epilogue": (part("name", b"sql") + b"--XX--\r\n", b"x" * 1000),
    "header's name": (b"--XX\r\n", b"x" * 1000),
    "header's value": (b"--XX\r\nX-Long: ", b"x" * 1000),
    "headers": (HEADER, b"X-More: x\r\n" * 100),
    "headers without end of their lines": (HEADER, b"X-More: x\r" * 100),
    "empty headers": (HEADER, b"X:\r\n" * 200),
    "text": (b'--XX\r\nContent-Disposition: form-data; name="name"\r\n\r\n', b"x" * 1000),
    "unknown parts": (b"", b"".join(part(f"x{n}") for n in range(20))),
    "same parts": (b"", part("activate", b"true") * 20),
    "nameless parts": (b"", b"--XX\r\n\r\nx\r\n" * 80),
    "spaces": (b"--XX\r\nX:", b" " * 1000),
}


@pytest.mark.parametrize("what", ENDLESS)
@pytest.mark.anyio
async def test_what_has_no_end_is_not_read_for_long(server: Server, what: str) -> None:
    """However much an upload may take: none of this is the content of a file."""
    begin, more = ENDLESS[what]
    async with exchange(server.app, "POST", "/v1/adapters", headers=FORM) as client:
        client.send_body(begin, more=True)
        for _ in range(50):
            client.send_body(more, more=True)
        assert await client.status() == 400
        assert await client.error_code() == "invalid_request"
        assert client.reads < 20
    server.assert_nothing_left()


@pytest.mark.anyio
async def test_empty_pieces_end_with_the_deadline(make_server: Callable[..., Server]) -> None:
    """Each is a message to the server, and none brings the end nearer."""
    server = make_server(upload_timeout_s=0.05)
    async with exchange(server.app, "POST", "/v1/adapters", headers=FORM) as client:

        async def receive() -> Message:
            await asyncio.sleep(0)
            return {"type": "http.request", "body": b"", "more_body": True}

        client.receive = receive
        assert await client.status() == 408
    server.assert_nothing_left()


@pytest.mark.parametrize("length", ["999999999999999999999999", "-1", "1e9", "0x10", "²", " 5", ""])
@pytest.mark.anyio
async def test_a_length_that_is_none_is_no_way_around_the_limit(
    make_server: Callable[..., Server], length: str
) -> None:
    server = make_server(max_upload_bytes=1000)
    headers = {**FORM, "content-length": length}
    async with exchange(server.app, "POST", "/v1/adapters", headers=headers) as client:
        client.send_body(part("weights", b"x" * 2000), more=True)
        assert await client.status() == 413
    server.assert_nothing_left()


@pytest.mark.anyio
async def test_a_body_that_does_not_come_times_out(make_server: Callable[..., Server]) -> None:
    server = make_server(upload_timeout_s=0.05)
    async with exchange(server.app, "POST", "/v1/adapters", headers=FORM) as client:
        client.send_body(part("name", b"sql"), more=True)
        assert await client.status() == 408
        assert await client.error_code() == "request_timeout"
    server.assert_nothing_left()


@pytest.mark.anyio
async def test_a_client_that_leaves_in_the_middle_leaves_nothing(server: Server) -> None:
    async with exchange(server.app, "POST", "/v1/adapters", headers=FORM) as client:
        client.send_body(part("name", b"sql") + part("weights", b"x" * 100), more=True)
        client.leave()
        await client.end()
    server.assert_nothing_left()


@pytest.mark.anyio
async def test_a_form_cut_anywhere_is_read_the_same(server: Server) -> None:
    body = whole(server, "name", "config", "weights", "activate")
    async with exchange(server.app, "POST", "/v1/adapters", headers=FORM) as client:
        for start in range(0, len(body), 37):
            client.send_body(body[start : start + 37], more=True)
        client.send_body(b"")
        assert await client.status() == 201
    server.upload("whole")
    assert server.digest("sql") == server.digest("whole")
