"""The files that an adapter is stored as, whichever way it comes in: two that it needs, and those that it may bring.

Nothing else is ever taken from an upload, a directory or the Hub. No torch here: the command line sends these too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from adapters.config import CONFIG_FILE, MAX_CONFIG_BYTES
from adapters.errors import AdapterNotFound
from adapters.safetensors_header import WEIGHTS_FILE

TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
CHAT_TEMPLATE_FILE = "chat_template.jinja"
LABELS_FILE = "labels.json"

REQUIRED_FILES = (CONFIG_FILE, WEIGHTS_FILE)
OPTIONAL_FILES = (TOKENIZER_CONFIG_FILE, CHAT_TEMPLATE_FILE, LABELS_FILE)
ADAPTER_FILES = (*REQUIRED_FILES, *OPTIONAL_FILES)

MAX_OPTIONAL_BYTES = 1 << 20

# The parts of an upload that are files, and what each is stored as.
FILE_PARTS: Mapping[str, str] = {
    "config": CONFIG_FILE,
    "weights": WEIGHTS_FILE,
    "tokenizer_config": TOKENIZER_CONFIG_FILE,
    "chat_template": CHAT_TEMPLATE_FILE,
    "labels": LABELS_FILE,
}

# The most bytes of each, where the adapter's total alone does not bound it.
MOST_BYTES: Mapping[str, int] = {
    CONFIG_FILE: MAX_CONFIG_BYTES,
    TOKENIZER_CONFIG_FILE: MAX_OPTIONAL_BYTES,
    CHAT_TEMPLATE_FILE: MAX_OPTIONAL_BYTES,
    LABELS_FILE: MAX_OPTIONAL_BYTES,
}


@contextmanager
def unless_deleted(directory: Path) -> Iterator[None]:
    """While the files of a stored adapter are read. Raises AdapterNotFound if they have been deleted by the end."""
    try:
        yield
    except FileNotFoundError:
        if directory.is_dir():
            raise
    if not directory.is_dir():
        raise AdapterNotFound("the adapter was deleted", subject=f"sha256:{directory.name}")
