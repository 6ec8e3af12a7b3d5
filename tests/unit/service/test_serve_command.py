"""`vblora-serve serve` and what it is put together from: until it ends, and why it does not begin."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import threading
import urllib.request
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from adapters.store import digest_of
from service.engine.seam import EngineState
from service.setting_kinds import AdapterSource
from service.settings import Settings, SettingsError
from tests.factories import rewrite
from tests.fake_hub import FakeHub
from tests.unit.service.command_line import run

pytestmark = pytest.mark.usefixtures("no_variables", "restored_logging")


class TestServe:
    @pytest.fixture
    def settings(self, base: Path, compact: Path, tmp_path: Path) -> Settings:
        sources = (AdapterSource("sql", str(compact)),)
        return Settings(model=str(base), data_dir=tmp_path / "data", adapter=sources, port=0, device="cpu")

    def test_it_answers_until_sigterm(self, settings: Settings, capsys: pytest.CaptureFixture[str]) -> None:
        from service.assembly import build_server
        from service.commands.serve import introduce, listening, serve, url_of

        answers = []

        def ask(url: str) -> None:
            try:
                body = json.dumps({"prompt": "hi", "adapter": "sql", "max_new_tokens": 2, "ignore_eos": True}).encode()
                request = urllib.request.Request(f"{url}/v1/generate", body, {"Content-Type": "application/json"})
                for wanted in (request, f"{url}/metrics"):
                    with urllib.request.urlopen(wanted, timeout=30) as answer:
                        answers.append(answer.read().decode())
            finally:
                os.kill(os.getpid(), signal.SIGTERM)

        server = build_server(settings)
        with listening("127.0.0.1", 0) as listener:
            url = url_of(listener)
            client = threading.Thread(target=ask, args=(url,))
            serve(server, listener, drain_timeout_s=10, announce=client.start)
            client.join()
        introduce(server.state.base.id, server.state.store, server.state.task, url, with_keys=False)
        assert server.engine.state is EngineState.STOPPED
        server.close()
        assert json.loads(answers[0])["selection"]["adapters"][0]["name"] == "sql"
        assert "vblora_completion_tokens_total 2.0" in answers[1]
        out = capsys.readouterr().out
        assert out.startswith("Serving tiny-base with 1 adapters at http://127.0.0.1:")
        assert '"adapter": "sql"' in out

    def test_requests_that_do_not_end_in_time_are_told(
        self, settings: Settings, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from service.assembly import build_server
        from service.commands.serve import listening, serve, url_of

        events: list[bytes] = []
        body = {"prompt": "hi", "n": 16, "max_new_tokens": 250, "ignore_eos": True, "stream": True}

        def ask(url: str) -> None:
            headers = {"Content-Type": "application/json"}
            request = urllib.request.Request(f"{url}/v1/generate", json.dumps(body).encode(), headers)
            with urllib.request.urlopen(request, timeout=30) as answer:
                events.append(answer.readline())
                os.kill(os.getpid(), signal.SIGTERM)
                events.extend(answer)

        server = build_server(settings)
        monkeypatch.setattr(server.engine, "drain", lambda timeout_s: False)
        with listening("127.0.0.1", 0) as listener:
            client = threading.Thread(target=ask, args=(url_of(listener),))
            serve(server, listener, drain_timeout_s=1, announce=client.start)
            client.join()
        server.close()
        assert b"the server stopped before the request was finished" in b"".join(events)
        assert b"[DONE]" not in b"".join(events)

    def test_registering_again_changes_nothing(self, settings: Settings, full: Path) -> None:
        from service.assembly import build_server

        for _ in range(2):
            server = build_server(settings)
            record = server.state.store.get("", "sql")
            server.close()
            assert len(record.versions) == 1
        changed = replace(settings, adapter=(AdapterSource("sql", str(full)),))
        server = build_server(changed)
        assert len(server.state.store.get("", "sql").versions) == 2
        server.state.store.rollback("", "sql", record.digest)
        server.close()
        server = build_server(changed)
        assert server.state.store.get("", "sql").digest == record.digest, "a rollback outlives a restart"
        server.close()

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"adapter": (AdapterSource("sql", "/none"),)}, "'sql' in /none is refused .*: '/none' is not a directory"),
            (
                {"adapter": (AdapterSource("sql", "hf://o/r"),)},
                "'sql' in hf://o/r is refused .* runs with HF_HUB_OFFLINE",
            ),
            ({"adapter": (AdapterSource("sql", "hf://o"),)}, "'sql' in hf://o is refused .* is no repository"),
            ({"adapters_dir": Path("/none")}, "adapters_dir is /none, which is not a directory"),
            ({"api_key_file": Path("/none")}, "the API key file /none cannot be read"),
        ],
    )
    def test_wrong_settings(self, settings: Settings, change: dict[str, Any], message: str) -> None:
        from service.assembly import build_server

        with pytest.raises(SettingsError, match=message):
            build_server(replace(settings, **change))
        build_server(settings).close()  # nothing was left open

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"adapter": (AdapterSource("a b", "/"),)}, "'a b' cannot name an adapter"),
            ({"adapter": (AdapterSource("base", "/"),)}, "'base' is reserved for the base model"),
            ({"adapter": (AdapterSource("sql", "/none"),)}, "'/none' is not a directory"),
            ({"adapters_dir": Path("/none")}, "adapters_dir is /none, which is not a directory"),
        ],
    )
    def test_what_needs_no_model_is_refused_before_it_loads(
        self, settings: Settings, change: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from service import assembly

        monkeypatch.setattr(assembly, "load_base", lambda *_, **__: pytest.fail("loaded the model"))
        with pytest.raises(SettingsError, match=message):
            assembly.build_server(replace(settings, **change))

    def test_adapters_of_the_hub_at_start(self, settings: Settings, hub: FakeHub, compact: Path) -> None:
        from service.assembly import build_server

        hub.add("org/sql", compact)
        expected = digest_of(compact)
        server = build_server(replace(settings, adapter=(AdapterSource("sql", "hf://org/sql"),)))
        assert server.state.store.get("", "sql").digest == expected
        server.close()

    def test_settings_open_the_ways_in(self, settings: Settings, compact: Path, tmp_path: Path) -> None:
        from service.api.hub_ids import HubPattern
        from service.assembly import build_server

        shutil.copytree(compact, tmp_path / "watched" / "mine")
        (tmp_path / "watched" / "half").mkdir()
        shutil.copy(compact / "adapter_config.json", tmp_path / "watched" / "half")
        server = build_server(
            replace(
                settings,
                allow_source=(tmp_path, "hf://org/*"),
                resolve=(compact.parent, "hf://org/*"),
                adapters_dir=tmp_path / "watched",
                source_timeout_s=7.0,
            )
        )
        api = server.state.settings
        assert (api.allow_source, api.allow_hub) == ((tmp_path,), (HubPattern("org", None),))
        assert api.source_timeout_s == 7.0
        assert [record.name for record in server.state.store.list("")[0]] == ["mine", "sql"]
        assert server.state.resolver is not None
        server.state.resolver.resolve(compact.name)
        assert server.state.store.get("", compact.name)
        server.close()
        assert "vblora-adapters-dir" not in {thread.name for thread in threading.enumerate()}

    def test_an_adapter_that_is_refused(
        self, capsys: pytest.CaptureFixture[str], settings: Settings, compact: Path, tmp_path: Path
    ) -> None:
        broken = rewrite(compact, tmp_path / "broken", config={"r": 5})
        words = ["--model", settings.model, "--data-dir", settings.data_dir, "--port", 0, "--adapter", f"x={broken}"]
        code, _, err = run(capsys, "serve", *words)
        assert code == 2
        assert f"error: the adapter 'x' in {broken} is refused (shape_mismatch): " in err

    def test_no_model(self, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
        code, _, err = run(capsys, "serve", "--model", tmp_path, "--data-dir", tmp_path / "data", "--port", 0)
        assert code == 1
        assert "error: cannot load the base model" in err

    def test_port_in_use(self, capsys: pytest.CaptureFixture[str], base: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            code, _, err = run(capsys, "serve", "--model", base, "--port", port)
        assert code == 2
        assert f"cannot listen on 127.0.0.1 port {port}: Address already in use" in err
