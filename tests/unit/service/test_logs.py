"""What a log line looks like, and what never gets into one."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator

import pytest

from service.logs import ACCESS_LOGGER, PRIVATE_FIELDS, PROMPT_FIELDS, setup_logging

LOGGERS = ("", "service", "adapters", "vblora", "uvicorn")


@pytest.fixture(autouse=True)
def restored_logging() -> Iterator[None]:
    root = logging.getLogger()
    handlers, levels = root.handlers[:], {name: logging.getLogger(name).level for name in LOGGERS}
    yield
    root.handlers[:] = handlers
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
    logging.captureWarnings(False)


def lines(format: str, level: str = "info", *, prompts: bool = False) -> io.StringIO:
    stream = io.StringIO()
    setup_logging(format=format, level=level, prompts=prompts, stream=stream)
    return stream


def test_text_is_a_line_with_fields() -> None:
    stream = lines("text")
    fields = {"request_id": "r1", "status": 200, "duration_s": 0.123456789, "path": "/a b", "code": None}
    logging.getLogger("vblora.access").info("%s", "request", extra=fields)
    time, rest = stream.getvalue().split(" ", 1)
    assert time.endswith("Z")
    assert rest == 'INFO vblora.access: request request_id=r1 status=200 duration_s=0.123457 path="/a b"\n'


def test_json_is_one_object_a_line() -> None:
    stream = lines("json")
    logging.getLogger("service.x").warning("a\nb", extra={"n": 1, "x": float("nan"), "path": stream, "level": "mine"})
    (line,) = stream.getvalue().splitlines()
    record = json.loads(line)
    assert (record["level"], record["logger"], record["message"], record["n"]) == ("warning", "service.x", "a\nb", 1)
    assert record["x"] == "nan"


@pytest.mark.parametrize("format", ["text", "json"])
def test_exceptions_are_kept(format: str) -> None:
    stream = lines(format)
    try:
        raise ValueError("broken")
    except ValueError:
        logging.getLogger("service").exception("failed")
    assert "ValueError: broken" in stream.getvalue()
    assert format == "text" or "ValueError" in json.loads(stream.getvalue())["exception"]


def test_text_from_a_client_cannot_start_a_line_or_drive_a_terminal() -> None:
    stream = lines("text")
    logging.getLogger("vblora").info("%s", "x\n2026 ERROR forged\x1b[2J", extra={"path": "\r\x07"})
    assert len(stream.getvalue().splitlines()) == 1
    assert "\x1b" not in stream.getvalue()
    assert "\x07" not in stream.getvalue()


@pytest.mark.parametrize("format", ["text", "json"])
@pytest.mark.parametrize("name", sorted(PRIVATE_FIELDS))
def test_private_fields_are_left_out(format: str, name: str) -> None:
    stream = lines(format)
    logging.getLogger("service").info("done", extra={name: "a secret"})
    assert "secret" not in stream.getvalue()


@pytest.mark.parametrize("format", ["text", "json"])
def test_the_access_log_alone_gets_prompts_and_outputs_and_only_when_asked(format: str) -> None:
    stream = lines(format, prompts=True)
    private = dict.fromkeys(PRIVATE_FIELDS - PROMPT_FIELDS, "a secret")
    logging.getLogger(ACCESS_LOGGER).info("request", extra={**private, "prompt": "a\nquestion", "output": ["x", "y"]})
    (line,) = stream.getvalue().splitlines()
    assert "question" in line
    assert "secret" not in line
    if format == "json":
        assert (json.loads(line)["prompt"], json.loads(line)["output"]) == ("a\nquestion", ["x", "y"])
    for name in ("service.engine", "vblora.other"):
        logging.getLogger(name).info("done", extra={"prompt": "a secret", "output": "a secret"})
    assert "secret" not in stream.getvalue()


def test_levels() -> None:
    stream = lines("text", "debug")
    logging.getLogger("service.engine").debug("ours")
    logging.getLogger("uvicorn.error").info("uvicorn's")
    logging.getLogger("httpx").info("a library's")
    logging.getLogger("httpx").warning("a library's warning")
    assert [line.split(": ")[1] for line in stream.getvalue().splitlines()] == [
        "ours",
        "uvicorn's",
        "a library's warning",
    ]


def test_setting_up_again_replaces() -> None:
    first, second = lines("text"), lines("json", "error")
    logging.getLogger("service").info("hidden")
    logging.getLogger("service").error("shown")
    assert first.getvalue() == ""
    assert json.loads(second.getvalue())["message"] == "shown"
