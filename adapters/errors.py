"""Everything that can be wrong with an adapter, its file, or its name.

    AdapterError
    ├── InvalidName              a name that the store does not accept
    ├── InvalidSelection         a selection that contradicts itself or cannot be computed
    │   └── MergeUnsupported         a merge into a base that holds its weights quantized
    ├── CheckpointError          a checkpoint that is refused; `subject` names the tensor or the field
    │   ├── UnsupportedCheckpoint    no safetensors of VB-LoRA or plain LoRA, or a part we cannot serve
    │   ├── InvalidSafetensors       the file does not parse
    │   ├── BadConfig                adapter_config.json contradicts itself or the tensors
    │   ├── MissingTensor            a tensor that the config or its partner calls for is absent
    │   ├── UnexpectedTensor         a tensor that nothing calls for
    │   ├── ShapeMismatch            a tensor whose shape does not fit the config or the base model
    │   ├── BadIndex                 a top-k index of a wrong type, out of range, or repeated
    │   ├── BadWeights               top-k weights that are not a mixture
    │   ├── NonFinite                NaN or infinity where a number belongs
    │   ├── NoTargetMatched          the adapter adapts nothing in this base model
    │   └── BaseModelMismatch        the config names another base model
    └── StoreError               what the adapter store answers
        ├── AdapterNotFound
        ├── AdapterExists
        ├── AdapterUnavailable       stored, but not fit to serve (state FAILED)
        ├── AdapterTooLarge          its factors alone exceed the memory budget
        ├── StorageFull
        ├── StoreUnavailable         a shared store that does not answer: try again
        └── StoreCorrupt

Errors carry facts, never HTTP status codes: `code` is the fact's stable name (the `code` field of the
service's error envelope), `subject` what it is about. `service.api.errors` turns them into responses.
"""

from __future__ import annotations

from typing import ClassVar

LONGEST_MESSAGE = 2_000
LONGEST_SUBJECT = 600


class AdapterError(Exception):
    """Base of the tree. `message` says what is wrong and what to do about it.

    Both are cut in the middle if they are long: what a stranger's file holds must not fill logs and answers.
    """

    code: ClassVar[str] = "invalid_request"

    def __init__(self, message: str, *, subject: str | None = None) -> None:
        self.message = _cut(message, LONGEST_MESSAGE)
        self.subject = None if subject is None else _cut(subject, LONGEST_SUBJECT)
        super().__init__(self.message)


def _cut(text: str, longest: int) -> str:
    half = (longest - 1) // 2
    return text if len(text) <= longest else f"{text[:half]}…{text[-half:]}"


class InvalidName(AdapterError):
    pass


class InvalidSelection(AdapterError):
    pass


class MergeUnsupported(InvalidSelection):
    code = "merge_unsupported"


class CheckpointError(AdapterError):
    code = "bad_config"


class UnsupportedCheckpoint(CheckpointError):
    code = "unsupported_checkpoint"


class InvalidSafetensors(CheckpointError):
    code = "invalid_safetensors"


class BadConfig(CheckpointError):
    code = "bad_config"


class MissingTensor(CheckpointError):
    code = "missing_tensor"


class UnexpectedTensor(CheckpointError):
    code = "unexpected_tensor"


class ShapeMismatch(CheckpointError):
    code = "shape_mismatch"


class BadIndex(CheckpointError):
    code = "bad_index"


class BadWeights(CheckpointError):
    code = "bad_weights"


class NonFinite(CheckpointError):
    code = "non_finite"


class NoTargetMatched(CheckpointError):
    code = "no_target_matched"


class BaseModelMismatch(CheckpointError):
    code = "base_model_mismatch"


class StoreError(AdapterError):
    code = "internal_error"


class AdapterNotFound(StoreError):
    code = "adapter_not_found"


class AdapterExists(StoreError):
    code = "adapter_exists"


class AdapterUnavailable(StoreError):
    code = "adapter_unavailable"


class AdapterTooLarge(StoreError):
    code = "adapter_unavailable"


class StorageFull(StoreError):
    code = "storage_full"


class StoreUnavailable(StoreError):
    code = "store_unavailable"


class StoreCorrupt(StoreError):
    code = "internal_error"
