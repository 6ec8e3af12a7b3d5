"""What constrains a choice's output: a grammar, and one choice's way through it.

The engine asks only this much; `service.api.guidance` implements it over llguidance.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor


class GrammarFailed(ValueError):
    """A grammar that cannot be followed further, by the fault of who wrote it. The message says why."""


class Guide(Protocol):
    """One choice's state. Used by one thread at a time. Raises GrammarFailed where it can go no further."""

    def allowed(self) -> Tensor:
        """Which tokens may come next: bool [vocabulary], true for at least one."""
        ...

    def accept(self, token_id: int) -> None:
        """Takes the token that was chosen, one of those allowed."""
        ...

    @property
    def complete(self) -> bool:
        """Whether nothing more may follow."""
        ...


class Grammar(Protocol):
    """What the output must look like. Compiled, so that starting is cheap."""

    @property
    def source(self) -> str:
        """What it was compiled from: equal sources allow equal outputs."""
        ...

    def start(self) -> Guide:
        """A guide for one choice, at its beginning. From any thread."""
        ...
