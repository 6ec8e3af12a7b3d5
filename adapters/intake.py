"""The way from an adapter's files to one base model: read strictly, held against their digest and against the base."""

from __future__ import annotations

from collections import deque
from pathlib import Path

from adapters.binding import BaseIdentity, check_base_name, check_layout, check_range
from adapters.errors import AdapterError, AdapterNotFound, AdapterUnavailable, BaseModelMismatch
from adapters.layers import AdaptedModel
from adapters.reading import AnyCheckpoint, AnyLayout, read_adapter, read_adapter_layout
from adapters.store import AdapterVersion, Store, digest_of

_LAYOUTS_KEPT = 32


class AdapterIntake:
    """Reads adapters for one base model. Any thread may call it, but no event loop: it waits for files."""

    def __init__(self, store: Store, model: AdaptedModel, identity: BaseIdentity) -> None:
        self._store = store
        self._model = model
        self._identity = identity
        self._fitting: deque[AnyLayout] = deque(maxlen=_LAYOUTS_KEPT)

    @property
    def layouts(self) -> list[AnyLayout]:
        """The layouts of adapters seen so far, each once; of many, the last."""
        return list(self._fitting)

    def staged_layout(self, staged: Path, *, allow_base_mismatch: bool) -> tuple[AnyLayout, list[str]]:
        """What a directory that is not stored yet holds, and what there is to warn of. No tensor is read.

        Raises CheckpointError for one that does not fit the base.
        """
        layout = read_adapter_layout(staged)
        named = layout.config.base_model_name_or_path
        try:
            warning = check_base_name(named, self._identity)
        except BaseModelMismatch as error:
            if not allow_base_mismatch:
                raise
            warning = f"taken although {error.message}"
        self._check_layout(layout)
        return layout, [warning] if warning else []

    def staged(self, staged: Path) -> AnyCheckpoint:
        """The tensors of a directory whose layout fits. Raises CheckpointError."""
        checkpoint = read_adapter(staged)
        check_range(checkpoint.extras, self._model)
        return checkpoint

    def stored(self, digest: str) -> AnyCheckpoint:
        """One version. Raises AdapterNotFound (deleted meanwhile), AdapterUnavailable, CheckpointError or OSError."""
        with self._store.reading(digest) as directory:
            try:
                checkpoint = read_adapter(_verified(directory, digest))
            except (AdapterError, OSError) as error:
                if directory.is_dir():
                    raise
                raise AdapterNotFound("the adapter was deleted", subject=digest) from error
        self._check_layout(checkpoint.layout)
        if not self._store.checked_at_start:
            self._check_first_use(digest, checkpoint)
        return checkpoint

    def fault_of(self, version: AdapterVersion) -> AdapterError | None:
        """Why a stored version cannot be served, None if it can: its files, the base it names, its layout."""
        try:
            with self._store.reading(version.digest) as directory:
                layout = read_adapter_layout(_verified(directory, version.digest))
            if not version.info.get("base_mismatch_allowed"):
                check_base_name(layout.config.base_model_name_or_path, self._identity)
            self._check_layout(layout)
        except AdapterError as error:
            return error
        except OSError as error:  # one bad file must not keep the server from starting
            return AdapterUnavailable(f"its files cannot be read: {error.strerror or error}", subject=version.digest)
        return None

    def _check_first_use(self, digest: str, checkpoint: AnyCheckpoint) -> None:
        """What a check at start would have found; and another server, with a base of its own, may have taken it in."""
        infos = self._store.infos(digest)
        if infos and not any(info.get("base_mismatch_allowed") for info in infos):
            check_base_name(checkpoint.config.base_model_name_or_path, self._identity)
        check_range(checkpoint.extras, self._model)

    def _check_layout(self, layout: AnyLayout) -> None:
        """Holds a layout against the base, once: adapters of one family share theirs."""
        if not any(layout is known for known in self._fitting):
            check_layout(layout, self._model)
            self._fitting.append(layout)


def _verified(directory: Path, digest: str) -> Path:
    """The directory of a version. Raises AdapterUnavailable if its files are not those that were uploaded."""
    if digest_of(directory) != digest:
        raise AdapterUnavailable("its files on disk have changed since the upload; upload it again", subject=digest)
    return directory
