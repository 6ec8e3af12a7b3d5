"""What ran, as answers and receipts say it."""

from __future__ import annotations

from service.api.schemas.common import ResponseModel
from service.engine.selection import Selection


class SelectedView(ResponseModel):
    name: str
    digest: str
    weight: float


class SelectionView(ResponseModel):
    """What ran. No adapters: the base model."""

    adapters: list[SelectedView]
    mode: str

    @classmethod
    def of(cls, selection: Selection, mode: str) -> SelectionView:
        """`mode` is what ran, which is not always what the selection prefers."""
        adapters = [SelectedView(name=a.name, digest=a.digest, weight=a.weight) for a in selection.adapters]
        return cls(adapters=adapters, mode=mode)
