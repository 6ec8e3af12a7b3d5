"""The tensors of a checkpoint file, read by key and checked."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load
from torch import Tensor

from adapters.errors import InvalidSafetensors, NonFinite
from adapters.split_file import READ_AT_ONCE, WEIGHTS_FILE, file_size, is_split, open_file

# In a batch every row meets every adapter's factors, and what is not its own is multiplied by 0: products of one
# adapter's factors and another row's activations must be finite. Trained ones hold numbers below 1.
LARGEST_IN_FACTORS = 1e15

ReadTensor = Callable[[str], Tensor]


@contextmanager
def tensors_in(directory: Path) -> Iterator[ReadTensor]:
    """Reads an adapter's tensors by key. What it returns may be a view of the mapped file: copy what is kept.

    A small file is read at once: a compact adapter has hundreds of small tensors. So is one whose bank is kept apart:
    what is mapped must be one file. Raises InvalidSafetensors.
    """
    path = directory / WEIGHTS_FILE
    try:
        if is_split(path) or file_size(path) <= READ_AT_ONCE:
            yield load(_content(path)).__getitem__
        else:
            with safe_open(path, framework="pt") as file:
                yield file.get_tensor
    except SafetensorError as error:
        raise InvalidSafetensors(f"the weights cannot be read: {error}", subject=WEIGHTS_FILE) from error


def _content(path: Path) -> bytes:
    with open_file(path) as file:
        return file.read()


def finite(key: str, tensor: Tensor) -> Tensor:
    """The tensor. Raises NonFinite."""
    if not bool(tensor.isfinite().all()):
        raise NonFinite(f"{key} contains NaN or infinity; was the training run healthy?", subject=key)
    return tensor


def bounded(key: str, tensor: Tensor) -> Tensor:
    """The tensor, finite and so small that its products stay finite: infinity would become NaN in others' rows."""
    finite(key, tensor)
    if bool((tensor.abs() > LARGEST_IN_FACTORS).any()):
        raise NonFinite(f"{key} holds numbers beyond {LARGEST_IN_FACTORS:g}; was the run healthy?", subject=key)
    return tensor
