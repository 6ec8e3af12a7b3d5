"""What a server does with texts. It is started for one task, which decides how its base model is loaded."""

from __future__ import annotations

from enum import StrEnum


class Task(StrEnum):
    """GENERATE continues texts, token by token; SEQ2SEQ reads a text and writes another, by an encoder and a decoder;
    CLASSIFY and EMBED read each text once and answer with numbers.
    """

    GENERATE = "generate"
    SEQ2SEQ = "seq2seq"
    CLASSIFY = "classify"
    EMBED = "embed"

    @classmethod
    def of_adapter(cls, task_type: str | None) -> Task:
        """What an adapter was trained for, by its config's `task_type`."""
        return {
            "SEQ_CLS": cls.CLASSIFY,
            "FEATURE_EXTRACTION": cls.EMBED,
            "SEQ_2_SEQ_LM": cls.SEQ2SEQ,
        }.get(task_type or "", cls.GENERATE)

    @property
    def pools(self) -> bool:
        """Whether one forward over the text gives the answer, with nothing generated."""
        return self in (Task.CLASSIFY, Task.EMBED)


class Pooling(StrEnum):
    """Which of a text's token vectors make its embedding: all on average, the first, or the last."""

    MEAN = "mean"
    CLS = "cls"
    LAST = "last"
