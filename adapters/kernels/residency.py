"""Which adapters are in the tables' slots: filled when first needed, kept until the place is."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Sequence

from adapters.factors import AdapterFactors
from adapters.kernels.model_tables import ModelTables
from adapters.kernels.tables import DoesNotFit

log = logging.getLogger(__name__)

_REFUSALS_KEPT = 4096


class SlotResidency:
    """The adapters of one model's tables by digest, each in a slot.

    An adapter stays after its last row has left; the least recently used makes room, its slot is cleared, and none of
    those that a step needs is ever dropped for another of them. Not thread-safe: the model's thread owns it.
    """

    def __init__(self, tables: ModelTables) -> None:
        self._tables = tables
        self._slots: OrderedDict[str, int] = OrderedDict()  # least recently used first
        self._free = list(range(tables.slots))
        self._refused: OrderedDict[str, None] = OrderedDict()
        self.filled = self.evicted = 0

    @property
    def slots(self) -> int:
        return self._tables.slots

    @property
    def resident(self) -> int:
        """How many adapters have a slot."""
        return len(self._slots)

    def hold(self, adapters: Sequence[AdapterFactors]) -> dict[str, int] | None:
        """The slots of all of these, by digest; None if one does not fit the tables, or there are too few slots."""
        wanted = {adapter.digest: adapter for adapter in adapters}
        if len(wanted) > self._tables.slots or self._refused.keys() & wanted.keys():
            return None
        for digest in wanted.keys() & self._slots.keys():
            self._slots.move_to_end(digest)  # so that room is made among the others
        for digest, adapter in wanted.items():
            if digest not in self._slots and not self._fill(adapter):
                return None
        return {digest: self._slots[digest] for digest in wanted}

    def _fill(self, adapter: AdapterFactors) -> bool:
        if not self._free:
            digest, slot = next(iter(self._slots.items()))
            self._tables.clear(slot)
            del self._slots[digest]
            self._free.append(slot)
            self.evicted += 1
        slot = self._free[-1]
        try:
            self._tables.put(slot, adapter)
        except DoesNotFit as error:
            log.info("adapter %s decodes without graphs: %s", adapter.digest, error)
            self._refused[adapter.digest] = None
            while len(self._refused) > _REFUSALS_KEPT:
                self._refused.popitem(last=False)
            return False
        self._slots[adapter.digest] = self._free.pop()
        self.filled += 1
        return True
