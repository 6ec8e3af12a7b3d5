"""Where settings come from, which source wins, and what is said of a wrong one."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

import service
from service.commands.settings_doc import render
from service.setting_kinds import AdapterSource, format_size, parse_size
from service.settings import SETTINGS, Settings, SettingsError, load_api_key, load_settings

DOCS = Path(service.__file__).parent.parent / "docs" / "settings.md"


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return tmp_path / "server.toml"


def load(
    flags: dict[str, Any] | None = None, environ: dict[str, str] | None = None, config: Path | None = None
) -> Settings:
    return load_settings(flags or {}, environ=environ or {}, config=config)


class TestPrecedence:
    def test_nothing_given_is_the_defaults(self) -> None:
        assert load() == Settings()

    def test_flag_over_variable_over_file_over_default(self, config: Path) -> None:
        config.write_text("max_batch_size = 1\nmax_queue = 1\nkeep_versions = 1\n")
        environ = {"VBLORA_MAX_BATCH_SIZE": "2", "VBLORA_MAX_QUEUE": "2"}
        settings = load({"max_batch_size": "3"}, environ, config)
        assert (settings.max_batch_size, settings.max_queue, settings.keep_versions) == (3, 2, 1)
        assert settings.port == Settings().port

    def test_a_repeatable_flag_replaces_the_variable(self) -> None:
        assert load({"base_alias": ["a/b"]}, {"VBLORA_BASE_ALIAS": "c/d,e/f"}).base_alias == ("a/b",)

    def test_config_file_named_by_a_variable(self, config: Path) -> None:
        config.write_text("port = 9000\n")
        assert load(environ={"VBLORA_CONFIG": str(config)}).port == 9000

    @pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.name)
    def test_every_setting_is_the_same_from_every_source(self, setting: Any, config: Path) -> None:
        text = {
            "model": "org/name", "served_model_name": "name", "base_alias": "org/other", "device": "cpu",
            "dtype": "bfloat16", "quantization": "nf4", "threads": "2", "host": "0.0.0.0", "port": "9000",
            "data_dir": "/data", "store": "s3://bucket/prefix", "store_endpoint": "http://127.0.0.1:9000",
            "replicas": "2", "store_refresh_s": "0.5", "store_cache": "5GiB",
            "adapter": "sql=/adapters/sql", "adapter_memory": "2GiB", "keep_versions": "3",
            "max_batch_size": "4",
            "max_queue": "5", "max_context": "6", "kv_memory": "3GiB", "prefill_tokens": "7", "prefix_cache": "false",
            "default_max_tokens": "9", "auto_merge": "true",
            "decode_kernels": "gathered", "decode_memory": "3MiB", "decode_graphs": "13",
            "max_upload": "7MiB", "upload_timeout_s": "8.5",
            "request_timeout_s": "9", "drain_timeout_s": "10", "source_timeout_s": "11",
            "allow_source": "/adapters", "resolve": "dir:/adapters", "adapters_dir": "/adapters",
            "adapters_dir_interval_s": "12", "api_key_file": "/keys",
            "metrics_public": "false", "cors_origin": "https://a.example:8443", "log_format": "json",
            "log_prompts": "true", "log_level": "debug", "pack_weights": "false", "task": "embed",
            "pooling": "cls", "normalize": "false", "pooled_tokens": "100", "tensor_parallel": "2",
        }[setting.name]  # fmt: skip
        config.write_text(f'{setting.flag[2:]} = "{text}"\n')
        flag = load({setting.name: [text] if setting.repeatable else text})
        assert getattr(flag, setting.name) != getattr(Settings(), setting.name)
        assert load(environ={setting.variable: text}) == flag
        assert load(config=config) == flag
        assert flag.shown()[setting.name] == text


class TestValues:
    def test_toml_types(self, config: Path) -> None:
        config.write_text(
            "metrics-public = false\nrequest_timeout_s = 2\nupload_timeout_s = 1.5\nadapter-memory = 1024\n"
            'adapter = ["a=/x", "b=/y=z"]\nallow_source = "/one"\n'
        )
        settings = load(config=config)
        assert settings.metrics_public is False
        assert (settings.request_timeout_s, settings.upload_timeout_s) == (2.0, 1.5)
        assert settings.adapter_memory == 1024
        assert settings.adapter == (AdapterSource("a", "/x"), AdapterSource("b", "/y=z"))
        assert settings.allow_source == (Path("/one"),)

    def test_sources(self) -> None:
        settings = load(
            {"allow_source": ["~/x", "hf://*", "hf://org/*", "hf://org/repo"], "resolve": ["dir:rel", "hf://org/vb-*"]},
            {"HOME": "/home/ada"},
        )
        assert settings.allow_source == (Path("~/x").expanduser(), "hf://*", "hf://org/*", "hf://org/repo")
        assert settings.resolve == (Path("rel"), "hf://org/vb-*")
        assert settings.shown()["resolve"] == "dir:rel,hf://org/vb-*"

    @pytest.mark.parametrize(
        ("text", "size"),
        [("1024", 1024), ("1 KiB", 1024), ("2GiB", 2 << 30), ("1.5mib", 3 << 19), ("500MB", 500_000_000), ("7b", 7)],
    )
    def test_sizes(self, text: str, size: int) -> None:
        assert parse_size(text) == size
        assert parse_size(format_size(size)) == size

    @pytest.mark.parametrize("text", ["", "GiB", "-1", "1e9", "2 apples", "1GiB2", "٣"])
    def test_no_sizes(self, text: str) -> None:
        with pytest.raises(ValueError):  # noqa: PT011 - what a Kind's parse promises
            parse_size(text)

    @pytest.mark.parametrize(
        "origin", ["*", "https://a.example", "http://localhost:3000", "http://[::1]:8080", "tauri://localhost"]
    )
    def test_origins(self, origin: str) -> None:
        assert load({"cors_origin": [origin]}).cors_origin == (origin,)

    def test_origins_are_compared_as_browsers_write_them(self) -> None:
        assert load({"cors_origin": ["HTTPS://A.Example"]}).cors_origin == ("https://a.example",)

    def test_home_and_xdg(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HOME", "/home/ada")
        monkeypatch.delenv("XDG_DATA_HOME", raising=False)
        assert Settings().data_dir == Path("/home/ada/.local/share/vblora-serve")
        assert load({"data_dir": "~/data"}).data_dir == Path("/home/ada/data")
        monkeypatch.setenv("XDG_DATA_HOME", "/xdg")
        assert Settings().data_dir == Path("/xdg/vblora-serve")

    def test_empty_variables_are_not_set(self) -> None:
        assert load(environ={"VBLORA_MODEL": "", "VBLORA_PORT": ""}) == Settings()

    def test_kubernetes_describes_services_named_like_us(self) -> None:
        environ = {
            "VBLORA_PORT": "tcp://10.0.0.1:8000",
            "VBLORA_SERVICE_HOST": "10.0.0.1",
            "VBLORA_SERVE_SERVICE_PORT_HTTP": "8000",
            "VBLORA_SERVE_PORT_8000_TCP_ADDR": "10.0.0.1",
            "VBLORA_SERVE_PORT": "tcp://10.0.0.1:8000",
        }
        assert load(environ=environ) == Settings()


class TestErrors:
    @pytest.mark.parametrize(
        ("name", "text", "expected"),
        [
            ("port", "eight", "--port is 'eight'; expected a whole number from 0 to 65535"),
            ("port", "65536", "--port is '65536'; expected a whole number from 0 to 65535"),
            ("max_batch_size", "0", "--max-batch-size is '0'; expected a whole number of at least 1"),
            ("request_timeout_s", "inf", "--request-timeout-s is 'inf'; expected a number of seconds above 0"),
            ("adapter_memory", "0", "--adapter-memory is '0'; expected a number of bytes such as 512MiB"),
            ("metrics_public", "maybe", "--metrics-public is 'maybe'; expected true or false"),
            ("dtype", "int4", "--dtype is 'int4'; expected one of auto, float32, bfloat16, float16"),
            (
                "adapter",
                ["sql"],
                "--adapter is 'sql'; expected NAME=DIRECTORY, NAME=hf://org/repo or NAME=s3://bucket/prefix",
            ),
            (
                "allow_source",
                ["s3://x/*"],
                "--allow-source is 's3://x/*'; expected a directory, hf://org/repo, hf://org/*",
            ),
            ("store", "s3://x", "--store is 's3://x'; expected s3://bucket, s3://bucket/prefix or file:///directory"),
            ("store", "file://x", "--store is 'file://x'; expected s3://bucket, s3://bucket/prefix or file:///"),
            ("store_endpoint", "minio:9000", "--store-endpoint is 'minio:9000'; expected an address such as https://"),
            (
                "allow_source",
                ["hf://org"],
                "--allow-source is 'hf://org'; expected a directory, hf://org/repo, hf://org/*",
            ),
            ("resolve", ["/x"], "--resolve is '/x'; expected dir:DIRECTORY, hf://org/* or hf://org/prefix-*"),
            ("resolve", ["dir:"], "--resolve is 'dir:'; expected dir:DIRECTORY, hf://org/* or hf://org/prefix-*"),
            ("resolve", ["hf://org/sql"], "--resolve is 'hf://org/sql'; expected dir:DIRECTORY, hf://org/*"),
            ("cors_origin", ["a.example"], "--cors-origin is 'a.example'; expected * or an origin such as https://"),
            ("cors_origin", ["https://a.example/x"], "--cors-origin is 'https://a.example/x'; expected * or an origin"),
            ("data_dir", " ", "--data-dir is ' '; expected a path"),
        ],
    )
    def test_flag(self, name: str, text: Any, expected: str) -> None:
        with pytest.raises(SettingsError) as caught:
            load({name: text})
        assert str(caught.value).startswith(expected)

    def test_variable(self) -> None:
        with pytest.raises(SettingsError, match="VBLORA_PORT is 'x'; expected a whole number from 0 to 65535"):
            load(environ={"VBLORA_PORT": "x"})

    @pytest.mark.parametrize(
        "line", ["port = true", "port = 1.5", 'port = ["1"]', "port = 2024-01-01", "model = 3", "metrics_public = 1"]
    )
    def test_type_in_file(self, config: Path, line: str) -> None:
        config.write_text(line)
        with pytest.raises(SettingsError) as caught:
            load(config=config)
        assert str(caught.value).startswith(f"{line.split()[0]} in {config} is ")
        assert "; expected " in str(caught.value)

    def test_unknown_variable_names_the_nearest(self) -> None:
        with pytest.raises(SettingsError, match="VBLORA_MAX_BATCH is no setting; the nearest is VBLORA_MAX_BATCH_SIZE"):
            load(environ={"VBLORA_MAX_BATCH": "1"})

    def test_unknown_key_names_the_nearest(self, config: Path) -> None:
        config.write_text("max-batchsize = 1")
        with pytest.raises(SettingsError, match=r"max-batchsize in .*server.toml is no setting; .* max_batch_size"):
            load(config=config)

    def test_key_given_twice(self, config: Path) -> None:
        config.write_text("log_level = 'info'\nlog-level = 'info'\n")
        with pytest.raises(SettingsError, match="gives log_level twice"):
            load(config=config)

    def test_file_missing_or_not_toml(self, config: Path) -> None:
        with pytest.raises(SettingsError, match="cannot be read: No such file"):
            load(config=config)
        config.write_text("port = ")
        with pytest.raises(SettingsError, match="is not TOML"):
            load(config=config)
        config.write_bytes(b"\xff")
        with pytest.raises(SettingsError, match="is not TOML"):
            load(config=config)


class TestApiKey:
    def test_the_first_of_a_file_else_the_variable(self, tmp_path: Path) -> None:
        path = tmp_path / "keys"
        path.write_text("# mine\nalpha\nbeta\n")
        assert load_api_key(path, {"VBLORA_API_KEY": "gamma"}) == "alpha"
        assert load_api_key(None, {"VBLORA_API_KEY": " gamma\n"}) == "gamma"
        assert load_api_key(None, {}) is None

    def test_one_that_no_header_carries(self) -> None:
        with pytest.raises(SettingsError, match="VBLORA_API_KEY has characters") as caught:
            load_api_key(None, {"VBLORA_API_KEY": "my secret"})
        assert "secret" not in str(caught.value)

    def test_the_variable_is_no_setting_and_no_error(self) -> None:
        assert load(environ={"VBLORA_API_KEY": "gamma"}) == Settings()


class TestDocumentation:
    def test_the_file_is_what_the_settings_say(self) -> None:
        assert DOCS.read_text(encoding="utf-8") == render(), "run: vblora-serve settings-doc > docs/settings.md"

    def test_every_setting_has_help_and_is_in_it(self) -> None:
        assert [setting.name for setting in SETTINGS] == [each.name for each in fields(Settings)]
        for setting in SETTINGS:
            assert setting.help.endswith(".")
            assert f"| `{setting.name}` |" in render()
