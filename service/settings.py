"""The settings: what the server can be told, where it may be told it, and what is said when it was told wrong.

Each is a flag (`--max-batch-size`), a variable (`VBLORA_MAX_BATCH_SIZE`) and a key of the `--config` file
(`max_batch_size`). The first of these that gives a setting decides, else its default. docs/settings.md lists them all.

    settings = load_settings({"port": "8080"}, environ=os.environ, config=Path("server.toml"))
"""

# ruff: noqa: RUF009 - _setting makes a dataclass field

from __future__ import annotations

import logging
import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from service.setting_kinds import (
    ADAPTER,
    ALLOWED_SOURCE,
    BOOLEAN,
    BYTES,
    ENDPOINT,
    NAME_SOURCE,
    ORIGIN,
    PATH,
    SECONDS,
    STORE,
    TEXT,
    AdapterSource,
    Kind,
    choice,
    whole,
)

log = logging.getLogger(__name__)

PREFIX = "VBLORA_"
CONFIG_VARIABLE = f"{PREFIX}CONFIG"
DEBUG_VARIABLE = f"{PREFIX}DEBUG"
API_KEY_VARIABLE = f"{PREFIX}API_KEY"  # a client's: `vblora-serve push` and `bench` send it

# Kubernetes describes every Service to every pod: one called `vblora` becomes VBLORA_PORT=tcp://10.0.0.1:8000.
_SERVICE_LINK = re.compile(r"\w+_SERVICE_(HOST|PORT)(_\w+)?|\w+_PORT_\d+_(TCP|UDP|SCTP)(_(PORT|PROTO|ADDR))?")
_SERVICE_URL = re.compile(r"(tcp|udp|sctp)://")


class SettingsError(Exception):
    """A setting that is unknown or cannot be read; the message names where it was given and what was expected."""


def _setting(kind: Kind, default: Any, help: str, *, shown: str | None = None) -> Any:
    """A field with what is told of it. `()` as default makes it repeatable; a function is called for the default."""
    metadata = {"kind": kind, "help": help, "repeatable": default == (), "default": shown or _text_of(kind, default)}
    if callable(default):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


def _text_of(kind: Kind, value: Any) -> str:
    values = value if isinstance(value, tuple) else (value,)
    return ",".join(kind.show(each) for each in values if each is not None)


def default_data_dir() -> Path:
    """Where a user's data belongs by the XDG base directory specification."""
    return Path(os.environ.get("XDG_DATA_HOME") or "~/.local/share").expanduser() / "vblora-serve"


@dataclass(frozen=True, slots=True)
class Settings:
    """Every setting of the server, parsed. Sizes are in bytes, times in seconds."""

    model: str | None = _setting(TEXT, None, "The base model: a Hugging Face directory or Hub id. `serve` needs it.")
    task: str = _setting(
        choice("generate", "seq2seq", "classify", "embed"),
        "generate",
        "What the server does: generate text, by a decoder or (seq2seq) an encoder and a decoder, classify texts "
        "(/v1/classify), or embed them (/v1/embeddings).",
    )
    served_model_name: str | None = _setting(
        TEXT, None, "What the API calls the base model.", shown="its Hub id, or the last part of its path"
    )
    base_alias: tuple[str, ...] = _setting(
        TEXT, (), "Another id of the same base weights: adapters that name it are accepted."
    )
    device: str = _setting(choice("auto", "cuda", "cpu"), "auto", "Where the model runs. auto: CUDA if there is one.")
    dtype: str = _setting(
        choice("auto", "float32", "bfloat16", "float16"),
        "auto",
        "The model's number format. auto: float32 on a CPU, the checkpoint's own on CUDA.",
    )
    quantization: str = _setting(
        choice("none", "int8", "nf4"),
        "none",
        "How the model's linear layers are held in memory: int8 (8 bits a weight) or nf4 (4 bits). Adapters run beside "
        "them and cannot be merged.",
    )
    tensor_parallel: int = _setting(
        whole(1),
        1,
        "Processes that hold a part of the model each, on CUDA each on its own device, and run every step together. "
        "Adapters cannot be merged then.",
    )
    threads: int = _setting(
        whole(0), 0, "CPU threads for the model's arithmetic, in each process. 0: PyTorch's choice."
    )
    pack_weights: bool = _setting(
        BOOLEAN, True, "Whether linear weights on a CPU are rearranged at load as oneDNN wants them: faster, as large."
    )
    host: str = _setting(TEXT, "127.0.0.1", "The address to listen on. 0.0.0.0: every address of the machine.")
    port: int = _setting(whole(0, 65535), 8000, "The port to listen on. 0: a free one.")
    data_dir: Path = _setting(
        PATH,
        default_data_dir,
        "Where adapters are kept. One server at a time owns it.",
        shown="$XDG_DATA_HOME/vblora-serve, or ~/.local/share/vblora-serve",
    )
    store: str | None = _setting(
        STORE,
        None,
        "Where adapters are kept that several servers share: `s3://bucket/prefix` (credentials as AWS_ACCESS_KEY_ID, "
        "AWS_SECRET_ACCESS_KEY, AWS_REGION …), or `file:///directory` for those of one machine. Then data_dir only has "
        "copies of files in use.",
        shown="in data_dir, for this server alone",
    )
    store_endpoint: str | None = _setting(
        ENDPOINT, None, "The object storage's address, if it is not Amazon's.", shown="AWS_ENDPOINT_URL, else Amazon's"
    )
    store_refresh_s: float = _setting(
        SECONDS, 1.0, "How often a shared store is asked for what other servers have changed."
    )
    store_cache: int = _setting(
        BYTES, 10 << 30, "Disk for copies of a shared store's files. The least recently used leave first."
    )
    replicas: int = _setting(
        whole(1),
        1,
        "Processes that serve, each with the model and a share of the CPUs, or a GPU, of this machine; more than one "
        "need the extra `ray`. They share `store`: without one, `objects/` in data_dir.",
    )
    adapter: tuple[AdapterSource, ...] = _setting(
        ADAPTER, (), "An adapter to register at start. One whose files are registered already is left as it is."
    )
    adapter_memory: int = _setting(
        BYTES, 1 << 30, "Memory for the factors of adapters, beside the model. The least recently used leave first."
    )
    keep_versions: int = _setting(whole(1), 5, "Versions kept of each adapter, the current one included.")
    max_batch_size: int = _setting(whole(1), 16, "Sequences that run together.")
    max_queue: int = _setting(whole(1), 256, "Sequences that may wait; beyond them a request is refused with 429.")
    max_context: int = _setting(
        whole(0),
        0,
        "Most tokens of a request, prompt and output together; with --task seq2seq, of each. 0: the model's limit.",
    )
    kv_memory: int = _setting(BYTES, 2 << 30, "Memory for keys and values: of running rows, and of prefixes kept.")
    default_max_tokens: int = _setting(
        whole(1), 1024, "Most tokens of a chat's answer when the request names no limit; the context may allow fewer."
    )
    prefill_tokens: int = _setting(whole(1), 512, "Prompt tokens run in one step: prompts must not stall decoding.")
    pooled_tokens: int = _setting(
        whole(1), 8192, "With --task classify or embed: most tokens of one forward, padding included."
    )
    pooling: str | None = _setting(
        choice("mean", "cls", "last"),
        None,
        "With --task embed: which of a text's token vectors make its embedding.",
        shown="as the model's 1_Pooling/config.json says, else mean for encoders and last for decoders",
    )
    normalize: bool | None = _setting(
        BOOLEAN,
        None,
        "With --task embed: whether embeddings are scaled to length 1.",
        shown="as the model's modules.json says, else true",
    )
    prefix_cache: bool = _setting(BOOLEAN, True, "Whether keys and values of prompts that began alike are reused.")
    auto_merge: bool = _setting(
        BOOLEAN, False, "Fold a selection into the base unasked, when all work is its alone for long enough to pay."
    )
    decode_kernels: str = _setting(
        choice("auto", "bank-direct", "gathered", "off"),
        "auto",
        "How decode steps run on CUDA: replayed from graphs, with this pair of kernels for adapters. auto: the pair "
        "that is faster here, measured at load. off, and on a CPU whatever is said: without graphs and kernels.",
    )
    decode_memory: int = _setting(
        BYTES, 1 << 30, "Memory on the device for the adapters that decode kernels read; how many fit follows from it."
    )
    decode_graphs: int = _setting(
        whole(1), 64, "Graphs captured at load, for batches of different sizes and lengths. Fewer load faster."
    )
    max_upload: int = _setting(BYTES, 256 << 20, "The largest upload of an adapter.")
    upload_timeout_s: float = _setting(SECONDS, 60.0, "How long the body of an upload may take.")
    request_timeout_s: float = _setting(
        SECONDS, 300.0, "How long a generation may take, waiting included, and a client may take nothing of it."
    )
    drain_timeout_s: float = _setting(SECONDS, 30.0, "How long running requests may go on after SIGTERM.")
    source_timeout_s: float = _setting(
        SECONDS, 60.0, "How long an adapter may take to arrive from the Hub or a bucket."
    )
    allow_source: tuple[Path | str, ...] = _setting(
        ALLOWED_SOURCE,
        (),
        "A directory under which, or repositories of the Hub or places in a bucket from which, adapters may be "
        "registered over HTTP: `/adapters`, `hf://org/repo`, `hf://org/*`, `hf://*`, `s3://bucket/prefix*`.",
    )
    resolve: tuple[Path | str, ...] = _setting(
        NAME_SOURCE,
        (),
        "Where an adapter is looked up whose name is asked for and not known: `dir:/adapters`, `hf://org/*`, "
        "`hf://org/prefix-*`; the name stands in for `*`.",
    )
    adapters_dir: Path | None = _setting(
        PATH, None, "A directory whose sub-directories are adapters: registered at start, and again when they change."
    )
    adapters_dir_interval_s: float = _setting(SECONDS, 5.0, "How often --adapters-dir is looked through.")
    api_key_file: Path | None = _setting(
        PATH, None, "A file of API keys, as `vblora-serve key` writes it. Without it no key is asked for."
    )
    metrics_public: bool = _setting(
        BOOLEAN, True, "Whether /metrics needs no API key, and /v1/stats shows every tenant what is everybody's."
    )
    cors_origin: tuple[str, ...] = _setting(
        ORIGIN, (), "An origin whose web pages may use the server from a browser. *: every one."
    )
    log_format: str = _setting(choice("text", "json"), "text", "How log lines are written.")
    log_prompts: bool = _setting(
        BOOLEAN, False, "Whether the access log gets prompts and outputs too. They are private: for debugging only."
    )
    log_level: str = _setting(choice("debug", "info", "warning", "error"), "info", "The least severe records logged.")

    def shown(self) -> dict[str, str]:
        """The settings that have a value, as text that would be read as that value."""
        texts = {setting.name: _text_of(setting.kind, getattr(self, setting.name)) for setting in SETTINGS}
        return {name: text for name, text in texts.items() if text}


@dataclass(frozen=True, slots=True)
class Setting:
    """One field of `Settings` as people write it; `default` is text for them. A `repeatable` one holds a tuple."""

    name: str
    kind: Kind
    help: str
    repeatable: bool
    default: str

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def variable(self) -> str:
        return PREFIX + self.name.upper()


SETTINGS: tuple[Setting, ...] = tuple(Setting(each.name, **each.metadata) for each in fields(Settings))
_BY_NAME: Mapping[str, Setting] = {setting.name: setting for setting in SETTINGS}


@dataclass(frozen=True, slots=True)
class _Given:
    """A value as it was given, and where: `--port`, `VBLORA_PORT` or `port in server.toml`."""

    where: str
    value: Any


def load_settings(
    flags: Mapping[str, Any], *, environ: Mapping[str, str] = os.environ, config: Path | None = None
) -> Settings:
    """The settings from the flags given (by setting's name), the environment and a configuration file.

    Raises SettingsError for a name that is no setting and for a value that cannot be read.
    """
    if config is None and environ.get(CONFIG_VARIABLE):
        config = Path(environ[CONFIG_VARIABLE])
    given = {} if config is None else _from_file(config)
    given |= _from_environment(environ)
    given |= {name: _Given(_BY_NAME[name].flag, value) for name, value in flags.items()}
    return Settings(**{name: _parsed(_BY_NAME[name], each) for name, each in given.items()})


def _from_file(path: Path) -> dict[str, _Given]:
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(f"the configuration file {path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise SettingsError(f"the configuration file {path} is not TOML: {error}") from error
    given: dict[str, _Given] = {}
    for key, value in values.items():
        name = key.replace("-", "_")
        if name not in _BY_NAME:
            raise _unknown(f"{key} in {path}", name, list(_BY_NAME))
        if name in given:
            raise SettingsError(f"{path} gives {name} twice, with a dash and with an underscore: remove one")
        given[name] = _Given(f"{key} in {path}", value)
    return given


def _from_environment(environ: Mapping[str, str]) -> dict[str, _Given]:
    """Empty variables count as not set: that is how compose files and charts pass on what nobody gave."""
    by_variable = {setting.variable: setting for setting in SETTINGS}
    given: dict[str, _Given] = {}
    for variable, text in environ.items():
        if not variable.startswith(PREFIX) or not text or _is_service_link(variable, text):
            continue
        if variable in by_variable:
            setting = by_variable[variable]
            given[setting.name] = _Given(variable, text.split(",") if setting.repeatable else text)
        elif variable not in (CONFIG_VARIABLE, DEBUG_VARIABLE, API_KEY_VARIABLE):
            raise _unknown(variable, variable, list(by_variable))
    return given


def _is_service_link(variable: str, text: str) -> bool:
    return bool(_SERVICE_LINK.fullmatch(variable) or _SERVICE_URL.match(text))


def _unknown(where: str, name: str, known: list[str]) -> SettingsError:
    nearest = get_close_matches(name, known, n=1, cutoff=0.0)[0]
    return SettingsError(f"{where} is no setting; the nearest is {nearest}")


def _parsed(setting: Setting, given: _Given) -> Any:
    if not setting.repeatable:
        return _value(setting.kind, given.where, given.value)
    values = given.value if isinstance(given.value, list) else [given.value]
    return tuple(_value(setting.kind, given.where, each) for each in values)


def _value(kind: Kind, where: str, value: Any) -> Any:
    text = value.strip() if isinstance(value, str) else None
    if type(value) in kind.toml:  # not isinstance: a bool is an int
        text = str(value).lower()
    try:
        if text is None:
            raise ValueError
        return kind.parse(text)
    except ValueError:
        raise SettingsError(f"{where} is {value!r}; expected {kind.expected}") from None


def load_api_key(path: Path | None, environ: Mapping[str, str] = os.environ) -> str | None:
    """A client's key: the first line of a file, else VBLORA_API_KEY, else none. Raises SettingsError."""
    if path is not None:
        return _read_key(path)
    key = environ.get(API_KEY_VARIABLE, "").strip()
    if not _is_key(key):
        raise SettingsError(f"{API_KEY_VARIABLE} has characters that no HTTP header carries")
    return key or None


def _read_key(path: Path) -> str:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise SettingsError(f"the API key file {path} cannot be read: {reason}") from error
    keys = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not keys or not _is_key(keys[0]) or keys[0].startswith("sha256:"):
        raise SettingsError(f"the API key file {path} does not begin with a key: write the key there, on one line")
    return keys[0]


def _is_key(text: str) -> bool:
    return text.isascii() and text.isprintable() and " " not in text
