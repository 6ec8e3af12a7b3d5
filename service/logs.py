"""Logging: one handler, text for people or one JSON object a line for machines.

Prompts and outputs are never logged, unless `setup_logging` is told to let the access log have them.

Whatever a record carries in `extra` becomes a field: `log.info("registered", extra={"adapter": name})` is written
`… registered adapter=sql`, or as a key of the JSON object.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any, TextIO

OWN_LOGGERS = ("adapters", "service", "vblora", "uvicorn")

# What users write and what lets them in has no place in a log, whoever hands it to one.
PRIVATE_FIELDS = frozenset({"prompt", "messages", "input", "text", "content", "output", "authorization", "api_key"})

# The one exception, and only when it is asked for.
ACCESS_LOGGER = "vblora.access"
PROMPT_FIELDS = frozenset({"prompt", "output"})

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName", "color_message"}
_STANDARD |= {"_ray_timestamp_ns"}  # Ray gives one to every record
_PLAIN = re.compile(r"[\w.:/@+,%=-]+")


def setup_logging(
    *, format: str = "text", level: str = "info", prompts: bool = False, stream: TextIO | None = None
) -> None:
    """Sends every logger's records to `stream` (stderr), from `level` upwards; libraries' from warning upwards.

    With `prompts` the access log's records keep their prompt and output. Calling it again replaces what it set up
    before.
    """
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter((JsonFormatter if format == "json" else TextFormatter)(prompts=prompts))
    threshold = logging.getLevelNamesMapping()[level.upper()]
    logging.basicConfig(handlers=[handler], level=max(threshold, logging.WARNING), force=True)
    logging.captureWarnings(True)
    for name in OWN_LOGGERS:
        logging.getLogger(name).setLevel(threshold)


class _Formatter(logging.Formatter):
    def __init__(self, *, prompts: bool) -> None:
        super().__init__()
        self._prompts = prompts

    def fields_of(self, record: logging.LogRecord) -> Iterator[tuple[str, Any]]:
        """What the record carries besides logging's own attributes; nothing private, and nothing that is None."""
        private = PRIVATE_FIELDS
        if self._prompts and record.name == ACCESS_LOGGER:
            private -= PROMPT_FIELDS
        for name, value in vars(record).items():
            if name not in _STANDARD and name not in private and value is not None:
                yield name, value


class TextFormatter(_Formatter):
    """`2026-01-31T12:00:00.123Z INFO service.engine: message key=value`."""

    def format(self, record: logging.LogRecord) -> str:
        words = [_time(record), record.levelname, f"{record.name}:", printable(record.getMessage())]
        words += [f"{name}={_quoted(value)}" for name, value in self.fields_of(record)]
        return "\n".join([" ".join(words), *_trace(self, record)])


class JsonFormatter(_Formatter):
    """`{"time": …, "level": …, "logger": …, "message": …, "key": value, "exception": …}` on one line."""

    def format(self, record: logging.LogRecord) -> str:
        values: dict[str, Any] = {
            "time": _time(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        for name, value in self.fields_of(record):
            values.setdefault(name, value if not isinstance(value, float) or math.isfinite(value) else str(value))
        for trace in _trace(self, record):
            values["exception"] = trace
        return json.dumps(values, default=str)


def quiet_libraries() -> None:
    """Silences what libraries that are only installed say when others import them: which kernels they do without,
    and that the Hub is asked once more: the error at the end says that it cannot be reached.
    """
    for name in ("bitsandbytes", "torchao", "torch.utils._pytree", "huggingface_hub.utils._http"):
        logging.getLogger(name).setLevel(logging.ERROR)


def draws(stream: TextIO) -> bool:
    """Whether bars may be drawn on a stream: it is a terminal that can, and nobody asked for plain text."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def printable(text: str) -> str:
    """Text with its control characters spelled out: what a client sent can neither end a line nor drive a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _time(record: logging.LogRecord) -> str:
    moment = datetime.fromtimestamp(record.created, UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _trace(formatter: logging.Formatter, record: logging.LogRecord) -> Iterator[str]:
    if record.exc_info and record.exc_info[0] is not None:
        yield formatter.formatException(record.exc_info)


def _quoted(value: Any) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else printable(str(value))
    return text if _PLAIN.fullmatch(text) else json.dumps(text, ensure_ascii=False)
