"""`vblora-serve push`, against the application itself: what is sent, what is not, and what is said of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from adapters.split_file import is_split
from adapters.store.files import uploaded_files
from service.api.keys import ApiKey
from service.cli import main
from service.commands import CommandError
from service.commands import push as push_command
from service.commands.push import PushStatus, named_directories, push
from service.commands.push_client import LONGEST_WAIT_S, TRIES, AdapterClient
from tests.api.conftest import Server

URL = "http://vblora.test"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


class Wire:
    """Carries requests to the application. `faults` come in place of the first answers, `waits` are what was slept.

    None is no fault. An exception is raised after the request has been carried, as when an answer is lost.
    """

    def __init__(self, server: Server) -> None:
        self.server = server
        self.faults: list[httpx.Response | Exception | None] = []
        self.requests: list[tuple[str, str]] = []
        self.waits: list[float] = []

    def client(self, api_key: str | None = None) -> AdapterClient:
        return AdapterClient(URL, api_key, transport=httpx.MockTransport(self._carry), sleep=self.waits.append)

    def _carry(self, request: httpx.Request) -> httpx.Response:
        self.requests.append((request.method, request.url.path))
        fault = self.faults.pop(0) if self.faults else None
        if isinstance(fault, httpx.Response):
            return fault
        answer = self.server.client.request(
            request.method, str(request.url), content=request.read(), headers=dict(request.headers)
        )
        if fault is not None:
            raise fault
        return httpx.Response(answer.status_code, headers=dict(answer.headers), content=answer.content)


@pytest.fixture
def wire(server: Server) -> Wire:
    return Wire(server)


@pytest.fixture
def folder(tmp_path: Path, adapter_dirs: dict[str, Path]) -> Path:
    """A directory with the adapters `one` and `two`, and something else."""
    for name in ("one", "two"):
        shutil.copytree(adapter_dirs[name], tmp_path / "folder" / name)
    (tmp_path / "folder" / "notes").mkdir()
    return tmp_path / "folder"


@pytest.fixture
def run(wire: Wire, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """Runs the command over the wire: (exit code, stdout, stderr)."""
    monkeypatch.delenv("VBLORA_API_KEY", raising=False)
    monkeypatch.setattr(push_command, "AdapterClient", lambda url, api_key: wire.client(api_key))

    def run(*words: object) -> tuple[int, str, str]:
        code = main(["push", *map(str, words), "--url", URL])
        out, err = capsys.readouterr()
        return code, out, err

    return run


class TestCommand:
    def test_a_folder_of_adapters(self, run: Callable[..., Any], server: Server, folder: Path) -> None:
        code, out, err = run(folder)
        assert (code, err) == (0, "")
        assert out.splitlines() == [
            f"uploaded  one  {server.digest('one')}",
            f"uploaded  two  {server.digest('two')}",
            "2 adapters: 2 uploaded",
        ]
        assert run(folder)[1].splitlines()[-1] == "2 adapters: 2 unchanged"

    def test_only_what_is_missing_is_sent(self, run: Callable[..., Any], wire: Wire, folder: Path) -> None:
        run(folder / "one")
        wire.requests.clear()
        assert run(folder, "--parallel", 1)[1].splitlines()[-1] == "2 adapters: 1 uploaded, 1 unchanged"
        assert [path for method, path in wire.requests if method == "POST"] == ["/v1/adapters"]

    def test_the_files_of_the_chat_are_sent(self, run: Callable[..., Any], server: Server, folder: Path) -> None:
        (folder / "one" / "chat_template.jinja").write_text("x")
        (folder / "one" / "tokenizer_config.json").write_text("{}")
        (folder / "one" / "README.md").write_text("not sent")
        run(folder / "one")
        stored = {path.name for path in uploaded_files(server.store.path(server.digest("one")))}
        assert stored == {CONFIG, WEIGHTS, "chat_template.jinja", "tokenizer_config.json"}
        assert "1 unchanged" in run(folder / "one")[1]

    def test_what_a_store_keeps_can_be_sent(
        self, run: Callable[..., Any], server: Server, folder: Path, tmp_path: Path
    ) -> None:
        """Out of quarantine, say, where the weights are without their bank."""
        run(folder / "one")
        kept = tmp_path / "kept"
        shutil.copytree(server.store.path(server.digest("one")), kept)
        assert is_split(kept / WEIGHTS)
        assert main(["inspect", str(kept)]) == 0
        assert run(kept, "--name", "again")[0] == 0
        assert server.digest("again") == server.digest("one")

    def test_a_name_of_ones_own(self, run: Callable[..., Any], server: Server, folder: Path) -> None:
        assert run(folder / "one", "--name", "sql")[0] == 0
        assert server.digest("sql")

    def test_other_files_need_replace(self, run: Callable[..., Any], server: Server, folder: Path) -> None:
        server.upload("one", "two")
        before = server.digest("one")
        code, out, _ = run(folder / "one")
        assert code == 1
        assert out.startswith(f"failed  one  the server has other files under this name ({before})")
        assert "--replace" in out
        assert server.digest("one") == before
        assert run(folder / "one", "--replace")[0] == 0
        assert server.digest("one") != before

    def test_one_that_is_refused_stops_no_other(self, run: Callable[..., Any], server: Server, folder: Path) -> None:
        (folder / "one" / WEIGHTS).write_bytes(b"no")
        (folder / "base").mkdir()
        shutil.copy(folder / "two" / CONFIG, folder / "base")
        code, out, _ = run(folder)
        assert code == 1
        lines = out.splitlines()
        assert lines[0].startswith("failed    base  ")
        assert f"has no {WEIGHTS}" in lines[0]
        assert lines[1].endswith("(invalid_safetensors)")
        assert lines[2:] == [f"uploaded  two   {server.digest('two')}", "3 adapters: 1 uploaded, 2 failed"]

    def test_json(self, run: Callable[..., Any], server: Server, folder: Path) -> None:
        (folder / "one" / WEIGHTS).write_bytes(b"no")
        code, out, _ = run(folder, "--json")
        answer = json.loads(out)
        assert (code, answer["uploaded"], answer["unchanged"], answer["failed"]) == (1, 1, 0, 1)
        one, two = answer["adapters"]
        assert (one["status"], one["digest"]) == ("failed", None)
        assert "(invalid_safetensors)" in one["reason"]
        assert two == {
            "name": "two",
            "directory": str(folder / "two"),
            "status": "uploaded",
            "digest": server.digest("two"),
            "reason": None,
        }

    @pytest.mark.parametrize(
        ("words", "code", "message"),
        [
            (["{tmp}/none"], 1, "is not a directory"),
            (["{tmp}/folder/notes"], 1, "holds no adapter_config.json"),
            (["{tmp}/folder", "--name", "x"], 1, "--name is for one adapter, and there are 2"),
            (["{tmp}/folder", "{tmp}/folder/one"], 1, "are both called 'one'"),
            (["{tmp}/folder", "--parallel", "0"], 2, "--parallel is 0"),
            (["{tmp}/folder", "--api-key-file", "{tmp}/none"], 2, "cannot be read"),
        ],
    )
    def test_asked_for_wrongly(
        self, run: Callable[..., Any], wire: Wire, folder: Path, words: list[str], code: int, message: str
    ) -> None:
        got, out, err = run(*(word.format(tmp=folder.parent) for word in words))
        assert (got, out) == (code, "")
        assert message in err
        assert wire.requests == []

    def test_an_address_that_is_none(self, capsys: pytest.CaptureFixture[str], folder: Path) -> None:
        assert main(["push", str(folder), "--url", "localhost:8000"]) == 2
        assert "--url is 'localhost:8000'" in capsys.readouterr().err

    @pytest.mark.parametrize("url", [URL, f"{URL}/", f"{URL}/v1", f"{URL}/v1/", f"{URL}/prefix/v1"])
    def test_the_address_may_be_that_of_openais_clients(self, url: str) -> None:
        asked: list[str] = []

        def answer(request: httpx.Request) -> httpx.Response:
            asked.append(request.url.path)
            return httpx.Response(200, json={"data": [], "next": None})

        AdapterClient(url, None, transport=httpx.MockTransport(answer)).check()
        assert asked == ["/prefix/v1/adapters" if "prefix" in url else "/v1/adapters"]


class TestApiKey:
    @pytest.fixture
    def server(self, make_server: Callable[..., Server]) -> Server:
        return make_server(keys=[ApiKey.of("alpha")])

    def test_from_the_variable_or_a_file(
        self, run: Callable[..., Any], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        code, _, err = run(folder)
        assert code == 1
        assert "(unauthorized)" in err
        monkeypatch.setenv("VBLORA_API_KEY", "alpha")
        assert run(folder / "one")[0] == 0
        monkeypatch.setenv("VBLORA_API_KEY", "wrong")
        (tmp_path / "key").write_text("alpha\n")
        (tmp_path / "key").chmod(0o600)
        assert run(folder, "--api-key-file", tmp_path / "key")[0] == 0


class TestTriesAgain:
    def test_a_busy_server(self, wire: Wire, folder: Path) -> None:
        wire.faults = [
            httpx.Response(429, headers={"Retry-After": "7"}),
            httpx.Response(503, headers={"Retry-After": "9999"}),
            httpx.Response(429, headers={"Retry-After": "soon"}),
        ]
        assert push(wire.client(), "one", folder / "one", replace=False).status is PushStatus.UPLOADED
        assert wire.waits[:2] == [7, LONGEST_WAIT_S]
        assert 0 < wire.waits[2] < LONGEST_WAIT_S

    def test_not_for_ever(self, wire: Wire, folder: Path) -> None:
        wire.faults = [httpx.Response(503) for _ in range(TRIES)]
        outcome = push(wire.client(), "one", folder / "one", replace=False)
        assert (outcome.status, outcome.digest, len(wire.waits)) == (PushStatus.FAILED, None, TRIES - 1)
        assert outcome.reason is not None
        assert "(503)" in outcome.reason

    def test_not_what_will_not_change(self, wire: Wire, folder: Path) -> None:
        error = {"error": {"code": "adapter_unavailable", "message": "too large"}}
        wire.faults = [httpx.Response(503, json=error)]
        assert push(wire.client(), "one", folder / "one", replace=False).reason == "too large (adapter_unavailable)"
        assert wire.waits == []

    def test_an_upload_whose_answer_was_lost_has_happened(self, wire: Wire, folder: Path) -> None:
        wire.faults = [None, httpx.ReadError("reset")]
        outcome = push(wire.client(), "one", folder / "one", replace=False)
        assert [method for method, _ in wire.requests] == ["GET", "POST", "POST", "GET"]
        assert (outcome.status, outcome.digest) == (PushStatus.UPLOADED, wire.server.digest("one"))

    def test_a_server_out_of_reach(self, wire: Wire) -> None:
        wire.faults = [httpx.ConnectError("refused") for _ in range(TRIES)]
        with pytest.raises(CommandError, match="cannot be reached: refused"):
            wire.client().check()

    def test_something_else_that_answers(self, wire: Wire) -> None:
        wire.faults = [httpx.Response(200, text="<html>"), httpx.Response(404, text="<html>")]
        with pytest.raises(CommandError, match="is it a vblora-serve server"):
            wire.client().check()
        with pytest.raises(CommandError, match="answers Not Found"):
            wire.client().check()


def test_what_the_server_stored_is_held_against_what_was_read(wire: Wire, folder: Path) -> None:
    other = {"digest": "sha256:" + "0" * 64}
    missing = httpx.Response(404, json={"error": {"code": "adapter_not_found", "message": "none"}})
    wire.faults = [missing, httpx.Response(201, json=other)]
    outcome = push(wire.client(), "one", folder / "one", replace=False)
    assert outcome.reason is not None
    assert "changed while they were sent" in outcome.reason


def test_links_are_followed_as_in_the_hubs_cache(wire: Wire, folder: Path, tmp_path: Path) -> None:
    weights = folder / "one" / WEIGHTS
    weights.rename(tmp_path / "blob")
    weights.symlink_to(tmp_path / "blob")
    assert push(wire.client(), "one", folder / "one", replace=False).status is PushStatus.UPLOADED
    assert push(wire.client(), "one", folder / "one", replace=False).status is PushStatus.UNCHANGED


def test_a_directory_is_called_as_it_is(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder / "one")
    assert named_directories([Path(".")], None) == {"one": Path(".")}
    assert list(named_directories([folder], None)) == ["one", "two"]
    (folder / "link").symlink_to(folder / "one")
    assert list(named_directories([folder / "link"], None)) == ["link"]
