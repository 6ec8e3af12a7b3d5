"""An adapter as a tar archive of a PEFT directory, in the storage that is asked for."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Literal

from adapters.export import converted, write_files
from adapters.parameters import Storage
from adapters.reading import AnyCheckpoint
from adapters.split_file import file_size, open_file
from adapters.store import AdapterRecord
from service.api.adapter_files import ADAPTER_FILES, OPTIONAL_FILES, unless_deleted
from service.api.deps import ServerState

ExportFormat = Literal["topk", "logits", "lora"]

_CHUNK = 1 << 20


def pack(state: ServerState, record: AdapterRecord, format: ExportFormat) -> IO[bytes]:
    """The archive, as an open file that is deleted with its last reader. Reads and writes the disk.

    An adapter in the storage it has is packed as it was uploaded, to the byte. Raises AdapterNotFound when it has been
    deleted meanwhile, InvalidSelection for a storage that it cannot have.
    """
    with state.store.reading(record.digest) as stored, state.store.staging() as staged:
        directory = stored
        if record.info["parameters"]["storage"] != format:
            directory = staged / "converted"
            directory.mkdir()
            write_files(_converted(state, record, format), directory)
        path = staged / "archive"
        with unless_deleted(stored), tarfile.open(path, "x") as archive:
            for name in ADAPTER_FILES:
                source = (stored if name in OPTIONAL_FILES else directory) / name
                if source.is_file():
                    _add(archive, f"{record.name}/{name}", source, record.created_at)
        return open(path, "rb")  # still readable when the staging directory is gone


def stream(file: IO[bytes]) -> Iterator[bytes]:
    """The file's content, a piece at a time; closes it."""
    with file:
        while chunk := file.read(_CHUNK):
            yield chunk


def size_of(file: IO[bytes]) -> int:
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    return size


def _converted(state: ServerState, record: AdapterRecord, format: ExportFormat) -> AnyCheckpoint:
    return converted(state.registry.compact(record.digest), Storage(format))


def _add(archive: tarfile.TarFile, name: str, source: Path, modified: float) -> None:
    """One plain file, owned by nobody in particular: the same adapter is the same archive."""
    info = tarfile.TarInfo(name)
    info.size, info.mtime, info.mode = file_size(source), int(modified), 0o644
    with open_file(source) as file:
        archive.addfile(info, file)
