"""How an adapter uses its vector bank."""

from __future__ import annotations

from pydantic import Field

from service.api.schemas.common import QueryModel, ResponseModel


class BankQuery(QueryModel):
    columns: int = Field(256, ge=1, le=1024, description="The most columns to divide the bank into")


class LayerUsage(ResponseModel):
    """A number a column: the share of the side's mixture weights that goes to the column's vectors. Each sums to 1."""

    name: str
    A: list[float]
    B: list[float]


class BankView(ResponseModel):
    """Which bank vectors each layer is mixed from.

    A column stands for `vectors_per_column` neighbouring vectors, the last one for what is left. `used_vectors` are
    those that any tile gives weight to.
    """

    adapter: str
    digest: str
    num_vectors: int
    vector_length: int
    topk: int
    columns: int
    vectors_per_column: int
    used_vectors: int
    unused_vectors: int
    layers: list[LayerUsage]
