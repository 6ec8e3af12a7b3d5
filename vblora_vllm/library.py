"""A directory of adapters, each in a sub-directory of its name, and the cache of what vLLM loads of them."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from adapters.binding import BaseIdentity, check_base_name
from adapters.config import CONFIG_FILE
from adapters.errors import BaseModelMismatch, StoreError
from adapters.export import write_adapter
from adapters.reading import read_adapter, read_adapter_layout
from adapters.safetensors_header import WEIGHTS_FILE
from adapters.store import digest_of_files
from adapters.store.names import is_name
from vblora_vllm.conversion import as_vllm_takes, check_takeable
from vblora_vllm.settings import BASE_ALIAS, PluginSettings

# What is written for a digest: counted up when that changes, so that what an older release wrote is not taken for it.
CACHE_FORMAT = "1"

_HUB_SNAPSHOT = re.compile(r".*/models--([^/]+?)--([^/]+)/snapshots/[^/]+/?")


@dataclass(frozen=True, slots=True)
class Converted:
    """A directory for vLLM to load. `digest` is the adapter's own; `warning` says what speaks against it, if anything.

    The directory's name holds the digest, and it never changes: vLLM's prefix cache is keyed by name and path, so a
    changed adapter meets nothing that its predecessor left there.
    """

    path: Path
    digest: str
    warning: str | None


class Library:
    """Finds adapters by name, and converts each once. Several threads and processes may share the cache."""

    def __init__(self, settings: PluginSettings) -> None:
        self._adapters = settings.adapters
        self._cache = settings.cache / CACHE_FORMAT
        self._aliases = settings.base_aliases

    def find(self, name: str) -> Path | None:
        """The directory of the adapter of that name; None if there is none, or none can be called so."""
        if not is_name(name):
            return None
        root = self._adapters.resolve()
        directory = (root / name).resolve()
        if not directory.is_relative_to(root) or not (directory / CONFIG_FILE).is_file():
            return None
        return directory

    def convert(self, directory: Path, base_model: str) -> Converted:
        """The adapter as vLLM takes it, from the cache if it is there. Reads and writes the disk.

        Raises a CheckpointError for an adapter that is refused: damaged, of another base, or with more than LoRA;
        StoreError for one that changes meanwhile, OSError if the cache cannot be written.
        """
        layout = read_adapter_layout(directory)
        check_takeable(layout)
        warning = _check_base(layout.config.base_model_name_or_path, base_model, self._aliases)
        digest = _digest(directory)
        path = self._cache / digest.removeprefix("sha256:")
        if not path.is_dir():
            self._write(directory, digest, path)
        return Converted(path, digest, warning)

    @staticmethod
    def _write(directory: Path, digest: str, path: Path) -> None:
        lora = as_vllm_takes(read_adapter(directory))
        if _digest(directory) != digest:
            raise StoreError(f"the adapter in {directory.name} changed while it was read: try again")
        try:
            write_adapter(lora, path)
        except OSError:
            if not path.is_dir():  # else another thread or process was faster, and has written the same
                raise


def _digest(directory: Path) -> str:
    """Of what is served; a tokenizer beside it changes nothing in vLLM."""
    return digest_of_files({name: directory / name for name in (CONFIG_FILE, WEIGHTS_FILE)})


def _check_base(named: str | None, base_model: str, aliases: Collection[str]) -> str | None:
    """Compares the base that the config names with vLLM's `--model`. Returns a warning, or None."""
    try:
        proven = check_base_name(named, _identity(base_model, aliases)) is None
    except BaseModelMismatch as mismatch:
        raise BaseModelMismatch(
            f"the adapter was trained on {named!r}, but vLLM runs {base_model!r}; if they are the same weights, start "
            f"vLLM with {BASE_ALIAS}={named}",
            subject=mismatch.subject,
        ) from None
    # vLLM passes over tensors of modules that its model does not have, so this is all that is checked.
    called = "no base" if named is None else f"the base {named!r}"
    return None if proven else f"its config names {called}: nothing proves that it was trained on {base_model!r}"


def _identity(base_model: str, aliases: Collection[str]) -> BaseIdentity:
    """What an adapter may call vLLM's model: its Hub id, also where vLLM has replaced that by its local snapshot."""
    names = {base_model, *aliases}
    if (snapshot := _HUB_SNAPSHOT.fullmatch(base_model)) is not None:
        names.add(f"{snapshot[1]}/{snapshot[2]}")
    directory = Path(base_model)
    return BaseIdentity(frozenset(names), directory.resolve().name if directory.is_dir() else None)
