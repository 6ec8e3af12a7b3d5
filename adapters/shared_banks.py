"""Vector banks in memory: equal ones once for all adapters that have them, and once more on a device that is elsewhere.

Nothing here keeps a bank: it goes with the last adapter that has it, its copy on the device with the last factors that
were composed from it.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterable
from dataclasses import replace
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch

from adapters.checkpoint import TopKCheckpoint
from adapters.layout import AdapterLayout
from adapters.lora import ServedCheckpoint
from adapters.reading import AnyLayout
from adapters.vector_bank import VectorBank

_Identity = tuple[torch.dtype, torch.Size, bytes]


class SharedBanks:
    """The banks of one registry's adapters, in the host's memory and on `device`. Any thread may call it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._lock = threading.Lock()
        self._banks: WeakValueDictionary[_Identity, VectorBank] = WeakValueDictionary()
        self._copies: WeakValueDictionary[_Identity, VectorBank] = WeakValueDictionary()
        self._identities: WeakKeyDictionary[VectorBank, _Identity] = WeakKeyDictionary()

    def shared(self, checkpoint: ServedCheckpoint) -> ServedCheckpoint:
        """The same adapter with the bank that others have already, if theirs is equal in dtype, shape and bytes."""
        if not isinstance(checkpoint, TopKCheckpoint):
            return checkpoint
        identity = _identity(checkpoint.bank)
        with self._lock:
            bank = self._banks.setdefault(identity, checkpoint.bank)
            self._identities[bank] = identity
        return checkpoint if bank is checkpoint.bank else replace(checkpoint, bank=bank)

    def on_device(self, bank: VectorBank) -> VectorBank:
        """The bank on the device: itself where it is there, else the one copy of it, for whoever composes from it now.

        The copy lasts as long as somebody holds it.
        """
        if not self._copied:
            return bank
        with self._lock:
            identity = self._identities.get(bank) or _identity(bank)
            copy = self._copies.get(identity)
            if copy is None:
                copy = self._copies[identity] = VectorBank(bank.vectors.to(self._device))
            return copy

    def copied_bytes(self) -> int:
        """Bytes of the device's memory that copies of banks take."""
        with self._lock:
            return sum(copy.vectors.nbytes for copy in self._copies.values())

    def most_copied(self, layout: AnyLayout) -> int:
        """The most bytes that the copy of an adapter's bank takes on the device."""
        if not self._copied or not isinstance(layout, AdapterLayout):
            return 0
        return 4 * layout.config.num_vectors * layout.config.vector_length

    @property
    def _copied(self) -> bool:
        """Whether the device computes with memory of its own: checkpoints are read into the host's."""
        return self._device.type != "cpu"


def bytes_together(checkpoints: Iterable[ServedCheckpoint]) -> int:
    """Bytes that adapters hold in memory, a bank that several have counted once."""
    total, banks = 0, {}
    for checkpoint in checkpoints:
        total += checkpoint.nbytes
        if isinstance(checkpoint, TopKCheckpoint):
            total -= checkpoint.bank.vectors.nbytes
            banks[id(checkpoint.bank)] = checkpoint.bank.vectors.nbytes
    return total + sum(banks.values())


def _identity(bank: VectorBank) -> _Identity:
    content = bank.vectors.contiguous().view(torch.uint8).numpy().data
    return bank.vectors.dtype, bank.vectors.shape, hashlib.sha256(content).digest()
